"""What a technique is: which slots it keeps, and what of attention it looks at to decide that."""

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from archs.techniques.slots import filled, flat, padded

if TYPE_CHECKING:
    from archs.techniques.slots import Slots


@dataclass(frozen=True)
class Technique:
    """`budget`: slots of each KV head, in tokens (10), or as a share of the context (0.5); else ValueError.

    A technique overrides `keep` or, where slots are ranked, `priority`; with `observes` it is shown attention weights.
    """

    budget: float = 1.0
    observes: ClassVar[bool] = False
    trains: ClassVar[bool] = False  # the technique works on a model that was trained further for it

    @property
    def is_full(self) -> bool:
        """True if nothing is dropped or merged."""
        return False

    def model_dump(self) -> dict:
        return dataclasses.asdict(self)

    def validate_model(self, model) -> None:
        """ValueError where the technique cannot act on the model."""
        self.suits(model.options.layers)

    def retrofit(self, model):
        """The model in the form in which it is trained further."""
        return model

    def before_step(self, model, done: float) -> None:
        """Called before each training step of a retrofit, with the share of the budget that is done."""

    def penalty(self, model, done: float) -> Tensor | float:
        """Added to the loss of a retrofit's training step."""
        return 0.0

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value, whole = getattr(self, f.name), f.type is int
            if not (f.default is value is None or type(value) in ((int,) if whole else (int, float))):
                raise ValueError(f"{f.name}={value!r}: must be a {'whole ' * whole}number")
        if not (0 < self.budget <= 1 if isinstance(self.budget, float) else self.budget >= 1):
            raise ValueError(f"budget={self.budget!r}: must be a share above 0.0 and up to 1.0, or 1 token or more")
        self.check()
        if not isinstance(self.budget, float):
            self.check_room(self.budget)

    def check(self) -> None:
        """ValueError for options that can't be."""

    def check_room(self, capacity: int) -> None:
        """ValueError where other options leave no room in so many slots."""

    def fits(self, prompt: int) -> None:
        """The same for what the budget comes to with a prompt of so many tokens."""
        if (capacity := self.capacity(prompt)) < prompt:
            self.check_room(capacity)

    def suits(self, layers: int) -> None:
        """ValueError where it can't act on a model of so many."""

    def capacity(self, tokens: int) -> int:
        """Slots of one KV head; a share is of the tokens seen so far."""
        return share(self.budget, tokens) if isinstance(self.budget, float) else self.budget

    def keep(self, slots: "Slots", prompt: bool) -> Tensor | None:
        """Which slots (N,) are kept, after the prompt or after a token; None: all."""
        return top(slots, self.priority(slots), self.capacity(slots.length))

    def priority(self, slots: "Slots") -> Tensor:
        """(N,): of each KV head's slots those with the highest are kept, of equals the earlier."""
        raise NotImplementedError

    def see_prompt(self, slots: "Slots", weights: Iterable[tuple[int, Tensor]]) -> None:
        """(position of the first query, attention weights (B, G, R, queries, S)), some queries at a time."""

    def see(self, slots: "Slots", weight_NR: Tensor) -> None:
        """The attention weights of a decode step's queries on each slot."""

    def place(self, slots: "Slots", q_ORD: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys as they meet: at their tokens' positions, unless a technique moves them."""
        return q_ORD, slots.keys_ND


@dataclass(frozen=True)
class Full(Technique):
    """Lets go of nothing."""

    is_full = True

    def check(self) -> None:
        if self.budget != 1.0:
            raise ValueError(f"budget={self.budget}: full keeps everything; leave it out")

    def keep(self, slots: "Slots", prompt: bool) -> None:
        return None


def share(of: float, tokens: int) -> int:
    """Rounded up, and 1 at least."""
    return max(1, math.ceil(of * tokens - 1e-9))


def top(slots: "Slots", priority_N: Tensor, count: int) -> Tensor:
    """Whether a slot is among the `count` of highest priority in its KV head."""
    if not len(priority_N) or int(slots.count_O.max()) <= count:
        return torch.ones_like(priority_N, dtype=torch.bool)
    priority_OS = padded(priority_N.float(), slots.count_O)
    priority_OS = priority_OS.masked_fill(~filled(slots.count_O), -torch.inf)
    chosen_OC = priority_OS.argsort(dim=1, descending=True, stable=True)[:, :count]
    return flat(torch.zeros_like(priority_OS, dtype=torch.bool).scatter(1, chosen_OC, True), slots.count_O)


def first_and_last(slots: "Slots", first: int, last: int) -> Tensor:
    """Whether a slot's token is among the first or the last of all that were seen."""
    return (slots.position_N < first) | (slots.position_N >= slots.length - last)
