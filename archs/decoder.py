"""The decoder-only language model all variants share: pre-RMSNorm, SwiGLU, RoPE, no biases.

A variant supplies its attention layers, their caches and how many elements those hold (`Decoder`'s last methods); this
file has the rest, cost accounting included, so that what a token costs cannot drift from the model.

Shapes: B batch, T tokens, W width, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args, get_origin

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archs.attention import Rope, rope_table
from archs.cache import Cache
from archs.cpu.building import takes
from archs.cpu.layers import (
    FEW,
    add,
    learning_gated,
    learning_rms_norm,
    linear,
    product,
    swiglu,
    take,
    takes_few,
    takes_product,
)
from archs.graph import RecordedStep, records

NORM_EPS = 1e-6
AT_ONCE = {"cpu": 2**11, "cuda": 2**17}  # tokens in a layer during prefill; what is made of them fits a CPU's caches


def option(default: Any = dataclasses.MISSING, *, at_least: float = 1, below: float = 2**31) -> Any:
    """A field of `Options` with its range; None as default means: derived from the others."""
    return field(default=default, metadata={"at_least": at_least, "below": below})


class _Fields:
    def __get__(self, options, kind):
        return {f.name: f for f in dataclasses.fields(kind)}


@dataclass(kw_only=True)
class Options:
    """What `build` takes for every variant. A ValueError names an option that is wrong and what is allowed."""

    vocab_size: int = option()
    width: int = option()
    layers: int = option()
    heads: int = option()
    context: int = option()
    head_dim: int = option(None)  # width / heads
    ffn_width: int = option(None)  # 8/3 width, rounded up to 64 (SwiGLU, arXiv 2002.05202)
    rope_base: float = option(10_000.0)
    tie_embeddings: bool = option(True)
    dropout: float = option(0.0, at_least=0, below=1)
    rotary: ClassVar[str] = "head_dim"  # the option that is the size of what is rotated

    model_fields = _Fields()

    def model_dump(self) -> dict:
        return dataclasses.asdict(self)

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            if getattr(self, f.name) is not None or f.default is not None:
                setattr(self, f.name, _checked(f, getattr(self, f.name)))
        if self.head_dim is None:
            self.check(
                self.width % self.heads == 0, f"heads={self.heads} must divide width={self.width}, or give head_dim"
            )
            self.head_dim = self.width // self.heads
        if self.ffn_width is None:
            self.ffn_width = -(-self.width * 8 // 3 // 64) * 64
        self.derive()
        turned = self.rotary_dim
        self.check(
            turned % 2 == 0, f"{self.rotary}={turned}: must be even, as rotary positions turn pairs of dimensions"
        )

    def derive(self) -> None:
        """Fills and checks a variant's own options."""

    @property
    def rotary_dim(self) -> int:
        return getattr(self, self.rotary)

    @staticmethod
    def check(fine: bool, otherwise: str) -> None:
        if not fine:
            raise ValueError(otherwise)


def _checked(f: dataclasses.Field, value: Any) -> Any:
    if get_origin(f.type) is Literal:
        Options.check(value in get_args(f.type), f"{f.name}={value!r}: must be one of {', '.join(get_args(f.type))}")
        return value
    number = isinstance(value, int if f.type is not float else int | float) and not isinstance(value, bool)
    if f.type is bool:
        Options.check(isinstance(value, bool), f"{f.name}={value!r}: must be true or false")
        return value
    low, high = f.metadata["at_least"], f.metadata["below"]
    kind = "a whole number" if f.type is int else "a number"
    fits = number and low <= value < high
    Options.check(fits, f"{f.name}={value!r}: must be {kind} of at least {low} and below {high}")
    return f.type(value)


def check_sizes(batch_size: int, max_tokens: int) -> None:
    """ValueError for those of no cache."""
    for name, value in (("batch_size", batch_size), ("max_tokens", max_tokens)):
        if value < 1:
            raise ValueError(f"{name}={value}: must be at least 1")


def kv_heads_divide(options: Any) -> None:
    options.check(
        options.heads % options.kv_heads == 0,
        f"kv_heads={options.kv_heads} must divide heads={options.heads}",
    )


