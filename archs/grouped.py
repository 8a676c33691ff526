"""MHA, GQA and MQA: one implementation with as many KV heads as query heads, some, or one.

MHA: Vaswani et al. 2017 (arXiv 1706.03762). MQA: Shazeer 2019 (arXiv 1911.02150). GQA: Ainslie et al. 2023
(arXiv 2305.13245), query head h uses KV head h // (H/G).

Shapes: B batch, T tokens, H query heads, G KV heads, D head size, W width.
"""

from typing import Any, ClassVar

from torch import Tensor, nn

from archs.decoder import Chunk, Decoder, Options, Output, head_norm
from archs.kv import KV
from archs.ops import split_heads
from archs.settings import Size


class GroupedOptions(Options):
    """`kv_heads` key and value heads, each for heads / kv_heads query heads."""

    kv_heads: Size

    def complete(self) -> None:
        self.check(self.heads % self.kv_heads == 0, f"kv_heads={self.kv_heads} must divide heads={self.heads}")


class GroupedAttention(nn.Module):
    def __init__(self, o: Options):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = o.heads, o.kv_heads, o.head_dim
        self.qkv = nn.Linear(o.width, (o.heads + 2 * o.kv_heads) * o.head_dim, bias=False)
        self.qk_norm = head_norm(o, o.head_dim, o.heads, o.kv_heads)
        self.out = Output(o, o.head_dim)

    def forward(self, x_BTW: Tensor, chunk: Chunk, kv: KV) -> Tensor:
        qk_BXTD, v_BGTD = split_heads(self.qkv(x_BTW), self.heads + self.kv_heads, self.kv_heads)
        q_BHTD, k_BGTD = self.rotate(self.qk_norm(qk_BXTD), chunk).split((self.heads, self.kv_heads), dim=1)
        kv.append(chunk.start, k_BGTD, v_BGTD)
        return self.out(self.attend(q_BHTD[:, :, -chunk.queries :], kv), x_BTW)

    def attend(self, q_BHTD: Tensor, kv: KV) -> Tensor:
        return kv.attend(q_BHTD, self.head_dim**-0.5)

    def rotate(self, x_BHTD: Tensor, chunk: Chunk) -> Tensor:
        return chunk.rotate(x_BHTD)


class TiedAttention(nn.Module):
    """Keys that are the values too, so that one vector is cached for both. It is rotated by its position; what a head
    makes of such vectors is rotated back by the query's, which leaves distances, as in DeepSeek-V4's layers."""

    def __init__(self, o: Options):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = o.heads, o.kv_heads, o.head_dim
        self.qk = nn.Linear(o.width, (o.heads + o.kv_heads) * o.head_dim, bias=False)
        self.qk_norm = head_norm(o, o.head_dim, o.heads, o.kv_heads)
        self.out = Output(o, o.head_dim)

    def forward(self, x_BTW: Tensor, chunk: Chunk, kv: KV) -> Tensor:
        (qk_BXTD,) = split_heads(self.qk(x_BTW), self.heads + self.kv_heads)
        q_BHTD, k_BGTD = chunk.rotate(self.qk_norm(qk_BXTD)).split((self.heads, self.kv_heads), dim=1)
        kv.append(chunk.start, k_BGTD)
        out_BHTD = kv.attend(q_BHTD[:, :, -chunk.queries :], self.head_dim**-0.5)
        return self.out(chunk._replace(sin=-chunk.sin).rotate(out_BHTD), x_BTW)


class CrossAttention(nn.Module):
    """Queries against the keys and values that another layer has appended."""

    def __init__(self, o: Options):
        super().__init__()
        self.heads, self.head_dim = o.heads, o.head_dim
        self.q = nn.Linear(o.width, o.heads * o.head_dim, bias=False)
        self.q_norm = head_norm(o, o.head_dim, o.heads)
        self.out = Output(o, o.head_dim)

    def forward(self, x_BTW: Tensor, chunk: Chunk, kv: KV) -> Tensor:
        (q_BHTD,) = split_heads(self.q(x_BTW[:, -chunk.queries :]), self.heads)
        return self.out(kv.attend(chunk.rotate(self.q_norm(q_BHTD)), self.head_dim**-0.5), x_BTW)


