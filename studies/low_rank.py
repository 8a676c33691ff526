"""MHA whose keys and values are made from one normed latent, as MLA's are, but rotated whole and cached as MHA's are.

It takes MLA apart: it has MLA's latent, and neither its rotation of few dimensions nor its cache. Used by mla.yaml.

Shapes: B batch, T tokens, H heads, D head size, W width.
"""

from torch import Tensor, nn

from archs.decoder import Chunk, Output, RMSNorm
from archs.grouped import MHA
from archs.kv import KV
from archs.ops import split_heads
from archs.settings import Size


class LowRankOptions(MHA.Options):
    kv_rank: Size


class LowRankAttention(nn.Module):
    def __init__(self, o: LowRankOptions):
        super().__init__()
        self.heads, self.scale = o.heads, o.head_dim**-0.5
        self.q = nn.Linear(o.width, o.heads * o.head_dim, bias=False)
        self.kv_down = nn.Linear(o.width, o.kv_rank, bias=False)
        self.kv_norm = RMSNorm(o.kv_rank)
        self.kv_up = nn.Linear(o.kv_rank, 2 * o.heads * o.head_dim, bias=False)
        self.out = Output(o, o.head_dim)

    def forward(self, x_BTW: Tensor, chunk: Chunk, kv: KV) -> Tensor:
        k_BHTD, v_BHTD = split_heads(self.kv_up(self.kv_norm(self.kv_down(x_BTW))), self.heads, self.heads)
        kv.append(chunk.start, chunk.rotate(k_BHTD), v_BHTD)
        (q_BHTD,) = split_heads(self.q(x_BTW[:, -chunk.queries :]), self.heads)
        return self.out(kv.attend(chunk.rotate(q_BHTD), self.scale), x_BTW)


class LowRank(MHA):
    Options = LowRankOptions
    examples = ({"kv_rank": 24},)

    def layer_attention(self, layer: int) -> nn.Module:
        return LowRankAttention(self.options)