def normed(x: Tensor, weight: Tensor | None = None) -> Tensor:
    """RMSNorm over the last dimension; ours on a CPU, where torch's is seven passes."""
    if not takes(x, *([] if weight is None else [weight]), learns=True):
        return F.rms_norm(x, x.shape[-1:], weight, NORM_EPS)
    x = x if x.stride(-1) == 1 else x.contiguous()
    return learning_rms_norm(x.reshape(-1, x.shape[-1]), weight, NORM_EPS).view(x.shape)


class RMSNorm(nn.RMSNorm):
    """torch's, computed in the dtype of its weight: autocast would hand it bf16, which torch norms slowly."""

    def __init__(self, size: int):
        super().__init__(size, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return normed(x.to(self.weight.dtype), self.weight)


class Embedding(nn.Embedding):
    """torch's; on a CPU ours for few tokens."""

    def forward(self, tokens: Tensor) -> Tensor:
        few = tokens.dtype == torch.int64 and tokens.numel() <= FEW
        ours = few and self.weight.is_contiguous() and takes(self.weight)
        return take(self.weight, tokens.contiguous()) if ours else super().forward(tokens)


class Linear(nn.Linear):
    """torch's without bias; on a CPU ours for few rows, as in a decode step, where no gradient is wanted, and for many
    where torch's is slower."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if takes_few(x, self.weight):
            return linear(x.contiguous(), self.weight)
        if takes_product(x, self.weight):
            return product(x.contiguous(), self.weight, True)
        return super().forward(x)


class FFN(nn.Module):
    """SwiGLU (arXiv 2002.05202): down(silu(gate) * up)."""

    def __init__(self, width: int, ffn_width: int):
        super().__init__()
        self.gate_up = Linear(width, 2 * ffn_width)
        self.down = Linear(ffn_width, width)

    def forward(self, x_BTW: Tensor) -> Tensor:
        gate_up, down = self.gate_up.weight, self.down.weight
        if takes_few(x_BTW, gate_up, down):
            return swiglu(x_BTW.contiguous(), gate_up, down)
        gate_up = self.gate_up(x_BTW)
        if gate_up.is_contiguous() and takes(gate_up, learns=True):
            return self.down(learning_gated(gate_up))
        gate, up = gate_up.chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


def plus(x: Tensor, y: Tensor) -> Tensor:
    """x + y; of few tokens on a CPU ours, which starts faster."""
    return add(x.contiguous(), y.contiguous()) if takes_few(x) and takes(y) else x + y


def tie(model: "Decoder", *_: Any) -> None:
    """One matrix embeds and unembeds."""
    model.unembed.weight = model.embed.weight


def dropout(p: float) -> nn.Module:
    return nn.Dropout(p) if p else nn.Identity()


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)), of as many last positions as the attention returns.

    What follows x is handed on to the attention.
    """

    def __init__(self, options: Options, attention: nn.Module):
        super().__init__()
        self.attention_norm = RMSNorm(options.width)
        self.attention = attention
        self.ffn_norm = RMSNorm(options.width)
        self.ffn = FFN(options.width, options.ffn_width)
        self.dropout = dropout(options.dropout)

    def forward(self, x_BTW: Tensor, rope: Rope, *cached: Any) -> Tensor:
        attended_BTW = self.attention(self.attention_norm(x_BTW), rope, *cached)
        if attended_BTW.shape[1] < x_BTW.shape[1]:
            x_BTW = x_BTW[:, -attended_BTW.shape[1] :]
        x_BTW = plus(x_BTW, self.dropout(attended_BTW))
        return plus(x_BTW, self.dropout(self.ffn(self.ffn_norm(x_BTW))))


class Decoder(nn.Module):
    """A language model whose layers `layer_attention` makes; see the module's docstring.

    An attention layer is called as `layer(x_BTW, rope)` for training. To append T tokens to its part of the cache it is
    called as `layer(x_BTW, rope, part, start, only_last)`: from position `start` on (a tensor: one token, at a place
    that only the device knows, or at one for each sequence (B, 1, 1)), returning the last position alone with
    `only_last`. Of a decode step the Python runs once, what it called is replayed (graph.py): what changes from step to
    step is in tensors. A projection named `out` ends it. Projections are `Linear`, cached storages are made by
    `cache.zeros`: a variant then decodes as fast on a CPU as the others do.
    """

    Options: ClassVar[type] = Options
    # Option sets for 4 heads that between them reach every path of the variant; the tests run their laws over them.
    examples: ClassVar[Sequence[dict]] = ({},)
    early_exit: ClassVar[bool] = False  # of a prompt only the last token goes through the layers that attend to all

    def __init__(self, options: Options):
        super().__init__()
        self.options = o = options
        self.embed = Embedding(o.vocab_size, o.width)
        self.dropout = dropout(o.dropout)
        self.blocks = nn.ModuleList(Block(o, self.layer_attention(layer)) for layer in range(o.layers))
        self.norm = RMSNorm(o.width)
        self.unembed = Linear(o.width, o.vocab_size)
        if o.tie_embeddings:
            tie(self)
            self.register_load_state_dict_post_hook(tie)  # `assign` puts two parameters in their places
        self.add_modules()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal with std 0.02; projections into the residual stream scaled by 1/sqrt(2 layers), as GPT-2 does."""
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                residual = name.endswith(("attention.out.weight", "ffn.down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.options.layers) if residual else 0.02)

    # Running the model

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits (B, T, V) of every position; position t sees tokens 0 .. t."""
        return self.unembed(self.last_hidden_state(tokens_BT))

    def last_hidden_state(self, tokens_BT: Tensor) -> Tensor:
        """What the unembedding sees of each position, (B, T, W)."""
        return self.norm(self.hidden(self.dropout(self.embed(tokens_BT))))

    @torch.no_grad()
    def prefill(self, tokens_BT: Tensor, cache: Cache) -> Tensor:
        """Appends T tokens to the cache; logits (B, V) of the last. ValueError if the cache has no room for them.

        Sequences go through the layers a few at a time, so that what a layer makes of them stays small.
        """
        B, T = tokens_BT.shape
        cache.check_room(B, T)
        cache.announce(tokens_BT)
        rows = max(1, AT_ONCE.get(tokens_BT.device.type, 2**17) // T)
        if rows >= B or not cache.static:
            logits_BV = self.append(tokens_BT, cache, cache.length)
        else:
            some = range(0, B, rows)
            logits = [self.append(tokens_BT[i : i + rows], cache.rows(i, rows), cache.length) for i in some]
            logits_BV = torch.cat(logits)
        cache.advance(T)
        return logits_BV

    @torch.no_grad()
    def decode(self, tokens_B: Tensor, cache: Cache) -> Tensor:
        """Appends one token to each sequence; logits (B, V). A cache's steps are recorded and replayed (graph.py)."""
        if not records(self.embed.weight, cache):
            return self.prefill(tokens_B[:, None], cache)
        cache.check_room(len(tokens_B), 1)
        cache.step = cache.step or RecordedStep(cache.batch_size, tokens_B.device)
        logits_BV = cache.step(self, tokens_B, cache)
        cache.advance(1)
        return logits_BV

    def append(self, tokens_BT: Tensor, cache: Cache, start: int | Tensor) -> Tensor:
        """Runs T tokens from position `start` on; logits (B, V) of the last."""
        return self.unembed(self.norm(self.hidden(self.embed(tokens_BT), cache, start)[:, -1]))

    def new_cache(
        self,
        batch_size: int,
        max_tokens: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Cache:
        """An empty cache for up to `max_tokens` a sequence; dtype and device default to the model's."""
        check_sizes(batch_size, max_tokens)
        weight = self.embed.weight
        with torch.inference_mode(False):  # a cache made in inference mode could not be written outside of it
            parts = self.new_parts(batch_size, max_tokens, dtype or weight.dtype, device or weight.device)
        return Cache(parts, batch_size, max_tokens)

    def hidden(self, x_BTW: Tensor, cache: Cache | None = None, start: int | Tensor = 0) -> Tensor:
        """The residual stream after the last layer; with a cache of the last position alone.

        The other tokens leave their keys and values in the last layer and go no further (as in YOCO's early exit).
        """
        rope = self.rope(x_BTW, start)
        for layer, block in enumerate(self.blocks):
            only_last = cache and layer == len(self.blocks) - 1 and not cache.whole_prompt
            cached = (cache.parts[layer], start, only_last) if cache else ()
            x_BTW = block(x_BTW, rope, *cached)
        return x_BTW

    def rope(self, x_BTW: Tensor, start: int | Tensor) -> Rope:
        o, dtype = self.options, torch.float64 if self.embed.weight.dtype == torch.float64 else torch.float32
        return rope_table(start, x_BTW.shape[1], o.rotary_dim, o.rope_base, x_BTW.device, dtype)

    # What it costs

    def count_params(self, embedding: bool = True) -> int:
        """Parameters, each once; without `embedding` the token embedding and the unembedding are left out."""
        tables = {self.embed.weight, self.unembed.weight}
        return sum(p.numel() for p in self.parameters() if embedding or p not in tables)

    def kv_bytes_per_token(self, dtype: torch.dtype) -> int:
        """Bytes that each further token adds to one sequence's cache, once every window is full."""
        return self.kv_elements_per_token() * dtype.itemsize

    def kv_constant_bytes(self, dtype: torch.dtype) -> int:
        """Bytes that one sequence holds however long it grows."""
        return self.kv_constant_elements() * dtype.itemsize

    def kv_stored_bytes(self, context: int, dtype: torch.dtype) -> int:
        """Bytes that one sequence of `context` tokens holds."""
        return self.kv_stored_elements(context) * dtype.itemsize

    def kv_read_bytes(self, context: int, dtype: torch.dtype) -> int:
        """Bytes of cache that one decode step of one sequence must read when it holds `context` tokens."""
        return self.kv_read_elements(context) * dtype.itemsize

    def flops_per_token(self, context: int) -> float:
        """Forward FLOPs a token, mean over a training sequence of `context` tokens; training takes three times this."""
        return self.matmul_flops() + self.score_flops(context)

    def decode_flops(self, context: int) -> float:
        """FLOPs of one decode step of one sequence that then holds `context` tokens."""
        return self.matmul_flops() + self.decode_score_flops(context)

    def matmul_flops(self) -> int:
        """Forward FLOPs a token in the weight matrices, unembedding included: two for each weight."""
        return 2 * sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))

    # What a variant says of itself

    def hf_class(self) -> tuple[str, str, dict[str, Any]]:
        """(model type, class, what its config has of its own) in Hugging Face transformers; ValueError without one."""
        raise ValueError(f"transformers has no class that computes {type(self).__name__}")

    def hf_attention(self, attention: nn.Module) -> dict[str, Tensor]:
        """The weights of a layer's attention, but for the output projection, under that class's names for them."""
        raise NotImplementedError

    def layer_attention(self, layer: int) -> nn.Module:
        raise NotImplementedError

    def add_modules(self) -> None:
        """For what belongs to no layer."""

    def new_parts(self, batch_size: int, max_tokens: int, dtype: torch.dtype, device) -> list:
        """The cache of each layer; the first dimension of every tensor in it is the batch."""
        raise NotImplementedError

    def kv_elements_per_token(self) -> int:
        raise NotImplementedError

    def kv_constant_elements(self) -> int:
        return 0

    def kv_stored_elements(self, context: int) -> int:
        return self.kv_elements_per_token() * context

    def kv_read_elements(self, context: int) -> int:
        return self.kv_stored_elements(context)

    def score_flops(self, context: int) -> float:
        """Forward FLOPs a token of queries against keys and weights against values, over the pairs that are seen."""
        raise NotImplementedError

    def decode_score_flops(self, context: int) -> float:
        """The same for one decode step that reads `context` tokens."""
        raise NotImplementedError


def mean_seen(context: int, window: int | None = None) -> float:
    """Mean number of tokens that a token of a sequence sees, itself included: min(t, window) over t = 1 .. context."""
    window = min(window or context, context)
    return (window * (window + 1) / 2 + (context - window) * window) / context
