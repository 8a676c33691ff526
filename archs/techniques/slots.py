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

    def __init__(self, technique: "Technique", parts: list, batch_size: int, max_tokens: int):
        super().__init__(parts, batch_size, max_tokens)
        self.whole_prompt = technique.observes

    def reset(self) -> None:
        for slots in self.slots:
            slots.keep(torch.zeros_like(slots.position_N, dtype=torch.bool))
        super().reset()

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
    def notes_nbytes(self) -> int:
        """Bytes of positions, owners and scores."""
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
        return self.position_N.nbytes + self.score_N.nbytes + self.count_O.nbytes

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
        owner_N = self.owner_N
        self.free(keep_N)
        self.position_N, self.score_N = self.position_N[keep_N], self.score_N[keep_N]
        self.count_O = torch.bincount(owner_N[keep_N], minlength=len(self.count_O))

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
                self.technique.see_prompt(self, self._prompt_weights(q_BHTD, k, scale))
            return attend(q_BHTD, k, v[0] if v else None, scale, value_size=value_size)
        q_ORD = q_BHTD[:, :, -1].reshape(B * self.kv_heads, H // self.kv_heads, D).to(self.keys_ND.dtype)
        q_ORD, keys_ND = self.technique.place(self, q_ORD)
        owner_N, values_NE = self.owner_N, self.values_NE(value_size)
        score_NR = torch.einsum("nrd,nd->nr", q_ORD[owner_N], keys_ND).float() * scale
        of_owner = owner_N[:, None].expand_as(score_NR)
        top_OR = score_NR.new_full(q_ORD.shape[:2], -torch.inf).scatter_reduce(0, of_owner, score_NR, "amax")
        weight_NR = (score_NR - top_OR[owner_N]).exp()
        weight_NR = weight_NR / torch.zeros_like(top_OR).index_add(0, owner_N, weight_NR)[owner_N]
        if self.technique.observes:
            self.technique.see(self, weight_NR)
        out_ORE = values_NE.new_zeros((*top_OR.shape, values_NE.shape[-1]), dtype=torch.float32)
        out_ORE.index_add_(0, owner_N, weight_NR[:, :, None] * values_NE[:, None].float())
        return out_ORE.reshape(B, H, 1, -1).to(q_BHTD.dtype)

    def turned(self, x: Tensor, steps: Tensor) -> Tensor:
        """Keys or queries (..., D), moved on by so many positions (...)."""
        size, base = self.rotary
        still, turning = x.split((x.shape[-1] - size, size), dim=-1)
        angle = steps[..., None] * frequencies(size, base, x.device)
        return torch.cat((still, rotate(turning, (angle.cos(), angle.sin()))), dim=-1)

    def _prompt_weights(self, q_BHTD: Tensor, k_BGSD: Tensor, scale: float) -> Iterator[tuple[int, Tensor]]:
        """(position of the first query, weights (B, G, R, queries, S)), some queries at a time."""
        B, H, T, _ = q_BHTD.shape
        q = q_BHTD.to(k_BGSD.dtype).view(B, self.kv_heads, H // self.kv_heads, T, -1)
        for first in range(0, T, QUERIES_AT_ONCE):
            score = (
                torch.einsum("bgrtd,bgsd->bgrts", q[:, :, :, first : first + QUERIES_AT_ONCE], k_BGSD).float() * scale
            )
            future = torch.ones(score.shape[-2:], dtype=torch.bool, device=score.device).triu(1 + first)
            yield first, score.masked_fill(future, -torch.inf).softmax(-1)


def grown(held: Tensor, count_O: Tensor, new: Tensor, T: int) -> Tensor:
    """Rows of owners, `count_O` each, with T new ones at the end of each owner's."""
    both = held.new_empty((len(held) + len(new), *held.shape[1:]))
    owner = torch.repeat_interleave(torch.arange(len(count_O), device=count_O.device), count_O)
    both[torch.arange(len(held), device=held.device) + owner * T] = held
    ends_O = (count_O + T).cumsum(0)
    both[(ends_O[:, None] - T + torch.arange(T, device=held.device)).flatten()] = new.to(held.dtype)
    return both
