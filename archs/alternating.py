"""Layers of two kinds that alternate: every `global_every`-th one attends to all tokens."""

from pydantic import Field

from archs.grouped import GroupedOptions


class AlternatingOptions(GroupedOptions):
    global_every: int = Field(4, ge=1, lt=2**31)

    def complete(self) -> None:
        super().complete()
        fits = self.global_every <= self.layers
        self.check(fits, f"global_every={self.global_every}: must be at most layers={self.layers}")

    def is_global(self, layer: int) -> bool:
        return (layer + 1) % self.global_every == 0

    def over_layers(self, of_global: float, of_other: float) -> float:
        """The sum over all layers of what a global and another layer take."""
        count = self.layers // self.global_every
        return count * of_global + (self.layers - count) * of_other
