"""MLA, multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): a latent and a rotary key are cached.

Each token keeps one latent of `kv_rank`, normed before it is cached, and one rotary key of `rope_dim` shared by all
heads. Keys and values are linear in the latent, so decode never makes them: W_UK goes into the query and W_UV into the
output (the absorbed form), and attention runs on what is cached as on a single KV head. Training makes them (the
materialised form), which takes fewer FLOPs when many queries share them. RoPE acts on the rotary part alone: a rotated
up-projection could not be absorbed.

Shapes: B batch, T tokens, S cached tokens, H heads, N nope_dim, P rope_dim, E v_dim, R kv_rank, W width.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from archs.attention import Rope, attend, last, merge_heads, rotate, split_heads
from archs.cache import FullCache
from archs.cpu.building import takes
from archs.cpu.layers import head_linear, join, takes_heads
from archs.decoder import Decoder, Linear, Options, RMSNorm, mean_seen, option


@dataclass(kw_only=True)
class MLAOptions(Options):
    kv_rank: int = option()
    rope_dim: int = option()
    q_rank: int = option(0, at_least=0)  # 0: queries straight from the residual stream, as in DeepSeek-V2-Lite
    nope_dim: int = option(None)  # head_dim
    v_dim: int = option(None)  # head_dim
    rotary: ClassVar[str] = "rope_dim"

    def derive(self) -> None:
        self.nope_dim = self.nope_dim or self.head_dim
        self.v_dim = self.v_dim or self.head_dim


class LatentAttention(nn.Module):
    def __init__(self, o: MLAOptions):
        super().__init__()
        self.o = o
        self.scale = (o.nope_dim + o.rope_dim) ** -0.5
        q_in = o.q_rank or o.width
        if o.q_rank:
            self.q_down = Linear(o.width, o.q_rank)
            self.q_norm = RMSNorm(o.q_rank)
        self.q_up = Linear(q_in, o.heads * (o.nope_dim + o.rope_dim))
        self.kv_down = Linear(o.width, o.kv_rank + o.rope_dim)
        self.kv_norm = RMSNorm(o.kv_rank)
        self.kv_up = Linear(o.kv_rank, o.heads * (o.nope_dim + o.v_dim))
        self.out = Linear(o.heads * o.v_dim, o.width)

    def forward(
        self,
        x_BTW: Tensor,
        rope: Rope,
        cache: FullCache | None = None,
        start: int | Tensor = 0,
        only_last: bool = False,
    ) -> Tensor:
        o = self.o
        q_in_BTW, q_rope = (x_BTW[:, -1:], last(rope)) if only_last else (x_BTW, rope)
        (q_BHTX,) = split_heads(self.q_up(self.q_norm(self.q_down(q_in_BTW)) if o.q_rank else q_in_BTW), o.heads)
        q_nope_BHTN, q_rope_BHTP = q_BHTX.split((o.nope_dim, o.rope_dim), dim=-1)
        q_rope_BHTP = rotate(q_rope_BHTP, q_rope)
        latent_BTR, k_rope_BTP = self.kv_down(x_BTW).split((o.kv_rank, o.rope_dim), dim=-1)
        latent_B1TR, k_rope_B1TP = self.kv_norm(latent_BTR)[:, None], rotate(k_rope_BTP[:, None], rope)
        kept_B1SX = side_by_side(latent_B1TR, k_rope_B1TP.to(latent_BTR.dtype))
        queries, seen = (q_nope_BHTN, q_rope_BHTP), None
        if cache:
            (kept_B1SX,), seen = cache.append(start, kept_B1SX)
        on_latent = seen is not None or not isinstance(kept_B1SX, Tensor)
        if on_latent or (cache and self.absorbing_is_cheaper(q_BHTX.shape[2], kept_B1SX.shape[2])):
            out_BHTE = self.absorbed(*queries, kept_B1SX, seen)
        else:
            out_BHTE = self.materialised(*queries, kept_B1SX)
        return self.out(merge_heads(out_BHTE))

    def absorbing_is_cheaper(self, T: int, S: int) -> bool:
        """Compares the FLOPs of both forms for T queries over S cached tokens."""
        o = self.o
        up = o.kv_rank * (o.nope_dim + o.v_dim)
        return T * up + T * S * (2 * o.kv_rank + o.rope_dim) < S * up + T * S * (o.nope_dim + o.rope_dim + o.v_dim)

    def materialised(self, q_nope_BHTN: Tensor, q_rope_BHTP: Tensor, kept_B1SX: Tensor) -> Tensor:
        """Keys and values made from the latent for every head; (B, H, T, E)."""
        o = self.o
        latent_BSR, k_rope_BSP = kept_B1SX[:, 0].to(q_nope_BHTN.dtype).split((o.kv_rank, o.rope_dim), dim=-1)
        (kv_BHSX,) = split_heads(self.kv_up(latent_BSR), o.heads)
        k_nope_BHSN, v_BHSE = kv_BHSX.split((o.nope_dim, o.v_dim), dim=-1)
        k_BHSD = torch.cat((k_nope_BHSN, k_rope_BSP[:, None].expand(-1, o.heads, -1, -1)), dim=-1)
        return attend(torch.cat((q_nope_BHTN, q_rope_BHTP), dim=-1), k_BHSD, v_BHSE, self.scale)

    def absorbed(
        self, q_nope_BHTN: Tensor, q_rope_BHTP: Tensor, kept_B1SX: Tensor, seen: Tensor | None = None
    ) -> Tensor:
        """Attention on the latent itself, as keys and as values of one KV head; (B, H, T, E)."""
        o = self.o
        up_HXR = self.kv_up.weight.view(o.heads, o.nope_dim + o.v_dim, o.kv_rank)
        k_up_HNR, v_up_HER = up_HXR.split((o.nope_dim, o.v_dim), dim=1)
        q_latent_BHTR = times_each_head(q_nope_BHTN, k_up_HNR)
        q_BHTX = side_by_side(q_latent_BHTR, q_rope_BHTP)
        latent_BHTR = attend(q_BHTX, kept_B1SX, None, self.scale, seen, o.kv_rank)
        return times_each_head(latent_BHTR, v_up_HER.mT)


def side_by_side(a_BHTX: Tensor, b_BHTX: Tensor) -> Tensor:
    one = a_BHTX.shape[2] == a_BHTX.stride(3) == b_BHTX.stride(3) == 1 and takes(a_BHTX, b_BHTX)
    return join(a_BHTX, b_BHTX) if one else torch.cat((a_BHTX, b_BHTX), dim=-1)


def times_each_head(x_BHTK: Tensor, weight_HKF: Tensor) -> Tensor:
    """Each head with a matrix of its own; (B, H, T, F)."""
    if takes_heads(x_BHTK, weight_HKF):
        return head_linear(x_BHTK, weight_HKF)
    # einsum, not @: batched over heads, it does not copy the weights for each sequence.
    return torch.einsum("bhtk,hkf->bhtf", x_BHTK, weight_HKF)


class MLA(Decoder):
    """Multi-head latent attention."""

    Options = MLAOptions
    examples = (
        {"kv_rank": 32, "rope_dim": 8},
        {"kv_rank": 24, "rope_dim": 6, "q_rank": 20, "nope_dim": 12, "v_dim": 20},
    )

    def hf_class(self) -> tuple[str, str, dict]:
        o = self.options
        own = {
            "num_key_value_heads": o.heads,
            "kv_lora_rank": o.kv_rank,
            "q_lora_rank": o.q_rank or None,
            "qk_rope_head_dim": o.rope_dim,
            "qk_nope_head_dim": o.nope_dim,
            "v_head_dim": o.v_dim,
            "rope_interleave": False,  # pairs are laid out as halves
            "first_k_dense_replace": o.layers,  # no mixture of experts
        }
        return "deepseek_v3", "DeepseekV3ForCausalLM", own

    def hf_attention(self, attention: LatentAttention) -> dict[str, Tensor]:
        a = attention
        queries = {"q_a_proj": a.q_down, "q_a_layernorm": a.q_norm} if self.options.q_rank else {}
        queries["q_b_proj" if self.options.q_rank else "q_proj"] = a.q_up
        modules = queries | {"kv_a_proj_with_mqa": a.kv_down, "kv_a_layernorm": a.kv_norm, "kv_b_proj": a.kv_up}
        return {name: module.weight for name, module in modules.items()}

    def layer_attention(self, layer: int) -> nn.Module:
        return LatentAttention(self.options)

    def new_parts(self, batch_size: int, max_tokens: int, dtype, device) -> list:
        sizes = [(1, self.options.kv_rank + self.options.rope_dim)]
        return [FullCache(batch_size, max_tokens, sizes, dtype, device) for _ in self.blocks]

    def kv_elements_per_token(self) -> int:
        """(kv_rank + rope_dim) L, DeepSeek-V2 Table 1."""
        return (self.options.kv_rank + self.options.rope_dim) * self.options.layers

    def score_flops(self, context: int) -> float:
        """In the materialised form."""
        o = self.options
        return 2 * o.heads * (o.nope_dim + o.rope_dim + o.v_dim) * o.layers * mean_seen(context)

    def decode_score_flops(self, context: float) -> float:
        """In the absorbed form."""
        o = self.options
        return 2 * o.heads * (2 * o.kv_rank + o.rope_dim) * o.layers * context
