"""The decoder-only language model that all variants share: pre-RMSNorm, SwiGLU, RoPE, no biases.

A variant supplies its attention layers and what they attend to (`Decoder`'s last methods), and what a token costs
(archs/costs.py).

Shapes: B batch, T tokens, H heads, D head size, W width, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from archs import ops, sampling
from archs.cache import Allocator, Cache
from archs.costs import Costs
from archs.kv import KV, Training
from archs.settings import Settings, Size


class Options(Settings):
    """The options of `build` that every variant has."""

    vocab_size: Size
    width: Size
    layers: Size
    heads: Size
    context: Size
    head_dim: Size | None = None  # width / heads
    ffn_width: Size | None = None  # 8/3 width, rounded up to 64 (SwiGLU, arXiv 2002.05202)
    rope_base: float = Field(10_000.0, ge=1, lt=2**31)
    norm_eps: float = Field(ops.NORM_EPS, gt=0, lt=1)  # of RMSNorms but those of a latent or a state
    tie_embeddings: bool = True
    dropout: float = Field(0.0, ge=0, lt=1)
    qk_norm: bool = False  # RMSNorm of each head's query and key (Qwen3, arXiv 2505.09388, section 2)
    gate: bool = False  # each head's output times sigmoid(x W_gate) (arXiv 2505.06708, section 2.2: G1, headwise)
    rotary: ClassVar[str] = "head_dim"  # the option that says how many dimensions of a head are rotated

    @model_validator(mode="after")
    def _complete(self) -> "Options":
        if self.head_dim is None:
            divides = self.width % self.heads == 0
            self.check(divides, f"heads={self.heads} must divide width={self.width}, or give head_dim")
            self.head_dim = self.width // self.heads
        self.ffn_width = self.ffn_width or -(-self.width * 8 // 3 // 64) * 64
        self.complete()
        size = self.rotary_dim
        self.check(size % 2 == 0, f"{self.rotary}={size}: must be even, as rotary positions turn pairs of dimensions")
        return self

    def complete(self) -> None:
        """Fills in and checks the options of one variant: `self.check(condition, otherwise)`."""

    @property
    def rotary_dim(self) -> int:
        return getattr(self, self.rotary)


class Chunk(NamedTuple):
    """The tokens of one forward pass: their first position (a tensor in a recorded step), the rotary table, and of how
    many of the last tokens a layer must return its output."""

    start: int | Tensor
    cos: Tensor
    sin: Tensor
    queries: int

    def rotate(self, x_BHTD: Tensor) -> Tensor:
        """Rotary positions applied to the last T tokens of the chunk."""
        T = x_BHTD.shape[2]
        return ops.rotate(x_BHTD, self.cos[..., -T:, :], self.sin[..., -T:, :])


class RMSNorm(nn.RMSNorm):
    """Computed in the dtype of its weight: autocast would make it bf16, which PyTorch norms slowly."""

    def __init__(self, size: int, eps: float = ops.NORM_EPS):
        super().__init__(size, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x.to(self.weight.dtype), self.weight, self.eps)


class HeadNorm(nn.Module):
    """RMSNorm of queries and keys (B, H, T, D) before their rotation; one weight for each number in `heads`."""

    def __init__(self, size: int, *heads: int, eps: float = ops.NORM_EPS):
        super().__init__()
        self.heads, self.parts = heads, nn.ModuleList(RMSNorm(size, eps) for _ in heads)

    def forward(self, x_BHTD: Tensor) -> Tensor:
        split = zip(self.parts, x_BHTD.split(self.heads, dim=1), strict=True)
        return torch.cat([norm(part_BHTD) for norm, part_BHTD in split], dim=1).to(x_BHTD.dtype)


def head_norm(o: Options, size: int, *heads: int) -> nn.Module:
    return HeadNorm(size, *heads, eps=o.norm_eps) if o.qk_norm else nn.Identity()


class Output(nn.Linear):
    """The projection of all heads' outputs (B, H, T, E) to the residual stream, after the gate where there is one."""

    def __init__(self, o: Options, size: int):
        super().__init__(o.heads * size, o.width, bias=False)
        self.gate = nn.Linear(o.width, o.heads, bias=False) if o.gate else None

    def forward(self, out_BHTE: Tensor, x_BTW: Tensor) -> Tensor:
        if self.gate:
            gate_BTH = self.gate(x_BTW[:, -out_BHTE.shape[2] :]).sigmoid()
            out_BHTE = out_BHTE * gate_BTH.mT[..., None]
        return super().forward(ops.merge_heads(out_BHTE))


