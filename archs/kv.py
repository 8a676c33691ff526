"""What a layer attends to: an object with two verbs, `append(start, k, v)` and `attend(q, scale, sinks)`.

Positions, masks, windows and ragged lengths are its business and not the model's. A model's `new_layers(make)` returns
one for each layer: `make.full` for all tokens, `make.ring` for a window of the last ones, `make.state` for a recurrent
state. Layers that share keys and values get the same object: one appends, the others only attend. Here are the objects
of training, which keep nothing; those of a cache are in archs/cache.py.

Shapes: B batch, G KV heads, H query heads, T new tokens, S tokens attended to, D key size, E value size.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from archs import ops


def as_wide_as(q: Tensor, k: Tensor) -> Tensor:
    """Queries in the dtype of the keys, unless their own has more bits."""
    return q if q.dtype.itemsize > k.dtype.itemsize else q.to(k.dtype)


class View(NamedTuple):
    """Keys (B, G, S, D) and values (B, G, S, E), with the window and position of `ops.attention` or a boolean mask."""

    k: Tensor
    v: Tensor
    window: int = 0
    position: Tensor | None = None
    mask: Tensor | None = None

    def visible(self, T: int) -> Tensor:
        """Which tokens the last T may see, (B or 1, T, S)."""
        if self.mask is not None:
            return self.mask[:, 0, -T:]
        S = self.k.shape[2]
        return ops.visible(T, S, self.window, self.position, self.k.device).view(-1, T, S)

    def behind(self, T: int) -> Tensor:
        """How far each token is behind each of the last T, (T, S), of slots in the order of tokens."""
        slot_S = torch.arange(S := self.k.shape[2], device=self.k.device)
        return (slot_S[S - T :, None] if self.position is None else self.position[:, None]) - slot_S

    def attend(self, q_BHTD: Tensor, scale: float, sinks_1H11: Tensor | None = None) -> Tensor:
        if self.mask is not None:
            return ops.masked_attention(q_BHTD, self.k, self.v, scale, self.mask, sinks_1H11)
        return ops.attention(q_BHTD, self.k, self.v, scale, self.window, self.position, sinks_1H11)


class KV:
    """A kind of KV defines `write`, which takes what `append` does; `view` is what its last call returned."""

    view: View | None = None

    def append(self, start: int | Tensor, k_BGTD: Tensor, v_BGTE: Tensor | None = None) -> None:
        """Takes T new tokens from position `start` on; without values these are the first columns of the keys.

        `start` is a tensor (1) in a recorded decode step, or (B, 1, 1) where sequences differ in length; T is then 1.
        """
        self.view = self.write(start, k_BGTD, v_BGTE)

    def attend(self, q_BHTD: Tensor, scale: float, sinks_1H11: Tensor | None = None) -> Tensor:
        """Causal attention of the last T tokens, (B, H, T, E), computed in the wider dtype of queries and keys; `sinks`
        as in `ops.softmax`."""
        return self.view.attend(as_wide_as(q_BHTD, self.view.k), scale, sinks_1H11).to(q_BHTD.dtype)

    @property
    def dense(self) -> View | None:
        """The view where it has all keys in order; None where one can only `attend`."""
        return self.view if self.view.position is None else None


class Uncached(KV):
    """The keys and values of one forward pass."""

    def __init__(self, window: int = 0, mask: Tensor | None = None, value_size: int | None = None):
        self.window, self.mask, self.value_size = window, mask, value_size

    def write(self, start: int | Tensor, k_BGTD: Tensor, v_BGTE: Tensor | None) -> View:
        v_BGTE = k_BGTD[..., : self.value_size] if v_BGTE is None else v_BGTE
        return View(k_BGTD, v_BGTE, self.window, mask=self.mask)


class Training:
    """Makes what layers attend to where nothing is cached: no state is carried over from earlier tokens.

    With the number of each token's document no layer sees beyond a document. A recurrent layer then gets this object in
    place of None, and starts its state again where `document_BT` changes.
    """

    def __init__(self, document_BT: Tensor | None = None):
        self.document_BT, self.mask = document_BT, None
        if document_BT is not None:
            self.mask = (document_BT[:, None, :, None] == document_BT[:, None, None]).tril()

    def full(self, heads: int, key_size: int, value_size: int | None = None, *, shared: bool = False) -> Uncached:
        return Uncached(mask=self.mask, value_size=value_size)

    def ring(self, window: int, heads: int, head_dim: int) -> Uncached:
        return Uncached(window, None if self.mask is None else self.mask.triu(1 - window))

    def state(self, *shape: int) -> "Training | None":
        return None if self.document_BT is None else self
