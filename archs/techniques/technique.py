"""What a technique is: which slots it keeps, and what attention it looks at to decide that."""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import ClassVar

import torch
from pydantic import ConfigDict, model_validator
from torch import Tensor

from archs.decoder import Decoder
from archs.settings import Settings
from archs.techniques import ragged
from archs.techniques.quantised import Quantisation, QuantisedSlots
from archs.techniques.slots import Slots


class Technique(Settings):
    """`budget`: slots of each KV head, as a number of tokens (10) or as a share of the context (0.5).

    A technique defines `select` or, where it ranks slots, `priority`; with `observes` it is shown attention weights.
    One that `trains` works on models that were trained further for it, with `train_tokens` and `lr`.
    """

    model_config = ConfigDict(frozen=True)
    budget: int | float = 1.0
    observes: ClassVar[bool] = False
    trains: ClassVar[bool] = False

    @model_validator(mode="after")
    def _validate(self) -> "Technique":
        fits = 0 < self.budget <= 1 if isinstance(self.budget, float) else self.budget >= 1
        self.check(fits, f"budget={self.budget!r}: must be a share above 0.0 and up to 1.0, or 1 token or more")
        self.validate_options()
        if isinstance(self.budget, int):
            self.validate_budget(self.budget)
        return self

    def validate_options(self) -> None:
        """ValueError for options that exclude each other."""

    def validate_budget(self, capacity: int) -> None:
        """ValueError where other options leave no room in this many slots."""

    def validate_prompt(self, tokens: int) -> None:
        """ValueError where they leave no room in what the budget comes to with a prompt of this length."""
        if (capacity := self.capacity(tokens)) < tokens:
            self.validate_budget(capacity)

    def validate_model(self, model: Decoder) -> None:
        """ValueError where the technique cannot act on a model."""
        if self.observes and model.early_exit:
            raise ValueError(
                f"{type(self).__name__} looks at the attention of every prompt token, and {type(model).__name__} "
                "computes the last one's alone (early exit); techniques that look at none work there"
            )

    def validate_quantisation(self) -> None:
        """ValueError where what the technique keeps cannot be quantised."""

    @property
    def is_full(self) -> bool:
        """Nothing is dropped or merged."""
        return False

    def slots_for(self, model: Decoder, quantisation: Quantisation | None) -> Callable[..., Slots]:
        """Makes the slots of a layer of a model. ValueError where the model was not trained further as it must be."""
        return partial(QuantisedSlots, quantisation) if quantisation else Slots

    def capacity(self, tokens: int) -> int:
        """Slots of one KV head; a share is of the tokens seen so far."""
        return share(self.budget, tokens) if isinstance(self.budget, float) else self.budget

    def select(self, slots: Slots, after_prompt: bool) -> Tensor | None:
        """Which slots (N,) are kept, after the prompt or after a token; None for all."""
        return top(slots, self.priority(slots), self.capacity(slots.length))

    def priority(self, slots: Slots) -> Tensor:
        """(N,): the highest of each KV head's slots are kept, and of equals the earlier ones."""
        raise NotImplementedError

    def observe_prompt(self, slots: Slots, weights: Iterable[tuple[int, Tensor]]) -> None:
        """Sees the prompt's attention: (position of the first query, weights (B, G, R, queries, S)), in pieces."""

    def observe_step(self, slots: Slots, weight_NR: Tensor) -> None:
        """Sees the attention of a decode step's queries on each slot."""

    def positioned(self, slots: Slots, q_ORD: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys with positions applied: their tokens' own, unless a technique moves them."""
        return q_ORD, slots.keys_ND

    def retrofit(self, model: Decoder) -> Decoder:
        """The model, its layers changed to the form in which they are trained further."""
        return model

    def before_step(self, model: Decoder, done: float) -> None:
        """Called before each step of that training, with the share of the budget that is done."""

    def penalty(self, model: Decoder, done: float) -> Tensor | float:
        """What is added to the loss of a step."""
        return 0.0


class Full(Technique):
    """Keeps everything."""

    def validate_options(self) -> None:
        self.check(self.budget == 1.0, f"budget={self.budget}: full keeps everything; leave it out")

    @property
    def is_full(self) -> bool:
        return True

    def select(self, slots: Slots, after_prompt: bool) -> None:
        return None


def share(of: float, tokens: int) -> int:
    """A share of the tokens, rounded up, at least 1."""
    return max(1, math.ceil(of * tokens - 1e-9))


def top(slots: Slots, priority_N: Tensor, count: int) -> Tensor:
    """True for the `count` slots of highest priority in each KV head."""
    if not len(priority_N) or int(slots.count_O.max()) <= count:
        return torch.ones_like(priority_N, dtype=torch.bool)
    priority_OS = ragged.pad(priority_N.float(), slots.count_O)
    priority_OS = priority_OS.masked_fill(~ragged.mask(slots.count_O), -torch.inf)
    chosen_OC = priority_OS.argsort(dim=1, descending=True, stable=True)[:, :count]
    return ragged.flatten(torch.zeros_like(priority_OS, dtype=torch.bool).scatter(1, chosen_OC, True), slots.count_O)


def first_and_last(slots: Slots, first: int, last: int) -> Tensor:
    """True for slots whose token is among the first or the last of all tokens seen."""
    return (slots.position_N < first) | (slots.position_N >= slots.length - last)