class FFN(nn.Module):
    """SwiGLU (arXiv 2002.05202): down(silu(gate) * up)."""

    def __init__(self, width: int, ffn_width: int):
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * ffn_width, bias=False)
        self.down = nn.Linear(ffn_width, width, bias=False)

    def forward(self, x_BTW: Tensor) -> Tensor:
        return self.down(ops.swiglu(self.gate_up(x_BTW)))


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)), of as many last tokens as the attention returns."""

    def __init__(self, o: Options, attention: nn.Module):
        super().__init__()
        self.attention_norm, self.attention = RMSNorm(o.width, o.norm_eps), attention
        self.ffn_norm, self.ffn = RMSNorm(o.width, o.norm_eps), FFN(o.width, o.ffn_width)
        self.dropout = nn.Dropout(o.dropout) if o.dropout else nn.Identity()

    def forward(self, x_BTW: Tensor, chunk: Chunk, kv: KV) -> Tensor:
        attended_BTW = self.attention(self.attention_norm(x_BTW), chunk, kv)
        x_BTW = x_BTW[:, -attended_BTW.shape[1] :] + self.dropout(attended_BTW)
        return x_BTW + self.dropout(self.ffn(self.ffn_norm(x_BTW)))


class Decoder(Costs, nn.Module):
    """A language model whose layers `layer_attention` makes.

    An attention layer is called as `layer(x_BTW, chunk, kv)`: it appends the keys and values of the chunk to `kv`, and
    returns the output of at least the last `chunk.queries` tokens; `HeadNorm` and `Output` give it the options
    `qk_norm` and `gate`. A decode step is recorded once and replayed, so anything that changes between steps must be a
    tensor. Name the output projection `out`: initialisation scales it.
    """

    Options: ClassVar[type[Options]] = Options
    # Option sets for 4 heads that together reach every path of the variant: tests run their laws over them.
    examples: ClassVar[Sequence[dict]] = ({},)
    keys_turn: bool = True  # a cached key can be rotated on to another position
    attends_itself: bool = False  # it computes attention on what is cached, not through `kv.attend`
    early_exit: ClassVar[bool] = False  # only a prompt's last token goes through the layers that attend to all tokens

    def __init__(self, options: Options):
        super().__init__()
        self.options = o = options
        self.embed = nn.Embedding(o.vocab_size, o.width)
        self.dropout = nn.Dropout(o.dropout) if o.dropout else nn.Identity()
        self.blocks = nn.ModuleList(Block(o, self.layer_attention(layer)) for layer in range(o.layers))
        self.norm = RMSNorm(o.width, o.norm_eps)
        self.unembed = nn.Linear(o.width, o.vocab_size, bias=False)
        if o.tie_embeddings:
            tie(self)
            self.register_load_state_dict_post_hook(tie)  # `assign` loads two parameters
        self.add_modules()
        for option, part in (("qk_norm", HeadNorm), ("gate", Output)):
            has_part = any(isinstance(module, part) for module in self.modules())
            if getattr(o, option) and not has_part:
                raise ValueError(f"{option}: the attention of {type(self).__name__} has no such part")
        for name, parameter in self.named_parameters():  # residual projections are scaled as in GPT-2
            if parameter.dim() > 1:
                residual = name.endswith(("attention.out.weight", "ffn.down.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * o.layers) ** 0.5 if residual else 0.02)

    # Running the model

    def forward(self, tokens_BT: Tensor, document_BT: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) of every position; t sees tokens 0 .. t, with `document_BT` those of its own document."""
        return self.unembed(self.last_hidden_state(tokens_BT, document_BT))

    def last_hidden_state(self, tokens_BT: Tensor, document_BT: Tensor | None = None) -> Tensor:
        """The input (B, T, W) of the unembedding."""
        documents = {} if document_BT is None else {"document_BT": document_BT}  # not every variant's `hidden` has it
        return self.norm(self.hidden(self.dropout(self.embed(tokens_BT)), **documents))

    @torch.no_grad()
    def prefill(self, tokens_BT: Tensor, cache: Cache) -> Tensor:
        """Appends T tokens to the cache; logits (B, V) of the last. ValueError if the cache has no room for them."""
        cache.begin(tokens_BT)
        rows = ops.sequences_at_once(tokens_BT) if cache.static else len(tokens_BT)
        rows = 1 if self.attends_itself else rows  # each takes memory for pairs of tokens
        parts = tokens_BT.split(rows)
        caches = [cache] if len(parts) == 1 else [cache.rows(i * rows, rows) for i in range(len(parts))]
        logits_BV = torch.cat([self.append(*part, cache.length) for part in zip(parts, caches, strict=True)])
        cache.advance(tokens_BT.shape[1])
        return logits_BV

    @torch.no_grad()
    def decode(self, tokens_B: Tensor, cache: Cache) -> Tensor:
        """Appends one token to each sequence; logits (B, V)."""
        cache.begin(tokens_B[:, None])
        logits_BV = ops.decode_step(self, tokens_B, cache)
        cache.advance(1)
        return logits_BV

    generate = sampling.generate

    def append(self, tokens_BT: Tensor, cache: Cache, start: int | Tensor) -> Tensor:
        """Runs T tokens from position `start` on; logits (B, V) of the last."""
        return self.unembed(self.norm(self.hidden(self.embed(tokens_BT), cache, start)[:, -1]))

    def new_cache(
        self, batch_size: int, max_tokens: int, dtype: torch.dtype | None = None, device: Any = None
    ) -> Cache:
        """An empty cache for up to `max_tokens` a sequence; dtype and device default to the model's."""
        weight = self.embed.weight
        make = Allocator(batch_size, max_tokens, dtype or weight.dtype, device or weight.device)
        return Cache(self.new_layers(make), batch_size, max_tokens)

    def hidden(
        self, x_BTW: Tensor, cache: Cache | None = None, start: int | Tensor = 0, document_BT: Tensor | None = None
    ) -> Tensor:
        """The residual stream after the last layer; with a cache of the last position alone.

        There the other tokens leave their keys and values in the last layer and go no further.
        """
        chunk = self.chunk(x_BTW.shape[1], start)
        layers = cache.layers if cache else self.new_layers(Training(document_BT))
        for layer, block in enumerate(self.blocks):
            if cache and layer == len(self.blocks) - 1 and not cache.observes:
                chunk = chunk._replace(queries=1)
            x_BTW = block(x_BTW, chunk, layers[layer])
        return x_BTW

    def chunk(self, tokens: int, start: int | Tensor) -> Chunk:
        o, weight = self.options, self.embed.weight
        positions = start if isinstance(start, Tensor) else start + torch.arange(tokens, device=weight.device)
        turns = ops.frequencies(o.rotary_dim, o.rope_base, weight.device, weight.dtype)
        return Chunk(start, *ops.rope_table(positions, turns), queries=tokens)

    # To be defined by a variant that learns from a loss of its own

    def begin_step(self, tokens_seen: int) -> None:
        """Called before each step of training with the number of tokens seen so far."""

    def own_loss(self) -> Tensor | None:
        """A sum over the queries of the last forward pass in training, in nats: minimised beside the loss of the tokens
        and no part of it."""

    # To be defined by a variant

    def layer_attention(self, layer: int) -> nn.Module:
        raise NotImplementedError

    def new_layers(self, make: Any) -> list:
        """What each layer attends to, by `make.full(heads, key_size)`, `make.ring(window, heads, head_dim)` or
        `make.state(*shape)` (see archs/kv.py and `Allocator` in archs/cache.py)."""
        raise NotImplementedError

    def add_modules(self) -> None:
        """Makes modules that belong to no layer."""


def tie(model: Decoder, *_: Any) -> None:
    """One matrix embeds and unembeds."""
    model.unembed.weight = model.embed.weight
