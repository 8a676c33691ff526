"""What a layer attends to: an object with two verbs, `append(start, k, v)` and `attend(q, scale)`.

Positions, masks, windows and ragged lengths are its business and not the model's. A model's `new_layers(make)` returns
one for each layer: `make.full` for all tokens, `make.ring` for a window of the last ones, `make.state` for a recurrent
state. Layers that share keys and values get the same object: one appends, the others only attend. Here are the objects
of training, which keep nothing; those of a cache are in archs/cache.py.

Shapes: B batch, G KV heads, H query heads, T new tokens, S tokens attended to, D key size, E value size.
"""

from typing import NamedTuple

from torch import Tensor

from archs import ops


class View(NamedTuple):
    """Keys (B, G, S, D) and values (B, G, S, E) to attend to, with the window and position of `ops.attention`."""

    k: Tensor
    v: Tensor
    window: int = 0
    position: Tensor | None = None


class KV:
    """A kind of KV defines `write`; `view` is what its last call returned."""

    view: View | None = None

    def append(self, start: int | Tensor, k_BGTD: Tensor, v_BGTE: Tensor | None = None) -> None:
        """Takes T new tokens from position `start` on; without values these are the first columns of the keys.

        `start` is a tensor (1) in a recorded decode step, or (B, 1, 1) where sequences differ in length; T is then 1.
        """
        self.view = self.write(start, k_BGTD, v_BGTE)

    def attend(self, q_BHTD: Tensor, scale: float) -> Tensor:
        """Causal attention of the last T tokens, (B, H, T, E), computed in the dtype of the keys."""
        k, v, window, position = self.view
        return ops.attention(q_BHTD.to(k.dtype), k, v, scale, window, position).to(q_BHTD.dtype)

    @property
    def dense(self) -> Tensor | None:
        """All keys in order, (B, G, S, D), where they can be read; None where one can only `attend`."""
        return self.view.k if self.view.position is None else None

    def write(self, start: int | Tensor, k_BGTD: Tensor, v_BGTE: Tensor | None) -> View:
        raise NotImplementedError


class Uncached(KV):
    """The keys and values of one forward pass."""

    def __init__(self, window: int = 0):
        self.window = window

    def write(self, start: int | Tensor, k_BGTD: Tensor, v_BGTE: Tensor | None) -> View:
        return View(k_BGTD, v_BGTE, self.window)


class Training:
    """Makes what layers attend to where nothing is cached: no state is carried over from earlier tokens."""

    def full(self, heads: int, key_size: int, value_size: int | None = None, *, shared: bool = False) -> Uncached:
        return Uncached()

    def ring(self, window: int, heads: int, head_dim: int) -> Uncached:
        return Uncached(window)

    def state(self, *shape: int) -> None:
        return None
