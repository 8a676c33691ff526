"""A layer's cache under a technique: slots that are freed one by one, as many in each KV head as the technique keeps.

Slots lie flat, those of an owner (a KV head of a sequence) together and in the order of their tokens. One that is let
go is no longer in the storage: nothing can read it, and `Cache.nbytes` counts what is left.

Shapes: B batch, G KV heads, H query heads, R = H / G, O = B G owners, N slots of all owners, T tokens, S slots of one
owner, D key size, E value size.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from archs.attention import attend, frequencies, rotate
from archs.cache import Cache, FullCache

if TYPE_CHECKING:
    from archs.techniques.technique import Technique

QUERIES_AT_ONCE = 256  # whose weights on a prompt are looked at together


class CompressedCache(Cache):
    """A cache whose parts let go, after the prompt and after each token, of what the technique does not keep."""

    static = False

    def __init__(
        self, technique: "Technique", parts: list, batch_size: int, max_tokens: int, kind_V: Tensor | None = None
    ):
        super().__init__(parts, batch_size, max_tokens)
        self.technique, self.whole_prompt, self.kind_V = technique, technique.observes, kind_V

    def reset(self) -> None:
        for slots in self.slots:
            slots.keep(torch.zeros_like(slots.position_N, dtype=torch.bool))
        super().reset()

    def check_room(self, batch_size: int, tokens: int) -> None:
        super().check_room(batch_size, tokens)
        if not self.length:
            self.technique.fits(tokens)

    def announce(self, tokens_BT: Tensor) -> None:
        if self.kind_V is not None:
            for slots in self.slots:
                slots.coming_BT = self.kind_V[tokens_BT]

    def advance(self, tokens: int) -> None:
        for slots in self.slots:
            slots.evict(prompt=self.length == 0)
        super().advance(tokens)

    @property
    def slots(self) -> list["Slots"]:
        return [part for part in self.parts if isinstance(part, Slots)]

    @property
    def nbytes(self) -> int:
        """Of keys and values; what a technique remembers of them beside is `notes_nbytes`."""
        return super().nbytes - self.notes_nbytes

    @property
    def metadata_nbytes(self) -> int:
        return self.notes_nbytes

    @property
    def notes_nbytes(self) -> int:
        """Bytes of positions, kinds of tokens, counts and scores."""
        return sum(slots.notes_nbytes for slots in self.slots)


class Slots:
    """Takes the place of a FullCache of the same `sizes`, and of the keys and values that attention is given."""

    def __init__(self, technique: "Technique", layer: int, whole: FullCache, rotary: tuple[int, float], device):
        """`whole` may be on the meta device. `rotary`: how many of a key's last columns are turned, and the base."""
        self.technique, self.layer, self.rotary, self.value_size = technique, layer, rotary, None
        batch_size, self.kv_heads, _, _ = whole.streams[0].shape
        owners = batch_size * self.kv_heads
        self.streams = [torch.zeros(0, s.shape[-1], dtype=s.dtype, device=device) for s in whole.streams]
        self.count_O = torch.zeros(owners, dtype=torch.long, device=device)
        self.position_N = torch.zeros(0, dtype=torch.int32, device=device)
        self.score_N = torch.zeros(0, dtype=torch.float32, device=device)
        self.kind_N = torch.zeros(0, dtype=torch.uint8, device=device)
        self.coming_BT: Tensor | None = None  # kinds of the tokens that are appended next; None: all 0
        self.policy_O = torch.zeros_like(self.count_O)
        self.length = 0  # tokens seen

    @property
    def owner_N(self) -> Tensor:
        return torch.repeat_interleave(torch.arange(len(self.count_O), device=self.count_O.device), self.count_O)

    @property
    def keys_ND(self) -> Tensor:
        return self.streams[0]

    def values_NE(self, value_size: int | None = None) -> Tensor:
        """Without a stream of their own they are the keys' first columns (a latent)."""
        return self.streams[-1] if len(self.streams) > 1 else self.keys_ND[:, :value_size]

    @property
    def notes_nbytes(self) -> int:
        notes = self.position_N, self.score_N, self.kind_N, self.count_O, self.policy_O, self.coming_BT
        return sum(note.nbytes for note in notes if note is not None)

    # As a part of a cache

    def append(self, start: int, *new_BGTD: Tensor) -> tuple[list["Slots"], None]:
        """A prompt, where nothing is held yet, or one token for each sequence."""
        T = new_BGTD[0].shape[2]
        if start and T > 1:
            raise ValueError("after its prompt a compressed cache takes one token at a time")
        owners, device = len(self.count_O), self.count_O.device
        self.store([new.reshape(owners * T, -1) for new in new_BGTD], T)
        positions_T = torch.arange(start, start + T, device=device)
        self.position_N = grown(self.position_N, self.count_O, positions_T.repeat(owners), T)
        self.score_N = grown(self.score_N, self.count_O, torch.zeros(owners * T, device=device), T)
        kind_BT = torch.zeros_like(positions_T, dtype=torch.uint8) if self.coming_BT is None else self.coming_BT
        kind_OT = kind_BT.expand(owners // self.kv_heads, T).repeat_interleave(self.kv_heads, 0)
        self.kind_N = grown(self.kind_N, self.count_O, kind_OT.flatten(), T)
        self.count_O, self.length = self.count_O + T, start + T
        return [self] * len(new_BGTD), None

    def store(self, new: list[Tensor], T: int) -> None:
        """T new rows of each owner for each stream; called before the slots are counted."""
        self.streams = [grown(s, self.count_O, n, T) for s, n in zip(self.streams, new, strict=True)]

    def free(self, keep_N: Tensor) -> None:
        """Lets go of the other slots' keys and values."""
        self.streams = [stream[keep_N] for stream in self.streams]

    def keep(self, keep_N: Tensor) -> None:
        """Frees the other slots."""
        self.free(keep_N)
        self.position_N, self.score_N, self.kind_N = (
            note[keep_N] for note in (self.position_N, self.score_N, self.kind_N)
        )
        self.count_O = counted(keep_N, self.count_O)

    def evict(self, prompt: bool) -> None:
        keep_N = self.technique.keep(self, prompt)
        if keep_N is not None and not keep_N.all():
            self.keep(keep_N)

    # As keys and values

    def attend(self, q_BHTD: Tensor, scale: float | None, value_size: int | None) -> Tensor:
        """Attention of a prompt on itself, or of one token on all slots of its KV heads; (B, H, T, E)."""
        B, H, T, D = q_BHTD.shape
        scale, self.value_size = scale or D**-0.5, value_size
        if self.length == T:
            held = [self.keys_ND] + ([self.values_NE()] if len(self.streams) > 1 else [])
            k, *v = (stream.view(B, self.kv_heads, T, -1) for stream in held)
            if self.technique.observes:
                self.technique.see_prompt(self, PromptWeights(q_BHTD, k, scale))
            return attend(q_BHTD, k, v[0] if v else None, scale, value_size=value_size)
        q_ORD = q_BHTD[:, :, -1].reshape(B * self.kv_heads, H // self.kv_heads, D).to(self.keys_ND.dtype)
        q_ORD, keys_ND = self.place(q_ORD)
        k_OSD, v_OSE = (padded(rows, self.count_O) for rows in (keys_ND, self.values_NE(value_size)))
        score_ORS = (q_ORD @ k_OSD.mT).float() * scale
        weight_ORS = score_ORS.masked_fill(~filled(self.count_O)[:, None], -torch.inf).softmax(-1)
        if self.technique.observes:
            self.technique.see(self, flat(weight_ORS.mT, self.count_O))
        return (weight_ORS @ v_OSE.float()).reshape(B, H, 1, -1).to(q_BHTD.dtype)

    def place(self, q_ORD: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys as they meet."""
        return self.technique.place(self, q_ORD)

    def turned(self, x: Tensor, steps: Tensor) -> Tensor:
        """Keys or queries (..., D), moved on by so many positions (...)."""
        size, base = self.rotary
        still, turning = x.split((x.shape[-1] - size, size), dim=-1)
        angle = steps[..., None] * frequencies(size, base, x.device)
        return torch.cat((still, rotate(turning, (angle.cos(), angle.sin()))), dim=-1)


class PromptWeights:
    """What queries (B, H, T, D) of a prompt give its keys (B, G, T, D): again and again, some queries at a time,
    (position of the first, weights (B, G, R, queries, S))."""

    def __init__(self, q_BHTD: Tensor, k_BGSD: Tensor, scale: float):
        B, H, T, D = q_BHTD.shape
        G = k_BGSD.shape[1]
        self.q_BGRTD, self.k_BGSD, self.scale = q_BHTD.to(k_BGSD.dtype).view(B, G, H // G, T, D), k_BGSD, scale

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        for first in range(0, self.k_BGSD.shape[2], QUERIES_AT_ONCE):
            q_BGRTD = self.q_BGRTD[:, :, :, first : first + QUERIES_AT_ONCE]
            score = torch.einsum("bgrtd,bgsd->bgrts", q_BGRTD, self.k_BGSD).float() * self.scale
            future = torch.ones(score.shape[-2:], dtype=torch.bool, device=score.device).triu(1 + first)
            yield first, score.masked_fill(future, -torch.inf).softmax(-1)


def padded(rows: Tensor, count_O: Tensor) -> Tensor:
    """Rows (N, ...) of owners, `count_O` each, as (O, S, ...), filled up with other rows; a view where all have as
    many."""
    S = int(count_O.max())
    if len(rows) == len(count_O) * S:
        return rows.unflatten(0, (len(count_O), S))
    starts_O = count_O.cumsum(0) - count_O
    places_OS = starts_O[:, None] + torch.arange(S, device=rows.device)
    return rows[places_OS.clamp(max=len(rows) - 1)]


def flat(padded_OS: Tensor, count_O: Tensor) -> Tensor:
    """What `padded` was given."""
    rows, filled_OS = padded_OS.flatten(0, 1), filled(count_O)
    return rows if int(count_O.sum()) == len(rows) else rows[filled_OS.flatten().nonzero()[:, 0]]


def filled(count_O: Tensor) -> Tensor:
    """Bool (O, S): what is not padding."""
    return torch.arange(int(count_O.max()), device=count_O.device) < count_O[:, None]


def counted(mask_N: Tensor, count_O: Tensor) -> Tensor:
    """How many of each owner's rows the mask has, (O,)."""
    return (padded(mask_N, count_O) & filled(count_O)).sum(1)


def grown(held: Tensor, count_O: Tensor, new: Tensor, T: int) -> Tensor:
    """Rows of owners, `count_O` each, with T new ones at the end of each owner's."""
    new_OT = new.to(held.dtype).unflatten(0, (len(count_O), T))
    if len(held) == len(count_O) * int(count_O.max()):
        return torch.cat((padded(held, count_O), new_OT), 1).flatten(0, 1)
    both, ends_O = held.new_empty(len(held) + len(new), *held.shape[1:]), (count_O + T).cumsum(0)
    places = (ends_O[:, None] - T + torch.arange(T, device=held.device)).flatten()
    old = torch.ones(len(both), dtype=torch.bool, device=held.device).index_fill(0, places, False)
    both[old.nonzero()[:, 0]], both[places] = held, new_OT.flatten(0, 1)
    return both
