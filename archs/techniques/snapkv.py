"""SnapKV (Li et al. 2024, arXiv 2404.14469, section 4): the prompt is compressed once, by what its last tokens look at.

The weights of the last `window` queries on the tokens before them are summed, pooled along positions (so that
neighbours of what matters stay), and averaged over a KV head's query heads. Later tokens are all kept.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from archs.techniques.technique import Technique, first_and_last

if TYPE_CHECKING:
    from archs.techniques.slots import Slots


@dataclass(frozen=True)
class SnapKV(Technique):
    window: int = 32
    kernel: int = 7
    observes: ClassVar[bool] = True

    def check(self) -> None:
        if self.window < 1 or self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"window={self.window}, kernel={self.kernel}: must be 1 or more, the kernel odd")

    def check_room(self, capacity: int) -> None:
        if self.window > capacity:
            raise ValueError(f"window={self.window} is longer than the budget of {capacity} slots: give a shorter one")

    def keep(self, slots: "Slots", prompt: bool) -> Tensor | None:
        return super().keep(slots, prompt) if prompt else None

    def priority(self, slots: "Slots") -> Tensor:
        return torch.where(first_and_last(slots, 0, self.window), torch.inf, slots.score_N)

    def see_prompt(self, slots: "Slots", weights: Iterable[tuple[int, Tensor]]) -> None:
        prefix = max(0, slots.length - self.window)
        total_BGS = 0.0
        for first, weight in weights:
            total_BGS = total_BGS + weight[:, :, :, max(0, prefix - first) :].sum(3).mean(2)
        total_BGS[..., prefix:] = 0  # the window itself is kept and is pooled into nothing
        pooled = (
            F.avg_pool1d(total_BGS.flatten(0, 1)[:, None, :prefix], self.kernel, 1, self.kernel // 2)
            if prefix
            else None
        )
        if pooled is not None:
            total_BGS.flatten(0, 1)[:, :prefix] = pooled[:, 0]
        slots.score_N += total_BGS.flatten()

    def see(self, slots: "Slots", weight_NR: Tensor) -> None:
        """Nothing: it decides once."""
