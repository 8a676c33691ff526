"""GLA, grouped latent attention (Zadouri, Strauss and Dao 2025, arXiv 2505.21487): MLA with several latents.

Each latent is for the heads of its group, and one rotary key for all. A token's vectors lie in one row, [latent of
group 1 | of group 2 | .. | rotary key], which decode reads once, as the only KV head. There a query has zeros in the
places of other groups.

Shapes: B batch, T tokens, S cached tokens, H heads, G groups, D size of a vector, R kv_rank.
"""

import torch
from torch import Tensor, nn

from archs.mla import Latent, LatentAttention, MLAOptions
from archs.ops import split_heads
from archs.settings import Size


def to_places(q_BHTD: Tensor, groups: int) -> Tensor:
    """(B, H, T, G D): each head's vector in the place of its group, zeros in the others."""
    own_GG = torch.eye(groups, dtype=q_BHTD.dtype, device=q_BHTD.device)
    q_BGXTGD = q_BHTD.unflatten(1, (groups, -1))[..., None, :] * own_GG[:, None, None, :, None]
    return q_BGXTGD.flatten(-2).flatten(1, 2)


def from_places(out_BHTX: Tensor, groups: int) -> Tensor:
    """(B, H, T, D): what lies in the place of each head's group."""
    out_BGXTGD = out_BHTX.unflatten(-1, (groups, -1)).unflatten(1, (groups, -1))
    return out_BGXTGD.diagonal(dim1=1, dim2=4).permute(0, 4, 1, 2, 3).flatten(1, 2)


class GLAOptions(MLAOptions):
    latent_heads: Size = 2  # each of kv_rank

    @property
    def latent_size(self) -> int:
        return self.latent_heads * self.kv_rank

    def complete(self) -> None:
        super().complete()
        divides = self.heads % self.latent_heads == 0
        self.check(divides, f"latent_heads={self.latent_heads} must divide heads={self.heads}")


class OfGroups(nn.Linear):
    """A matrix whose rows are divided among groups: each group's vectors (B, G, S, R) go through its own."""

    def forward(self, x_BGSR: Tensor) -> Tensor:
        return torch.einsum("bgsr,gxr->bgsx", x_BGSR, self.weight.unflatten(0, (x_BGSR.shape[1], -1)))


class GroupedLatents(LatentAttention):
    def __init__(self, o: GLAOptions):
        super().__init__(o)
        self.kv_down = nn.Linear(o.width, o.latent_size + o.rope_dim, bias=False)
        self.kv_up = OfGroups(o.kv_rank, o.heads * (o.nope_dim + o.v_dim), bias=False)

    def normed(self, latent_BTX: Tensor) -> Tensor:
        return super().normed(latent_BTX.unflatten(-1, (self.o.latent_heads, -1))).flatten(-2)

    def made(self, latent_BSX: Tensor) -> Tensor:
        (latent_BGSR,) = split_heads(latent_BSX, self.o.latent_heads)
        of_head = self.o.heads // self.o.latent_heads, -1
        return self.kv_up(latent_BGSR).unflatten(-1, of_head).transpose(2, 3).flatten(1, 2)

    def placed(self, q_latent_BHTR: Tensor) -> Tensor:
        return to_places(q_latent_BHTR, self.o.latent_heads)

    def own(self, latent_BHTX: Tensor) -> Tensor:
        return from_places(latent_BHTX, self.o.latent_heads)


class GLA(Latent):
    """Grouped latent attention: (latent_heads kv_rank + rope_dim) L a token."""

    Options = GLAOptions
    examples = ({"kv_rank": 12, "rope_dim": 8, "latent_heads": 4, "q_rank": 20, "qk_norm": True, "latent_scale": True},)

    def layer_attention(self, layer: int) -> nn.Module:
        return GroupedLatents(self.options)
