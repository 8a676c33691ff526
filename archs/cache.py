"""KV caches: allocated once for `max_tokens`, written in place, read as far as they are filled.

The bytes that a cache reports are those of its storages, found by walking all tensors that it reaches, each storage
once. So a variant cannot forget a buffer, and a cache shared by several layers counts once (YOCO, arXiv 2405.05254).

Shapes: B batch, G KV heads, S slots, T new tokens, D size of a vector.
"""

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from archs import ops
from archs.kv import KV, View


class FullCache(KV):
    """Every token's key and value in order: tensors (B, G, max_tokens, D). Values may be columns of the keys."""

    def __init__(self, tensors: list[Tensor], value_size: int):
        self.tensors, self.value_size = tensors, value_size

    def write(self, start: int | Tensor, *new_BGTD: Tensor | None) -> View:
        if isinstance(start, Tensor):
            self.put(start, new_BGTD)
            return self.slots(position=start)
        end = start + new_BGTD[0].shape[2]
        for tensor, new in zip(self.tensors, new_BGTD, strict=False):
            tensor[:, :, start:end] = new
        return self.slots(end)

    def put(self, slots_T: Tensor, new_BGTD: tuple[Tensor | None, ...]) -> None:
        for tensor, new in zip(self.tensors, new_BGTD, strict=False):
            tensor.index_copy_(2, slots_T, new.to(tensor.dtype))

    def slots(self, end: int | None = None, position: Tensor | None = None) -> View:
        k, *v = (tensor[:, :, :end] for tensor in self.tensors)
        return View(k, v[0] if v else k[..., : self.value_size], position=position)


class Ring(FullCache):
    """The last `window` tokens; token t is in slot t mod window."""

    def write(self, start: int | Tensor, *new_BGTD: Tensor) -> View:
        window, T = self.tensors[0].shape[2], new_BGTD[0].shape[2]
        if T == 1:  # sees all that is held, in whatever order
            slot = start % window if isinstance(start, Tensor) else torch.tensor([start % window], device=self.device)
            self.put(slot, new_BGTD)
            return self.slots(position=start) if isinstance(start, Tensor) else self.slots(start + 1)
        before = torch.arange(max(0, start - window + 1), start, device=self.device) % window
        k, v = (
            torch.cat((tensor[:, :, before], new.to(tensor.dtype)), 2)
            for tensor, new in zip(self.tensors, new_BGTD, strict=True)
        )
        stay = min(T, window)
        last = torch.arange(start + T - stay, start + T, device=self.device) % window
        self.put(last, tuple(new[:, :, T - stay :] for new in new_BGTD))
        return View(k, v, window)

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device


class State:
    """A recurrent state, constant however long the sequence grows."""

    def __init__(self, state: Tensor):
        self.state = state

    def read(self) -> Tensor:
        """The state itself: an operator may change it in place."""
        return self.state

    def write(self, state: Tensor) -> None:
        if state is not self.state:
            self.state.copy_(state)


class Static:
    """Makes what layers attend to, for `max_tokens` of each sequence."""

    def __init__(self, batch_size: int, max_tokens: int, dtype: torch.dtype, device: torch.device | str):
        for name, value in (("batch_size", batch_size), ("max_tokens", max_tokens)):
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        self.batch_size, self.max_tokens, self.dtype, self.device = batch_size, max_tokens, dtype, torch.device(device)

    def zeros(self, *shape: int) -> Tensor:
        with torch.inference_mode(False):  # a cache made in inference mode could not be written outside of it
            return ops.zeros((self.batch_size, *shape), self.dtype, self.device)

    def full(self, heads: int, key_size: int, value_size: int | None = None, *, shared: bool = False) -> FullCache:
        """`shared`: the values are the first `value_size` columns of the keys."""
        value_size = value_size or key_size
        sizes = [key_size] if shared else [key_size, value_size]
        return FullCache([self.zeros(heads, self.max_tokens, size) for size in sizes], value_size)

    def ring(self, window: int, heads: int, head_dim: int) -> Ring:
        slots = min(window, self.max_tokens)
        return Ring([self.zeros(heads, slots, head_dim) for _ in range(2)], head_dim)

    def state(self, *shape: int) -> State:
        return State(self.zeros(*shape))


class Cache:
    """What a batch of sequences holds in all layers of a model. Made by `model.new_cache`.

    `length` is the number of tokens held, `nbytes` the bytes of all storages, `layers` what the layers attend to, and
    `step` the decode step that was recorded on these storages. `static`: storages stay where they are, so that a step
    can be recorded and some of the sequences can be filled apart. `observes`: attention of all prompt tokens is needed.
    """

    static = True
    observes = False

    def __init__(self, layers: list, batch_size: int, max_tokens: int):
        self.layers, self.batch_size, self.max_tokens = layers, batch_size, max_tokens
        self.length = 0
        self.step: Any = None

    def __deepcopy__(self, memo: dict) -> "Cache":
        new = copy.copy(self)
        with torch.inference_mode(False):  # or a copy made in inference mode could not be written outside of it
            new.__dict__ = copy.deepcopy(vars(self), memo)
        return new

    @functools.cached_property
    def dtypes(self) -> set[torch.dtype]:
        return {t.dtype for t in _tensors(self.layers)}

    @property
    def nbytes(self) -> int:
        storages = {s._cdata: s.nbytes() for s in (t.untyped_storage() for t in _tensors(self.layers))}
        return sum(storages.values())

    def begin(self, tokens_BT: Tensor) -> None:
        """Prepares for tokens that are appended next. ValueError if there is no room for them."""
        B, T = tokens_BT.shape
        if self.batch_size != B:
            raise ValueError(f"tokens for {B} sequences, but the cache was made for {self.batch_size}")
        if T < 1:
            raise ValueError("at least one token a sequence is needed")
        if self.length + T > self.max_tokens:
            raise ValueError(
                f"the cache holds {self.length} of at most {self.max_tokens} tokens and {T} more do not fit; "
                f"make it with max_tokens={self.length + T} or more"
            )

    def advance(self, tokens: int) -> None:
        """All layers have appended this many tokens."""
        for layer in self.layers:
            layer.view = None
        self.length += tokens

    def reset(self) -> None:
        """Empties the cache and keeps its storages."""
        self.length = 0
        for tensor in _tensors(self.layers):
            tensor.zero_()

    def rows(self, first: int, count: int) -> "Cache":
        """Some of the sequences, in the same storages."""
        layers = with_tensors(self.layers, lambda t: t[first : first + count])
        cache = Cache(layers, min(count, self.batch_size - first), self.max_tokens)
        cache.length = self.length
        return cache


def with_tensors(thing: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A copy of an object, or of a list of them, with `function(tensor)` in place of each tensor."""
    return copy.deepcopy(thing, memo={id(t): function(t) for t in _tensors(thing)})


def _tensors(thing: Any) -> Iterator[Tensor]:
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, dict):
        for value in thing.values():
            yield from _tensors(value)
    elif isinstance(thing, list | tuple):
        for value in thing:
            yield from _tensors(value)
    elif hasattr(thing, "__dict__"):
        yield from _tensors(vars(thing))
