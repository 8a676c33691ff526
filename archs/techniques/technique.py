"""What a technique is: which slots it keeps, and what attention it looks at to decide that."""

import math
from collections.abc import Callable, Iterator
from typing import ClassVar

import torch
from pydantic import ConfigDict, model_validator
from torch import Tensor

from archs.decoder import Decoder
from archs.settings import Settings
from archs.techniques import ragged
from archs.techniques.slots import Slots

PromptWeights = Callable[[], Iterator[tuple[int, Tensor]]]  # (first query, weights (B, G, R, queries, S)), in pieces


class Technique(Settings):
    """`budget`: slots of each KV head, as a number of tokens (10) or as a share of the context (0.5).

    A technique defines `select` or, where it ranks slots, `priority`; with `observes` it is shown attention weights.
    One that `trains` works on models that were trained further for it; it has the fields `train_tokens` and `lr` and
    the methods `retrofit`, `before_step` and `penalty` (archs/techniques/dmc.py).
    """

    model_config = ConfigDict(frozen=True)
    budget: int | float = 1.0
    observes: ClassVar[bool] = False
    trains: ClassVar[bool] = False
    quantisable: ClassVar[bool] = True
    is_full: ClassVar[bool] = False  # nothing is dropped or merged

    @model_validator(mode="after")
    def _validate(self) -> "Technique":
        is_share = isinstance(self.budget, float)
        fits = 0 < self.budget <= 1 if is_share else self.budget > 1
        allowed = "a share above 0.0 and up to 1.0 (all tokens), or a whole number of tokens from 2 on"
        self.check(fits, f"budget={self.budget!r}: must be {allowed}")
        self.validate_options(math.inf if is_share else self.budget)
        return self

    def validate_options(self, capacity: float) -> None:
        """ValueError for options that exclude each other, or leave no room in a budget of this many slots."""

    def validate_prompt(self, tokens: int) -> None:
        """ValueError for options that leave no room in what the budget comes to with a prompt of this length."""
        if (capacity := self.capacity(tokens)) < tokens:
            self.validate_options(capacity)

    def validate_model(self, model: Decoder) -> None:
        """ValueError where the technique cannot act on a model."""
        if model.attends_itself:
            name = type(model).__name__
            raise ValueError(f"{name} computes attention itself, on the whole cache: no technique acts on it")
        if self.observes and model.early_exit:
            raise ValueError(
                f"{type(self).__name__} looks at the attention of every prompt token, and {type(model).__name__} "
                "computes the last one's alone (early exit); techniques that look at none work there"
            )

    def capacity(self, tokens: int) -> int:
        """Slots of one KV head; a share is of the tokens seen so far."""
        return share(self.budget, tokens) if isinstance(self.budget, float) else self.budget

    def select(self, slots: Slots) -> Tensor | None:
        """Which slots (N,) are kept after a prompt (`slots.is_prompt`) or after a token; None for all."""
        return top(slots, self.priority(slots), self.capacity(slots.length))

    def priority(self, slots: Slots) -> Tensor:
        """(N,): the highest of each KV head's slots are kept, and of equals the earlier ones."""
        raise NotImplementedError

    def observe_prompt(self, slots: Slots, weights: PromptWeights) -> None:
        """Sees the prompt's attention."""
        self.observe(slots, sum(weight.sum(3) for _, weight in weights()).transpose(2, 3).flatten(0, 2))

    def observe(self, slots: Slots, weight_NR: Tensor) -> None:
        """Sees the attention that each slot receives from query heads: a slot's score is the sum of it."""
        slots.score_N += weight_NR.sum(1)

    def positioned(self, slots: Slots, q_ORD: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys with positions applied: their tokens' own, unless a technique moves them."""
        return q_ORD, slots.keys_ND


class Full(Technique):
    """Keeps everything."""

    is_full: ClassVar[bool] = True

    def validate_options(self, capacity: float) -> None:
        self.check(self.budget == 1.0, f"budget={self.budget}: full keeps everything; leave it out")

    def select(self, slots: Slots) -> None:
        return None


def share(of: float, tokens: int) -> int:
    """A share of the tokens, rounded up, at least 1."""
    return max(1, math.ceil(of * tokens - 1e-9))


def top(slots: Slots, priority_N: Tensor, count: int) -> Tensor:
    """True for the `count` slots of highest priority in each KV head."""
    if int(slots.count_O.max()) <= count:
        return torch.ones_like(priority_N, dtype=torch.bool)
    priority_OS = ragged.pad(priority_N.float(), slots.count_O)
    priority_OS = priority_OS.masked_fill(~ragged.mask(slots.count_O), -torch.inf)
    chosen_OC = priority_OS.argsort(dim=1, descending=True, stable=True)[:, :count]
    return ragged.flatten(torch.zeros_like(priority_OS, dtype=torch.bool).scatter(1, chosen_OC, True), slots.count_O)


def first_and_last(slots: Slots, first: int, last: int) -> Tensor:
    """True for slots whose token is among the first or the last of all tokens seen."""
    return (slots.position_N < first) | (slots.position_N >= slots.length - last)
