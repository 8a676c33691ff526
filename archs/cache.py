"""KV caches: allocated once for `max_tokens`, written in place, read as far as they are filled.

Where a token goes is a number (`start: int`), and what is held comes back as views cut to it. In a decode step that is
recorded and replayed it is a tensor on the device (1), and the whole storages come back with it: `seen`.

The bytes a cache reports are those of its storages, found by walking whatever tensors it reaches, each storage once.
A variant therefore cannot forget a buffer, and a cache shared by several layers counts once (YOCO, arXiv 2405.05254).

Shapes: B batch, G KV heads, S cached tokens, T new tokens, D head size.
"""

import contextlib
import copy
import functools
import math
import mmap
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from archs.cpu.building import takes
from archs.cpu.layers import put

HUGE_PAGE = 2**21  # bytes


def zeros(*shape: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """torch's; on a CPU, where Linux has them, large ones in pages of 2 MiB, which are read up to a fifth faster.

    Of torch's own memory, pages of 4 KiB, each address must be looked up again after a few lines.
    """
    size = math.prod(shape) * dtype.itemsize
    if torch.device(device).type != "cpu" or size < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=dtype, device=device)
    area = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        area.madvise(mmap.MADV_HUGEPAGE)
    offset = -torch.frombuffer(area, dtype=torch.uint8).data_ptr() % HUGE_PAGE
    made = torch.frombuffer(area, dtype=dtype, count=math.prod(shape), offset=offset).view(shape)
    return made.zero_()  # so that all of it is there before anything is timed


class FullCache:
    """Every token's vectors in order, one tensor (B, G, max_tokens, D) for each of `sizes`, given as (G, D)."""

    def __init__(self, batch_size: int, max_tokens: int, sizes: Sequence[tuple[int, int]], dtype, device):
        self.streams = [zeros(batch_size, g, max_tokens, d, dtype=dtype, device=device) for g, d in sizes]

    def append(self, start: int | Tensor, *new_BGTD: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """Writes T new tokens (one, where `start` is a tensor) at `start`.

        Returns views (B, G, start + T, D) of all that is now held, and None; or all slots, and up to where they are
        to be seen.
        """
        if isinstance(start, Tensor):
            return _write(self.streams, start, new_BGTD), start
        end = start + new_BGTD[0].shape[2]
        for stream, new in zip(self.streams, new_BGTD, strict=True):
            stream[:, :, start:end] = new
        return [stream[:, :, :end] for stream in self.streams], None


def _write(streams: list[Tensor], slot: Tensor, new_BG1D: Sequence[Tensor]) -> list[Tensor]:
    for stream, new in zip(streams, new_BG1D, strict=True):
        if new.stride(3) == 1 and takes(stream, new):
            put(stream, new, slot)
        else:
            stream.index_copy_(2, slot, new.to(stream.dtype))
    return streams


class WindowCache:
    """A ring of the last `window` tokens' keys and values; token t stands in slot t mod window."""

    def __init__(self, batch_size: int, max_tokens: int, window: int, kv_heads: int, head_dim: int, dtype, device):
        self.slots = min(window, max_tokens)
        shape = batch_size, kv_heads, self.slots, head_dim
        self.streams = [zeros(*shape, dtype=dtype, device=device) for _ in range(2)]

    def append(self, start: int | Tensor, *new_BGTD: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """Writes T new tokens at `start`; of more than a ring's worth only the last are kept.

        Returns what FullCache does, in slot order: attention by a query that sees all that is held needs no other.
        """
        if isinstance(start, Tensor):
            return _write(self.streams, start % self.slots, new_BGTD), start
        T = new_BGTD[0].shape[2]
        kept = min(T, self.slots)
        slot = (start + T - kept) % self.slots
        first = min(kept, self.slots - slot)  # tokens before the ring's end; the rest goes on from slot 0
        for stream, new in zip(self.streams, new_BGTD, strict=True):
            new = new[:, :, T - kept :]
            stream[:, :, slot : slot + first] = new[:, :, :first]
            stream[:, :, : kept - first] = new[:, :, first:]
        return [stream[:, :, : start + T] for stream in self.streams], None

    def recent(self, start: int, count: int) -> list[Tensor]:
        """The last `count` tokens (or as many as are held) before `start`, in order: (B, G, count, D) each."""
        count = min(count, start, self.slots)
        slots = torch.arange(start - count, start, device=self.streams[0].device) % self.slots
        return [stream[:, :, slots] for stream in self.streams]


class StateCache:
    """A recurrent state (B, H, D, D): constant however long the sequence grows."""

    def __init__(self, batch_size: int, heads: int, head_dim: int, dtype, device):
        self.state = torch.zeros(batch_size, heads, head_dim, head_dim, dtype=dtype, device=device)


class Cache:
    """What a batch of sequences holds in all layers of a model. Made by `model.new_cache`.

    `length` is the number of tokens held, `nbytes` the bytes of all storages, `parts` what the layers wrote them to.
    `step` is the decode step recorded on these storages, where there is one. `static`: storages stay where they are, so
    that a step can be recorded and rows can be filled apart. `whole_prompt`: every token of a prompt is to attend.
    """

    static = True
    whole_prompt = False

    def __init__(self, parts: list, batch_size: int, max_tokens: int):
        self.parts = parts
        self.batch_size = batch_size
        self.max_tokens = max_tokens
        self.length = 0
        self.step: Any = None

    @functools.cached_property
    def dtypes(self) -> set[torch.dtype]:
        return {t.dtype for t in _tensors(self.parts)}

    @property
    def nbytes(self) -> int:
        storages = {s._cdata: s.nbytes() for s in (t.untyped_storage() for t in _tensors(self.parts))}
        return sum(storages.values())

    def announce(self, tokens_BT: Tensor) -> None:
        """The ids of the tokens whose keys and values come next."""

    def advance(self, tokens: int) -> None:
        """So many more are in all parts."""
        self.length += tokens

    def reset(self) -> None:
        """Empties the cache and keeps its storages."""
        self.length = 0
        for tensor in _tensors(self.parts):
            tensor.zero_()

    def rows(self, first: int, count: int) -> "Cache":
        """`count` of the sequences, from `first` on, in the same storages."""
        parts = with_tensors(self.parts, lambda t: t[first : first + count])
        cache = Cache(parts, min(count, self.batch_size - first), self.max_tokens)
        cache.length = self.length
        return cache

    def check_room(self, batch_size: int, tokens: int) -> None:
        if batch_size != self.batch_size:
            raise ValueError(f"tokens for {batch_size} sequences, but the cache was made for {self.batch_size}")
        if tokens < 1:
            raise ValueError("at least one token a sequence is needed")
        if self.length + tokens > self.max_tokens:
            raise ValueError(
                f"the cache holds {self.length} of at most {self.max_tokens} tokens and {tokens} more do not fit; "
                f"make it with max_tokens={self.length + tokens} or more"
            )


def with_tensors(thing: Any, of: Callable[[Tensor], Tensor]) -> Any:
    """A copy of a part, or of a list of them, with `of(tensor)` in place of each tensor."""
    return copy.deepcopy(thing, memo={id(t): of(t) for t in _tensors(thing)})


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
