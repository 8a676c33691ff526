"""L2 norm (Devoto et al. 2024, arXiv 2406.11430, section 3): keys of low norm get the attention, and are kept.

The first two layers are left whole.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from archs.techniques.technique import Technique

if TYPE_CHECKING:
    from archs.techniques.slots import Slots


@dataclass(frozen=True)
class L2Norm(Technique):
    whole_layers: int = 2

    def keep(self, slots: "Slots", prompt: bool) -> Tensor | None:
        return None if slots.layer < self.whole_layers else super().keep(slots, prompt)

    def priority(self, slots: "Slots") -> Tensor:
        return -slots.keys_ND.float().norm(dim=1)
