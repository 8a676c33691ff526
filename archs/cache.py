"""KV caches whose storages are allocated once and written in place.

`Cache.nbytes` walks every tensor that its layers reach and adds up their storages, each once. So no variant can leave
out a buffer, and a cache that several layers share counts once (YOCO, arXiv 2405.05254).

Shapes: B batch, G KV heads, S slots (tokens that there is room for), T new tokens, D size of a key or value.
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
    """Keys and values of all tokens, token t in slot t: two tensors (B, G, S, D), or one of keys whose first
    `value_size` columns are the values."""

    def __init__(self, tensors: list[Tensor], value_size: int):
        self.tensors, self.value_size = tensors, value_size

    def write(self, start: int | Tensor, *new_BGTD: Tensor | None) -> View:
        """Views the slots that are filled; with a tensor `start`, all slots and the position up to which to look."""
        if isinstance(start, Tensor):
            self.scatter(start, new_BGTD)
            return self.filled(position=start)
        end = start + new_BGTD[0].shape[2]
        for tensor, new in zip(self.tensors, new_BGTD, strict=False):
            tensor[:, :, start:end] = new
        return self.filled(end)

    def scatter(self, slots_T: Tensor, new_BGTD: tuple[Tensor | None, ...]) -> None:
        for tensor, new in zip(self.tensors, new_BGTD, strict=False):
            ops.put(tensor, slots_T, new)

    def filled(self, end: int | None = None, position: Tensor | None = None) -> View:
        k, *v = (tensor[:, :, :end] for tensor in self.tensors)
        return View(k, v[0] if v else k[..., : self.value_size], position=position)


class Ring(FullCache):
    """Keys and values of the last S tokens, token t in slot t mod S; S is the window, the token itself included."""

    def write(self, start: int | Tensor, *new_BGTD: Tensor) -> View:
        """Several tokens, whose windows differ, attend to copies in token order: the window before them, and them."""
        window, T = self.tensors[0].shape[2], new_BGTD[0].shape[2]
        if T == 1:  # it attends to all slots, whose order does not matter: positions are in the keys
            slot = start % window if isinstance(start, Tensor) else torch.tensor([start % window], device=self.device)
            self.scatter(slot, new_BGTD)
            return self.filled(position=start) if isinstance(start, Tensor) else self.filled(start + 1)
        before = torch.arange(max(0, start - window + 1), start, device=self.device) % window
        k, v = (
            torch.cat((tensor[:, :, before], new.to(tensor.dtype)), 2)
            for tensor, new in zip(self.tensors, new_BGTD, strict=True)
        )
        stay = min(T, window)
        last = torch.arange(start + T - stay, start + T, device=self.device) % window
        self.scatter(last, tuple(new[:, :, T - stay :] for new in new_BGTD))
        return View(k, v, window=window)

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device


class State:
    """A recurrent state (B, ...), whose size does not depend on the length of the sequence."""

    def __init__(self, state: Tensor):
        self.state = state

    def read(self) -> Tensor:
        """The stored tensor, which an operator may change in place."""
        return self.state

    def write(self, state: Tensor) -> None:
        if state is not self.state:
            self.state.copy_(state)


class Allocator:
    """Allocates what layers attend to: for `batch_size` sequences of up to `max_tokens` tokens. ValueError if either is
    below 1."""

    def __init__(self, batch_size: int, max_tokens: int, dtype: torch.dtype, device: torch.device | str):
        for name, value in (("batch_size", batch_size), ("max_tokens", max_tokens)):
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        self.batch_size, self.max_tokens, self.dtype, self.device = batch_size, max_tokens, dtype, torch.device(device)

    def zeros(self, *shape: int) -> Tensor:
        """(B, *shape)."""
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
    """The KV of all layers of a model, for a batch of sequences. Made by `model.new_cache`.

    `length` is the number of tokens seen, the same for all sequences; `layers` the KV of each layer; `step` the
    recorded decode step, if there is one. `static`: storages never move, so a step can be recorded on them, and `rows`
    gives some of the sequences. `observes`: it needs the attention weights of every prompt token, in all layers.
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
        """Called before the layers append these tokens. ValueError if their batch differs, or there is no room."""
        B, T = tokens_BT.shape
        if self.batch_size != B:
            raise ValueError(f"tokens for {B} sequences, but the cache was made for {self.batch_size}")
        if T < 1:
            raise ValueError("at least one token per sequence is needed")
        if self.length + T > self.max_tokens:
            raise ValueError(
                f"the cache holds {self.length} of at most {self.max_tokens} tokens and {T} more do not fit; "
                f"make it with max_tokens={self.length + T} or more"
            )

    def advance(self, tokens: int) -> None:
        """Called after all layers have appended this many tokens."""
        for layer in self.layers:
            layer.view = None
        self.length += tokens

    def reset(self) -> None:
        """Empties the cache and keeps its storages."""
        self.length = 0
        for tensor in _tensors(self.layers):
            tensor.zero_()

    def rows(self, first: int, count: int) -> "Cache":
        """A cache of some of the sequences, which writes to the same storages and counts its own `length`."""
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
