"""Techniques that rank the slots of each KV head and keep those with the highest priority.

StreamingLLM (Xiao et al. 2023, arXiv 2309.17453, section 3.2), H2O (Zhang et al. 2023, arXiv 2306.14048, section 4),
VATP (Guo et al. 2024, arXiv 2406.12335, section 3), SnapKV (Li et al. 2024, arXiv 2404.14469, section 4) and the L2
norm of keys (Devoto et al. 2024, arXiv 2406.11430, section 3).
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from archs.decoder import Decoder
from archs.techniques import ragged
from archs.techniques.slots import Slots
from archs.techniques.technique import PromptWeights, Technique, first_and_last


class StreamingLLM(Technique):
    """The first tokens, attention's sinks, and a window of the last ones.

    Positions are those within the cache: keys and queries are rotated on from their token's place to their slot.
    """

    sinks: int = Field(4, ge=0)

    def validate_options(self, capacity: float) -> None:
        fits = self.sinks < capacity
        self.check(fits, f"sinks={self.sinks} leave no window in the budget of {capacity} slots: give fewer")

    def validate_model(self, model: Decoder) -> None:
        super().validate_model(model)
        if not model.keys_turn:
            those = f"those of a {type(model).__name__} that lack positions in some layers, or are values too"
            raise ValueError(f"StreamingLLM moves keys to other positions, and cannot move {those}")

    def priority(self, slots: Slots) -> Tensor:
        return torch.where(slots.position_N < self.sinks, slots.length, slots.position_N)

    def positioned(self, slots: Slots, q_ORD: Tensor) -> tuple[Tensor, Tensor]:
        steps_O = slots.count_O - slots.length  # of the query, which is the last token
        steps_N = ragged.rank(slots.count_O) - slots.position_N
        return slots.moved(q_ORD, steps_O[:, None]), slots.moved(slots.keys_ND, steps_N)


class H2O(Technique):
    """The recent tokens and the heavy hitters among the others.

    A key's score is the running sum of the attention weights that it received; a KV head sums over its query heads.
    """

    recent: float = Field(0.5, ge=0, lt=1)  # share of the budget
    first: int = Field(0, ge=0)  # tokens that always stay
    observes: ClassVar[bool] = True

    def validate_options(self, capacity: float) -> None:
        fits = self.first < capacity
        self.check(fits, f"first={self.first} leave no other token in the budget of {capacity} slots: give fewer")

    def priority(self, slots: Slots) -> Tensor:
        capacity = self.capacity(slots.length)
        last = max(0, min(int(self.recent * capacity), capacity - self.first))
        return torch.where(first_and_last(slots, self.first, last), torch.inf, slots.score_N)


class VATP(H2O):
    """H2O with attention weights times the L1 norm of the value; the first tokens stay."""

    first: int = Field(20, ge=0)

    def observe(self, slots: Slots, weight_NR: Tensor) -> None:
        super().observe(slots, weight_NR * slots.values_NE.float().abs().sum(1, keepdim=True))


class SnapKV(Technique):
    """The prompt is compressed once, by what its last tokens look at; later tokens are all kept.

    The weights of the last `window` queries on the tokens before them are summed, pooled along positions (so that
    neighbours of what matters stay), and averaged over a KV head's query heads.
    """

    window: int = Field(32, ge=1)
    kernel: int = Field(7, ge=1)
    observes: ClassVar[bool] = True

    def validate_options(self, capacity: float) -> None:
        self.check(self.kernel % 2 == 1, f"kernel={self.kernel}: must be odd")

    def validate_prompt(self, tokens: int) -> None:
        """Later tokens are all kept, so a budget that is too small for the window only matters for a longer prompt."""
        capacity = self.capacity(tokens)
        fits = tokens <= capacity or self.window <= capacity
        self.check(fits, f"window={self.window} is longer than the budget of {capacity} slots: give a shorter one")

    def select(self, slots: Slots) -> Tensor | None:
        return super().select(slots) if slots.is_prompt else None

    def priority(self, slots: Slots) -> Tensor:
        return torch.where(first_and_last(slots, 0, self.window), torch.inf, slots.score_N)

    def observe_prompt(self, slots: Slots, weights: PromptWeights) -> None:
        prefix = max(1, slots.length - self.window)
        total_BGS = sum(weight[:, :, :, max(0, prefix - first) :].sum(3).mean(2) for first, weight in weights())
        total_BGS[..., :prefix] = F.avg_pool1d(total_BGS[..., :prefix], self.kernel, 1, self.kernel // 2)
        slots.score_N += total_BGS.flatten()


class L2Norm(Technique):
    """Keys of low norm receive the attention, and are kept. The first layers are left whole.

    Norms that differ by 1e-5 or less, as rotations of one key do by rounding, count as equal; the earlier are kept.
    """

    whole_layers: int = Field(2, ge=0)

    def validate_model(self, model: Decoder) -> None:
        super().validate_model(model)
        whole, layers = self.whole_layers, model.options.layers
        if whole >= layers and self.budget != 1.0:
            raise ValueError(f"L2Norm: whole_layers={whole} are all of the model's {layers} layers: give fewer")

    def select(self, slots: Slots) -> Tensor | None:
        return None if slots.layer < self.whole_layers else super().select(slots)

    def priority(self, slots: Slots) -> Tensor:
        return -(slots.keys_ND.float().norm(dim=1).log2() * 2**16).round()
