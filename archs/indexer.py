"""The lightning indexer of DeepSeek-V3.2 (arXiv 2512.02556, section 2.1).

Shapes: B batch, T tokens, S cached tokens, K of them, X size of a row, J index heads, I size of an index key, W width.
"""

import torch
from torch import Tensor, nn

from archs.decoder import Chunk
from archs.kv import as_wide_as
from archs.ops import at_least_fp32, split_heads

LATER = 1e-30  # added to a score for each position: of equal ones, which are zeros, the latest are selected


def selected(row_BSX: Tensor, place_BK: Tensor) -> Tensor:
    """The rows at these places, (B, K, X)."""
    B, S, _ = row_BSX.shape
    sequence_B1 = torch.arange(B, device=place_BK.device)[:, None]
    if not row_BSX.is_contiguous():
        return row_BSX[sequence_B1, place_BK]
    rows = row_BSX.flatten(0, 1).index_select(0, (sequence_B1 * S + place_BK).flatten())  # four times as fast
    return rows.unflatten(0, place_BK.shape)


class Indexer(nn.Module):
    """Queries of `heads` heads from inputs of `q_width`, and one key, whose first `rope_dim` dimensions are rotated."""

    def __init__(self, width: int, q_width: int, heads: int, size: int, rope_dim: int):
        super().__init__()
        self.heads, self.sizes, self.scale = heads, (rope_dim, size - rope_dim), (heads * size) ** -0.5
        self.q = nn.Linear(q_width, heads * size, bias=False)
        self.k = nn.Linear(width, size, bias=False)
        self.k_norm = nn.LayerNorm(size, eps=1e-6)
        self.weights = nn.Linear(width, heads, bias=False)

    def rotate_part(self, x_BJTI: Tensor, chunk: Chunk) -> Tensor:
        rotated, plain = x_BJTI.split(self.sizes, dim=-1)
        return torch.cat((chunk.rotate(rotated), plain), dim=-1)

    def key(self, x_BTW: Tensor, chunk: Chunk) -> Tensor:
        return self.rotate_part(self.k_norm(self.k(x_BTW))[:, None], chunk).to(x_BTW.dtype)

    def forward(self, x_BTW: Tensor, q_input: Tensor, k_BSI: Tensor, chunk: Chunk) -> Tensor:
        """Scores (B, T, S) in fp32 at least."""
        (q_BJTI,) = split_heads(self.q(q_input), self.heads)
        q_BJTI, w_BTJ = self.rotate_part(q_BJTI, chunk), self.weights(x_BTW) * self.scale
        with torch.autocast(x_BTW.device.type, enabled=False):
            q_BJTI = as_wide_as(at_least_fp32(q_BJTI), k_BSI)
            dots_BXS = (q_BJTI.flatten(1, 2) @ k_BSI.to(q_BJTI.dtype).mT).relu()
            dots_BJTS = dots_BXS.unflatten(1, q_BJTI.shape[1:3])
            score_BTS = (w_BTJ.to(q_BJTI.dtype)[:, :, None] @ dots_BJTS.transpose(1, 2))[:, :, 0]
        return score_BTS + LATER * torch.arange(score_BTS.shape[2], device=x_BTW.device)
