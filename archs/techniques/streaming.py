"""StreamingLLM (Xiao et al. 2023, arXiv 2309.17453, section 3.2): the first tokens, attention's sinks, and a window.

Positions are those within the cache: keys and queries are turned by how far their slot lies from their token's place.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from archs.techniques.slots import flat
from archs.techniques.technique import Technique

if TYPE_CHECKING:
    from archs.techniques.slots import Slots


@dataclass(frozen=True)
class StreamingLLM(Technique):
    sinks: int = 4

    def check(self) -> None:
        if self.sinks < 0:
            raise ValueError(f"sinks={self.sinks}: must be at least 0")

    def check_room(self, capacity: int) -> None:
        if self.sinks >= capacity:
            raise ValueError(f"sinks={self.sinks} leave no window in the budget of {capacity} slots: give fewer")

    def priority(self, slots: "Slots") -> Tensor:
        return torch.where(slots.position_N < self.sinks, slots.length, slots.position_N)

    def place(self, slots: "Slots", q_ORD: Tensor) -> tuple[Tensor, Tensor]:
        most = torch.arange(int(slots.count_O.max()), device=q_ORD.device)
        within_N = flat(most.expand(len(slots.count_O), -1), slots.count_O)
        moved_O = slots.count_O - slots.length  # of the query, which is the last token
        return slots.turned(q_ORD, moved_O[:, None]), slots.turned(slots.keys_ND, within_N - slots.position_N)
