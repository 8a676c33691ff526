"""Translution (Fan et al. 2025, arXiv 2510.10060), its light form alpha: values that depend on how far back they lie.

Besides a value that all queries share, a token gives each query one that a matrix of their offset has made from a short
vector, sum_j p_ij (x_j W_1) W_2^(i - j) W_3; the mean of both is what heads return. Queries and keys have no positions.

In the full form queries, keys and values all have a matrix for each offset, so a token's key is another one for each
query, and no cache can hold it. Of the light form a cache holds keys, values and short vectors, but `context` matrices
must be kept in each layer, and a decode step multiplies with all of them. Tokens further back than `context` get the
last one. Attention has no fused kernel: training and prefill take memory for each pair of tokens. The authors' short
vectors have 16 numbers a head, and by default one here, as their matrices are parameters.

Shapes: B batch, T tokens, S cached tokens, H heads, D head size, R = X / H, X offset_dim, C context, W width.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from archs.costs import mean_seen
from archs.decoder import Chunk, Decoder, Options, Output, head_norm
from archs.kv import KV
from archs.ops import at_least_fp32, merge_heads, split_heads
from archs.settings import Size


class TranslutionOptions(Options):
    offset_dim: Size | None = None  # heads

    def complete(self) -> None:
        self.offset_dim = self.offset_dim or self.heads
        divides = self.offset_dim % self.heads == 0
        self.check(divides, f"offset_dim={self.offset_dim} must be a multiple of heads={self.heads}")

    @property
    def rotary_dim(self) -> int:
        return 0


class RelativeAttention(nn.Module):
    def __init__(self, o: TranslutionOptions):
        super().__init__()
        self.heads, self.size = o.heads, o.head_dim
        self.qkv = nn.Linear(o.width, 3 * o.heads * o.head_dim, bias=False)
        self.short = nn.Linear(o.width, o.offset_dim, bias=False)
        self.of_offset = nn.Parameter(torch.empty(o.context, o.offset_dim, o.offset_dim))
        self.long = nn.Linear(o.offset_dim, o.heads * o.head_dim, bias=False)
        self.qk_norm = head_norm(o, o.head_dim, o.heads, o.heads)
        self.out = Output(o, o.head_dim)

    def forward(self, x_BTW: Tensor, chunk: Chunk, kv: KV) -> Tensor:
        qk_BXTD, v_BHTD = split_heads(self.qkv(x_BTW), 2 * self.heads, self.heads)
        q_BHTD, k_BHTD = self.qk_norm(qk_BXTD).split(self.heads, dim=1)
        (short_BHTR,) = split_heads(self.short(x_BTW), self.heads)
        kv.append(chunk.start, k_BHTD, torch.cat((v_BHTD, short_BHTR), dim=-1))
        view = kv.view._replace(k=kv.view.k.to(q_BHTD.dtype), v=kv.view.v.to(q_BHTD.dtype))
        v_BHSD, short_BHSR = view.v.split((self.size, view.v.shape[3] - self.size), dim=-1)
        score_BHTS = q_BHTD[:, :, -chunk.queries :] @ view.k.mT * self.size**-0.5
        score_BHTS = score_BHTS.masked_fill(~view.visible(chunk.queries)[:, None], -math.inf)
        p_BHTS = at_least_fp32(score_BHTS).softmax(-1).to(q_BHTD.dtype)
        own_BHTR = self.moved(p_BHTS, merge_heads(short_BHSR), view.behind(chunk.queries))
        (own_BHTD,) = split_heads(self.long(merge_heads(own_BHTR)), self.heads)
        return self.out((p_BHTS @ v_BHSD + own_BHTD) / 2, x_BTW)

    def moved(self, p_BHTS: Tensor, short_BSX: Tensor, behind_TS: Tensor) -> Tensor:
        """The sums of short vectors, moved by the matrices of their offsets, with these weights; (B, H, T, R)."""
        offset_TS = behind_TS.clamp(0, len(self.of_offset) - 1)
        matrices_CXX = self.of_offset.to(short_BSX.dtype)
        if len(offset_TS) == 1:  # weights first: then one product goes over elements and tokens
            weighted_HBXS = p_BHTS.transpose(0, 1).contiguous() * short_BSX.mT.contiguous()
            matrices_SXHR = matrices_CXX[offset_TS[0]].unflatten(2, (self.heads, -1))
            sums_HBR = weighted_HBXS.flatten(2) @ matrices_SXHR.permute(2, 1, 0, 3).flatten(1, 2)
            return sums_HBR.transpose(0, 1)[:, :, None]
        all_BSCX = torch.einsum("bsx,cxy->bscy", short_BSX, matrices_CXX)
        index_BSTX = offset_TS.T[None, :, :, None].expand(len(short_BSX), -1, -1, short_BSX.shape[2])
        moved_BSTHR = all_BSCX.gather(2, index_BSTX).unflatten(3, (self.heads, -1))
        return torch.einsum("bhts,bsthr->bhtr", p_BHTS, moved_BSTHR)


class Translution(Decoder):
    """Alpha-Translution: (2 h d + offset_dim) L a token, and `context` matrices in each layer."""

    Options = TranslutionOptions
    examples = ({"offset_dim": 8, "qk_norm": True, "gate": True},)
    attends_itself = True

    def __init__(self, options: TranslutionOptions):
        """What offsets make begins as large as plain values: nothing else says where a token is."""
        super().__init__(options)
        for block in self.blocks:
            for weight in (block.attention.of_offset, block.attention.long.weight):
                nn.init.normal_(weight, std=options.offset_dim**-0.5)

    def layer_attention(self, layer: int) -> nn.Module:
        return RelativeAttention(self.options)

    def new_layers(self, make: Any) -> list:
        o = self.options
        sizes = o.heads, o.head_dim, o.head_dim + o.offset_dim // o.heads
        return [make.full(*sizes) for _ in range(o.layers)]

    def kv_stored_elements(self, context: int) -> int:
        """(2 h d + offset_dim) L a token."""
        o = self.options
        return (2 * o.heads * o.head_dim + o.offset_dim) * o.layers * context

    def weights_read(self, context: int) -> int:
        """And the matrices of the offsets that there are."""
        o = self.options
        return super().weights_read(context) + min(context, o.context) * o.offset_dim**2 * o.layers

    def score_flops(self, context: int) -> float:
        """A short vector meets every matrix, whether a query is at that offset or not."""
        o, pairs = self.options, mean_seen(context)
        attention = (4 * o.heads * o.head_dim + 2 * o.offset_dim) * o.layers * pairs
        return attention + self.moving_flops(o.context)

    def decode_score_flops(self, context: float) -> float:
        o = self.options
        return 4 * o.heads * o.head_dim * o.layers * context + self.moving_flops(context)

    def moving_flops(self, pairs: float) -> float:
        return 2 * self.options.offset_dim**2 * self.options.layers * pairs
