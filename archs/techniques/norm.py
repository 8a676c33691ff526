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

    def check(self) -> None:
        if self.whole_layers < 0:
            raise ValueError(f"whole_layers={self.whole_layers}: must be at least 0")

    def suits(self, layers: int) -> None:
        if self.whole_layers >= layers and self.budget != 1.0:
            raise ValueError(f"whole_layers={self.whole_layers} are all of the {layers} that the model has: give fewer")

    def keep(self, slots: "Slots", prompt: bool) -> Tensor | None:
        return None if slots.layer < self.whole_layers else super().keep(slots, prompt)

    def priority(self, slots: "Slots") -> Tensor:
        return -slots.keys_ND.float().norm(dim=1)
