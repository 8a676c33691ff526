"""H2O (Zhang et al. 2023, arXiv 2306.14048, section 4): the recent tokens and the heavy hitters among the others.

A key's score is the running sum of the attention weights that it was given; a KV head sums over its query heads.
VATP (Guo et al. 2024, arXiv 2406.12335, section 3): the weights times the L1 norm of the value; the first tokens stay.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from archs.techniques.technique import Technique, first_and_last

if TYPE_CHECKING:
    from archs.techniques.slots import Slots


@dataclass(frozen=True)
class H2O(Technique):
    recent: float = 0.5  # share of the budget
    first: int = 0  # tokens that stay
    observes: ClassVar[bool] = True

    def check(self) -> None:
        if not 0 <= self.recent < 1:
            raise ValueError(f"recent={self.recent!r}: must be a share of the budget, from 0 and below 1")
        if self.first < 0:
            raise ValueError(f"first={self.first}: must be at least 0")

    def check_room(self, capacity: int) -> None:
        if self.first >= capacity:
            raise ValueError(f"first={self.first} leave no other token in the budget of {capacity} slots: give fewer")

    def priority(self, slots: "Slots") -> Tensor:
        capacity = self.capacity(slots.length)
        last = max(0, min(int(self.recent * capacity), capacity - self.first))
        always = first_and_last(slots, self.first, last)
        return torch.where(always, torch.inf, slots.score_N)

    def see_prompt(self, slots: "Slots", weights: Iterable[tuple[int, Tensor]]) -> None:
        total_BGS = sum(weight.sum((2, 3)) for _, weight in weights)
        slots.score_N += total_BGS.flatten() * self.worth(slots)

    def see(self, slots: "Slots", weight_NR: Tensor) -> None:
        slots.score_N += weight_NR.sum(1) * self.worth(slots)

    def worth(self, slots: "Slots") -> Tensor | float:
        """What a weight counts."""
        return 1.0


@dataclass(frozen=True)
class VATP(H2O):
    first: int = 20

    def worth(self, slots: "Slots") -> Tensor:
        return slots.values_NE(slots.value_size).float().abs().sum(1)