class Grouped(Decoder):
    """`options.kv_heads` KV heads in every layer."""

    def layer_attention(self, layer: int) -> nn.Module:
        return GroupedAttention(self.options)

    def new_layers(self, make: Any) -> list:
        return [make.full(self.options.kv_heads, self.options.head_dim) for _ in range(self.options.layers)]

    def kv_stored_elements(self, context: int) -> int:
        """2 g d L a token: a key and a value of each KV head in each layer."""
        return 2 * self.options.kv_heads * self.options.head_dim * self.options.layers * context

    def decode_score_flops(self, context: float) -> float:
        return 4 * self.options.heads * self.options.head_dim * self.options.layers * context

    @classmethod
    def own_options(cls, heads: int, kv_heads: int) -> dict | None:
        """The options with so many KV heads; None if the variant cannot have them, or a plainer one has."""
        return None

    @classmethod
    def hf_options(cls, config: dict) -> dict | None:
        heads = config["num_attention_heads"]
        own = cls.own_options(heads, config.get("num_key_value_heads") or heads)
        if own is None or config["model_type"] not in ("llama", "mistral", "qwen3"):
            return None
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        return own | {"head_dim": head_dim, "qk_norm": config["model_type"] == "qwen3"}

    def hf_class(self) -> tuple[str, str, dict]:
        o = self.options
        names = ("qwen3", "Qwen3ForCausalLM") if o.qk_norm else ("llama", "LlamaForCausalLM")
        return *names, {"num_key_value_heads": o.kv_heads, "head_dim": o.head_dim}

    def hf_attention(self, attention: GroupedAttention) -> dict[str, Tensor]:
        heads = attention.heads, attention.kv_heads, attention.kv_heads
        parts = attention.qkv.weight.split([count * attention.head_dim for count in heads])
        norms = [part.weight for part in attention.qk_norm.parts] if self.options.qk_norm else []
        return dict(zip(("q_proj", "k_proj", "v_proj", "q_norm", "k_norm"), [*parts, *norms], strict=False))


class MHA(Grouped):
    """Multi-head attention: every query head has its own key and value head."""

    class Options(Options):
        @property
        def kv_heads(self) -> int:
            return self.heads

    @classmethod
    def own_options(cls, heads: int, kv_heads: int) -> dict | None:
        return {} if kv_heads == heads else None


class MQA(Grouped):
    """Multi-query attention: one key and value head for all query heads."""

    class Options(Options):
        kv_heads: ClassVar[int] = 1

    @classmethod
    def own_options(cls, heads: int, kv_heads: int) -> dict | None:
        return {} if kv_heads == 1 else None


class GQA(Grouped):
    """Grouped-query attention: `kv_heads` key and value heads, each for heads / kv_heads query heads."""

    class Options(GroupedOptions):
        tied_kv: bool = False  # a head's keys are its values

    examples = (
        {"kv_heads": 2},
        {"kv_heads": 4, "qk_norm": True, "gate": True},
        {"kv_heads": 2, "tied_kv": True, "qk_norm": True},
    )

    @classmethod
    def own_options(cls, heads: int, kv_heads: int) -> dict | None:
        return {"kv_heads": kv_heads}

    @property
    def keys_turn(self) -> bool:
        return not self.options.tied_kv

    def layer_attention(self, layer: int) -> nn.Module:
        return TiedAttention(self.options) if self.options.tied_kv else super().layer_attention(layer)

    def new_layers(self, make: Any) -> list:
        o = self.options
        sizes = o.kv_heads, o.head_dim, o.head_dim
        return [make.full(*sizes, shared=True) for _ in range(o.layers)] if o.tied_kv else super().new_layers(make)

    def kv_stored_elements(self, context: int) -> int:
        """Half of that where keys are values."""
        return super().kv_stored_elements(context) // (1 + self.options.tied_kv)

    def hf_class(self) -> tuple[str, str, dict]:
        if self.options.tied_kv:
            raise ValueError("transformers has no class with keys that are the values and no window")
        return super().hf_class()
