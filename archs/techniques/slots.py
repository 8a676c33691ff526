"""A layer's cache under a technique: slots that are freed one by one, as many in each KV head as the technique keeps.

Slots lie flat, those of an owner (a KV head of a sequence) together and in the order of their tokens. A slot that is
freed is no longer in the storage: nothing can read it, and `Cache.nbytes` counts what is left.

Shapes: B batch, G KV heads, H query heads, R = H / G, O = B G owners, N slots of all owners, T tokens, S slots of one
owner, D key size, E value size, V vocabulary.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from archs import ops
from archs.cache import Allocator, Cache
from archs.kv import KV, View
from archs.techniques import ragged

QUERIES_AT_ONCE = 256  # of a prompt, whose weights are observed together


class CompressedCache(Cache):
    """A cache that frees, after the prompt and after each token, the slots that the technique does not keep."""

    static = False

    def __init__(self, technique: Any, layers: list, batch_size: int, max_tokens: int, kind_V: Tensor | None):
        super().__init__(layers, batch_size, max_tokens)
        self.technique, self.observes, self.kind_V = technique, technique.observes, kind_V
        self.slots = list(dict.fromkeys(layer for layer in layers if isinstance(layer, Slots)))
        for slots in self.slots:
            slots.layer = layers.index(slots)

    def begin(self, tokens_BT: Tensor) -> None:
        """ValueError, too, where the technique's options do not fit the prompt, or for a second prompt."""
        super().begin(tokens_BT)
        if not self.length:
            self.technique.validate_prompt(tokens_BT.shape[1])
        elif tokens_BT.shape[1] > 1:
            raise ValueError("after its prompt a compressed cache takes one token at a time")
        kinds_BT = torch.zeros_like(tokens_BT) if self.kind_V is None else self.kind_V[tokens_BT]
        for slots in self.slots:
            slots.next_kinds_BT = kinds_BT

    def advance(self, tokens: int) -> None:
        for slots in self.slots:
            slots.next_kinds_BT = None
            slots.evict()
        super().advance(tokens)

    def reset(self) -> None:
        for slots in self.slots:
            slots.keep(torch.zeros_like(slots.position_N, dtype=torch.bool))
        super().reset()

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, without `metadata_nbytes`."""
        return super().nbytes - self.metadata_nbytes

    @property
    def metadata_nbytes(self) -> int:
        """Bytes of positions, kinds of tokens, counts and scores."""
        return sum(tensor.nbytes for slots in self.slots for tensor in slots.metadata)


class Slots(KV):
    """`tensors` are keys (N, D) and values (N, E), or keys alone whose first columns are the values (a latent)."""

    dense = None

    def __init__(
        self,
        technique: Any,
        o: Any,
        allocator: Allocator,
        heads: int,
        key_size: int,
        value_size: int = 0,
        shared: bool = False,
    ):
        """`o` are the model's options; the last four arguments are those of `Allocator.full`."""
        self.technique, self.rotary, self.kv_heads, self.layer = technique, (o.rotary_dim, o.rope_base), heads, 0
        self.value_size, device = value_size or key_size, allocator.device
        sizes = [key_size] if shared else [key_size, self.value_size]
        self.tensors = [torch.zeros(0, size, dtype=allocator.dtype, device=device) for size in sizes]
        self.count_O = torch.zeros(allocator.batch_size * heads, dtype=torch.long, device=device)
        self.policy_O = torch.zeros_like(self.count_O)
        self.position_N = torch.zeros(0, dtype=torch.int32, device=device)
        self.score_N = torch.zeros(0, dtype=torch.float32, device=device)
        self.kind_N = torch.zeros(0, dtype=torch.uint8, device=device)
        self.next_kinds_BT: Tensor | None = None  # of the tokens that are appended next
        self.length = 0  # tokens seen

    @property
    def keys_ND(self) -> Tensor:
        return self.tensors[0]

    @property
    def values_NE(self) -> Tensor:
        return self.tensors[1] if len(self.tensors) > 1 else self.keys_ND[:, : self.value_size]

    @property
    def full_O(self) -> Tensor:
        """How many slots of each owner `tensors` has."""
        return self.count_O

    @property
    def metadata(self) -> list[Tensor]:
        return [self.position_N, self.score_N, self.kind_N, self.count_O, self.policy_O]

    @property
    def is_prompt(self) -> bool:
        """A prompt was appended last, and not a token."""
        return self.view is not None

    # KV protocol

    def write(self, start: int, *new_BGTD: Tensor | None) -> View | None:
        """Appends a prompt, which then attends to itself, or one token for each sequence."""
        new = [x.to(self.tensors[0].dtype) for x in new_BGTD if x is not None]
        B, G, T, _ = new[0].shape
        T_O = torch.full_like(self.count_O, T)
        position_N = torch.arange(start, start + T, device=T_O.device).repeat(B * G)
        kind_N = self.next_kinds_BT.repeat_interleave(G, 0).flatten()
        pairs = zip(self.tensors, new, strict=True)
        self.tensors = [ragged.join(x, self.full_O, rows.flatten(0, 2), T_O) for x, rows in pairs]
        self.position_N = ragged.join(self.position_N, self.count_O, position_N, T_O)
        self.score_N = ragged.join(self.score_N, self.count_O, torch.zeros_like(position_N), T_O)
        self.kind_N = ragged.join(self.kind_N, self.count_O, kind_N, T_O)
        self.count_O, self.length = self.count_O + T, start + T
        if start:
            return None
        return View(new[0], new[1] if len(new) > 1 else new[0][..., : self.value_size])

    def attend(self, q_BHTD: Tensor, scale: float, sinks_1H11: Tensor | None = None) -> Tensor:
        """Attention of a prompt on itself, or of one token on all slots of its KV heads; (B, H, T, E)."""
        if self.is_prompt:
            if self.technique.observes:
                self.technique.observe_prompt(self, partial(prompt_weights, q_BHTD, self.view.k, scale, sinks_1H11))
            return super().attend(q_BHTD, scale, sinks_1H11)
        B, H, _, D = q_BHTD.shape
        q_ORD = q_BHTD.reshape(B * self.kv_heads, H // self.kv_heads, D).to(self.tensors[0].dtype)
        q_ORD, keys_ND = self.technique.positioned(self, q_ORD)
        k_OSD, v_OSE = (ragged.pad(rows, self.count_O) for rows in (keys_ND, self.values_NE))
        score_ORS = (q_ORD @ k_OSD.mT).float() * scale
        score_ORS = score_ORS.masked_fill(~ragged.mask(self.count_O)[:, None], -torch.inf)
        sinks_OR1 = None if sinks_1H11 is None else sinks_1H11.expand(B, -1, 1, 1).reshape(len(q_ORD), -1, 1)
        weight_ORS = ops.softmax(score_ORS, sinks_OR1)
        if self.technique.observes:
            self.technique.observe(self, ragged.flatten(weight_ORS.mT, self.count_O))
        return (weight_ORS @ v_OSE.float()).reshape(B, H, 1, -1).to(q_BHTD.dtype)

    def moved(self, x: Tensor, steps: Tensor) -> Tensor:
        """Keys or queries (..., D), rotated on by some positions (...)."""
        size, base = self.rotary
        still, turning = x.split((x.shape[-1] - size, size), dim=-1)
        cos, sin = ops.rope_table(steps, ops.frequencies(size, base, x.device))
        return torch.cat((still, ops.rotate(turning, cos, sin)), dim=-1)

    # Storage

    def free(self, keep_N: Tensor) -> None:
        """Frees the other slots' keys and values."""
        self.tensors = [x[keep_N] for x in self.tensors]

    def keep(self, keep_N: Tensor) -> None:
        """Frees the other slots."""
        self.free(keep_N)
        self.count_O = ragged.count(keep_N, self.count_O)
        self.position_N, self.score_N, self.kind_N = (x[keep_N] for x in (self.position_N, self.score_N, self.kind_N))

    def evict(self) -> None:
        """Frees what the technique does not keep."""
        keep_N = self.technique.select(self)
        if keep_N is not None and not keep_N.all():
            self.keep(keep_N)


def prompt_weights(
    q_BHTD: Tensor, k_BGSD: Tensor, scale: float, sinks_1H11: Tensor | None
) -> Iterator[tuple[int, Tensor]]:
    """A prompt's attention weights in pieces: (position of the first query, weights (B, G, R, queries, S))."""
    G = k_BGSD.shape[1]
    q_BGRTD = q_BHTD.to(k_BGSD.dtype).unflatten(1, (G, -1))
    sinks_1GR11 = None if sinks_1H11 is None else sinks_1H11.unflatten(1, (G, -1))
    for first in range(0, k_BGSD.shape[2], QUERIES_AT_ONCE):
        queries = q_BGRTD[:, :, :, first : first + QUERIES_AT_ONCE]
        score = torch.einsum("bgrtd,bgsd->bgrts", queries, k_BGSD).float() * scale
        future = torch.ones(score.shape[-2:], dtype=torch.bool, device=score.device).triu(1 + first)
        yield first, ops.softmax(score.masked_fill(future, -torch.inf), sinks_1GR11)
