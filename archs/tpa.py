"""TPA, tensor product attention (Zhang et al. 2025, arXiv 2501.06425): keys and values of all heads from a few factors.

The keys of a token's heads are a matrix (H, D) of rank R, K = 1/R sum_r a_r b_r^T (section 3), with a vector a over
heads and a vector b over dimensions for each r, all linear in the token; so are values and, with a rank of their own,
queries. The factors are cached. Rotary positions act on b alone. Decode never makes the keys: a query is multiplied
with every b, and what comes out with a (section 5); training makes them.

Shapes: B batch, T tokens, S cached tokens, H heads, D head size, R rank (Q, K, V: of queries, keys, values), X all
factors of a token.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from archs.costs import mean_seen
from archs.decoder import Chunk, Decoder, Options, Output, head_norm
from archs.kv import KV, View, as_wide_as
from archs.ops import at_least_fp32, merge_heads, split_heads
from archs.settings import Size


class TPAOptions(Options):
    q_rank: Size = 6
    k_rank: Size = 2
    v_rank: Size = 2

    @property
    def kv_size(self) -> int:
        """Of what a token keeps in a layer."""
        return (self.k_rank + self.v_rank) * (self.heads + self.head_dim)


def product(a_BTX: Tensor, b_BRTD: Tensor) -> Tensor:
    """1/R sum_r a_r b_r^T of each token: (B, H, T, D)."""
    R = b_BRTD.shape[1]
    return torch.einsum("btrh,brtd->bhtd", a_BTX.unflatten(-1, (R, -1)), b_BRTD) / R


class FactoredAttention(nn.Module):
    def __init__(self, o: TPAOptions):
        super().__init__()
        self.o, self.ranks, self.scale = o, (o.k_rank, o.v_rank), o.head_dim**-0.5
        self.q_heads = nn.Linear(o.width, o.q_rank * o.heads, bias=False)
        self.q = nn.Linear(o.width, o.q_rank * o.head_dim, bias=False)
        self.kv_heads = nn.Linear(o.width, sum(self.ranks) * o.heads, bias=False)
        self.kv = nn.Linear(o.width, sum(self.ranks) * o.head_dim, bias=False)
        self.q_norm = head_norm(o, o.head_dim, o.heads)
        self.k_norm = head_norm(o, o.head_dim, o.k_rank)
        self.out = Output(o, o.head_dim)

    def forward(self, x_BTW: Tensor, chunk: Chunk, kv: KV) -> Tensor:
        b_k_BKTD, b_v_BVTD = split_heads(self.kv(x_BTW), *self.ranks)
        b_k_BKTD = chunk.rotate(self.k_norm(b_k_BKTD)).to(b_v_BVTD.dtype)
        factors = self.kv_heads(x_BTW), merge_heads(b_k_BKTD), merge_heads(b_v_BVTD)
        kv.append(chunk.start, torch.cat(factors, dim=-1)[:, None])
        x_q_BTW = x_BTW[:, -chunk.queries :]
        (b_q_BQTD,) = split_heads(self.q(x_q_BTW), self.o.q_rank)
        q_BHTD = chunk.rotate(self.q_norm(product(self.q_heads(x_q_BTW), b_q_BQTD)))
        attend = self.contracted if chunk.queries == 1 else self.materialised
        return self.out(attend(as_wide_as(q_BHTD, kv.view.k), kv.view).to(q_BHTD.dtype), x_BTW)

    def factors(self, view: View, dtype: torch.dtype) -> list[Tensor]:
        """Those that keys and values have over heads, (B, S, R H), and over dimensions, (B, S, R D)."""
        sizes = [rank * size for size in (self.o.heads, self.o.head_dim) for rank in self.ranks]
        return [*view.k[:, 0].to(dtype).split(sizes, dim=-1)]

    def materialised(self, q_BHTD: Tensor, view: View) -> Tensor:
        """Attention on keys and values that are made for every head; (B, H, T, D)."""
        a_k_BSX, a_v_BSX, b_k_BSX, b_v_BSX = self.factors(view, q_BHTD.dtype)
        k_BHSD, v_BHSD = (
            product(a_BSX, split_heads(b_BSX, rank)[0])
            for a_BSX, b_BSX, rank in zip((a_k_BSX, a_v_BSX), (b_k_BSX, b_v_BSX), self.ranks, strict=True)
        )
        return view._replace(k=k_BHSD, v=v_BHSD).attend(q_BHTD, self.scale)

    def contracted(self, q_BH1D: Tensor, view: View) -> Tensor:
        """Attention of one token on the factors; (B, H, 1, D)."""
        (k_rank, v_rank), size = self.ranks, self.o.head_dim
        a_k_BSX, a_v_BSX, b_k_BSX, b_v_BSX = self.factors(view, q_BH1D.dtype)
        q_BHD = q_BH1D[:, :, 0] * (self.scale / k_rank)
        keys = zip(a_k_BSX.chunk(k_rank, -1), b_k_BSX.split(size, -1), strict=True)
        score_BHS = sum(q_BHD @ b.mT * a.mT for a, b in keys).masked_fill(~view.visible(1), -math.inf)
        p_BHS = at_least_fp32(score_BHS).softmax(-1).to(q_BH1D.dtype) / v_rank
        values = zip(a_v_BSX.chunk(v_rank, -1), b_v_BSX.split(size, -1), strict=True)
        return sum((p_BHS * a.mT) @ b for a, b in values)[:, :, None]


class TPA(Decoder):
    """Tensor product attention: (k_rank + v_rank) (h + d) L a token."""

    Options = TPAOptions
    examples = ({"q_rank": 3, "k_rank": 2, "v_rank": 1, "qk_norm": True, "gate": True},)
    attends_itself = True

    def __init__(self, options: TPAOptions):
        """Factors over heads begin at about 1, so that products are as large as plain projections."""
        super().__init__(options)
        for block in self.blocks:
            for linear in (block.attention.q_heads, block.attention.kv_heads):
                nn.init.normal_(linear.weight, std=options.width**-0.5)

    def layer_attention(self, layer: int) -> nn.Module:
        return FactoredAttention(self.options)

    def new_layers(self, make: Any) -> list:
        return [make.full(1, self.options.kv_size, shared=True) for _ in range(self.options.layers)]

    def kv_stored_elements(self, context: int) -> int:
        """(k_rank + v_rank) (h + d) L a token."""
        return self.options.kv_size * self.options.layers * context

    def score_flops(self, context: int) -> float:
        """Queries, keys and values made from their factors, then attention."""
        o = self.options
        made = 2 * (o.q_rank + o.k_rank + o.v_rank) * o.heads * o.head_dim
        return (made + 4 * o.heads * o.head_dim * mean_seen(context)) * o.layers

    def decode_score_flops(self, context: float) -> float:
        o = self.options
        return 2 * (o.q_rank + (o.k_rank + o.v_rank) * context) * o.heads * o.head_dim * o.layers
