"""GTA, grouped-tied attention (Zadouri, Strauss and Dao 2025, arXiv 2505.21487): each KV head keeps one vector.

It is the head's value, and its first half is the first half of the key; the other half is one rotary key for all heads.
A token's vectors lie in one row, as in archs/gla.py.

Shapes: B batch, T tokens, S cached tokens, H query heads, G KV heads, D head size, N its part without positions, P the
rotary part, W width.
"""

from typing import Any

import torch
from torch import Tensor, nn

from archs.costs import mean_seen
from archs.decoder import Chunk, Options, Output, head_norm
from archs.gla import from_places, to_places
from archs.grouped import Grouped, GroupedOptions
from archs.kv import KV, View
from archs.ops import split_heads


class TiedHeads(nn.Module):
    def __init__(self, o: Options):
        super().__init__()
        self.heads, self.groups, self.size, self.rope = o.heads, o.kv_heads, o.head_dim, o.rotary_dim
        self.q = nn.Linear(o.width, o.heads * o.head_dim, bias=False)
        self.kv = nn.Linear(o.width, o.kv_heads * o.head_dim + self.rope, bias=False)
        self.q_norm = head_norm(o, o.head_dim, o.heads)
        self.rope_norm = head_norm(o, self.rope, 1)
        self.out = Output(o, o.head_dim)

    def forward(self, x_BTW: Tensor, chunk: Chunk, kv: KV) -> Tensor:
        tied_BTX, k_rope_BTP = self.kv(x_BTW).split((self.groups * self.size, self.rope), dim=-1)
        k_rope_B1TP = chunk.rotate(self.rope_norm(k_rope_BTP[:, None])).to(tied_BTX.dtype)
        kv.append(chunk.start, torch.cat((tied_BTX[:, None], k_rope_B1TP), dim=-1))
        (q_BHTD,) = split_heads(self.q(x_BTW[:, -chunk.queries :]), self.heads)
        q_BHTN, q_BHTP = self.q_norm(q_BHTD).split((self.size - self.rope, self.rope), dim=-1)
        q_BHTP, scale = chunk.rotate(q_BHTP), self.size**-0.5
        if kv.dense is not None and chunk.queries > 1:
            return self.out(self.by_head(kv.dense).attend(torch.cat((q_BHTN, q_BHTP), dim=-1), scale), x_BTW)
        q_BHTD = torch.cat((q_BHTN, torch.zeros_like(q_BHTP)), dim=-1)  # the rotary half is no part of its own vector
        row_BHTX = kv.attend(torch.cat((to_places(q_BHTD, self.groups), q_BHTP), dim=-1), scale)
        return self.out(from_places(row_BHTX, self.groups), x_BTW)

    def by_head(self, view: View) -> View:
        """Keys and values of each KV head."""
        row_BSX, k_rope_BSP = view.k[:, 0].split((self.groups * self.size, self.rope), dim=-1)
        (v_BGSD,) = split_heads(row_BSX, self.groups)
        k_rope_BGSP = k_rope_BSP[:, None].expand(-1, self.groups, -1, -1)
        return view._replace(k=torch.cat((v_BGSD[..., : self.size - self.rope], k_rope_BGSP), dim=-1), v=v_BGSD)


class GTA(Grouped):
    """Grouped-tied attention: a vector for each KV head, and half of one for all."""

    class Options(GroupedOptions):
        def complete(self) -> None:
            super().complete()
            self.check(self.head_dim >= 4, f"head_dim={self.head_dim}: must be at least 4, half of it is rotated")

        @property
        def rotary_dim(self) -> int:
            """Half of a head, and even."""
            return self.head_dim // 4 * 2

    examples = ({"kv_heads": 2, "qk_norm": True},)

    def layer_attention(self, layer: int) -> nn.Module:
        return TiedHeads(self.options)

    def new_layers(self, make: Any) -> list:
        o, size = self.options, self.options.kv_heads * self.options.head_dim
        return [make.full(1, size + o.rotary_dim, size, shared=True) for _ in range(o.layers)]

    def kv_stored_elements(self, context: int) -> int:
        """(g d + d / 2) L a token, if 4 divides d."""
        o = self.options
        return (o.kv_heads * o.head_dim + o.rotary_dim) * o.layers * context

    def score_flops(self, context: int) -> float:
        """With keys and values of each head."""
        return super().decode_score_flops(mean_seen(context))

    def decode_score_flops(self, context: float) -> float:
        """On rows, with the zeros."""
        o = self.options
        return 2 * o.heads * (2 * o.kv_heads * o.head_dim + o.rotary_dim) * o.layers * context
