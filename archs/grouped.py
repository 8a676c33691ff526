"""MHA, GQA and MQA: one implementation with as many KV heads as query heads, some, or one.

MHA: Vaswani et al. 2017 (arXiv 1706.03762). MQA: Shazeer 2019 (arXiv 1911.02150). GQA: Ainslie et al. 2023
(arXiv 2305.13245), query head h uses KV head h // (H/G).

Shapes: B batch, T tokens, H query heads, G KV heads, D head size, W width.
"""

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from archs.attention import Rope, attend, last, merge_heads, rotate, split_heads
from archs.cache import FullCache
from archs.decoder import Decoder, Linear, Options, kv_heads_divide, mean_seen, option


class GroupedAttention(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int, head_dim: int):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.qkv = Linear(width, (heads + 2 * kv_heads) * head_dim)
        self.out = Linear(heads * head_dim, width)

    def forward(
        self,
        x_BTW: Tensor,
        rope: Rope,
        cache: FullCache | None = None,
        start: int | Tensor = 0,
        only_last: bool = False,
    ) -> Tensor:
        if only_last and x_BTW.shape[1] > 1:
            q_weight, kv_weight = self.qkv.weight.tensor_split((self.heads * self.head_dim,))
            (q_BHTD,) = split_heads(F.linear(x_BTW[:, -1:], q_weight), self.heads)
            k_BGTD, v_BGTD = split_heads(F.linear(x_BTW, kv_weight), self.kv_heads, self.kv_heads)
            q_BHTD, k_BGTD = rotate(q_BHTD, last(rope)), rotate(k_BGTD, rope)
        else:
            qk_BXTD, v_BGTD = split_heads(self.qkv(x_BTW), self.heads + self.kv_heads, self.kv_heads)
            q_BHTD, k_BGTD = rotate(qk_BXTD, rope).split((self.heads, self.kv_heads), dim=1)
        return self.out(merge_heads(self.attend(q_BHTD, k_BGTD, v_BGTD, cache, start)))

    def attend(
        self, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, cache: FullCache | None = None, start: int | Tensor = 0
    ) -> Tensor:
        seen = None
        if cache:
            (k_BGTD, v_BGTD), seen = cache.append(start, k_BGTD, v_BGTD)
        return attend(q_BHTD, k_BGTD, v_BGTD, seen=seen)


@dataclass(kw_only=True)
class GQAOptions(Options):
    kv_heads: int = option()

    def derive(self) -> None:
        kv_heads_divide(self)


class Grouped(Decoder):
    kv_heads: int

    def __init__(self, options: Any):
        self.kv_heads = self.count_kv_heads(options)
        super().__init__(options)

    @staticmethod
    def count_kv_heads(options: Any) -> int:
        raise NotImplementedError

    def hf_class(self) -> tuple[str, str, dict]:
        return "llama", "LlamaForCausalLM", {"num_key_value_heads": self.kv_heads, "head_dim": self.options.head_dim}

    def hf_attention(self, attention: GroupedAttention) -> dict[str, Tensor]:
        heads = attention.heads, attention.kv_heads, attention.kv_heads
        parts = attention.qkv.weight.split([count * attention.head_dim for count in heads])
        return dict(zip(("q_proj", "k_proj", "v_proj"), parts, strict=True))

    def layer_attention(self, layer: int) -> nn.Module:
        o = self.options
        return GroupedAttention(o.width, o.heads, self.kv_heads, o.head_dim)

    def new_parts(self, batch_size: int, max_tokens: int, dtype, device) -> list:
        sizes = [(self.kv_heads, self.options.head_dim)] * 2
        return [FullCache(batch_size, max_tokens, sizes, dtype, device) for _ in self.blocks]

    def kv_elements_per_token(self) -> int:
        """2 g d L: a key and a value of each KV head in each layer."""
        return 2 * self.kv_heads * self.options.head_dim * self.options.layers

    def score_flops(self, context: int) -> float:
        return self.decode_score_flops(mean_seen(context))

    def decode_score_flops(self, context: float) -> float:
        return 4 * self.options.heads * self.options.head_dim * self.options.layers * context


class MHA(Grouped):
    """Multi-head attention: every query head has its own key and value head."""

    @staticmethod
    def count_kv_heads(options: Options) -> int:
        return options.heads


class MQA(Grouped):
    """Multi-query attention: one key and value head for all query heads."""

    @staticmethod
    def count_kv_heads(options: Options) -> int:
        return 1


class GQA(Grouped):
    """Grouped-query attention: `kv_heads` key and value heads, each for heads / kv_heads query heads."""

    Options = GQAOptions
    examples = ({"kv_heads": 2}, {"kv_heads": 4})

    @staticmethod
    def count_kv_heads(options: GQAOptions) -> int:
        return options.kv_heads
