"""A paged cache: sequences of different lengths share one pool of blocks, which come and go with them.

A cache of `max_tokens` a sequence holds mostly room for tokens that never come. Here the storages are cut into blocks
of `block_size` tokens; a sequence has a table of those it fills, the same in every layer, and wastes less than one
(PagedAttention, vLLM, arXiv 2309.06180, section 4).

    cache = PagedCache(model, sequences=8, blocks=512, block_size=16)
    a, b = cache.admit(), cache.admit()
    model.prefill(prompt_1T, cache.batch([a]))          # likewise b, with a prompt of another length
    logits_BV = model.decode(tokens_B, cache.batch([a, b]))
    cache.free(a)                                       # its blocks serve whoever needs them next

Shapes: B sequences of a batch, G KV heads, T new tokens, S slots, N blocks of a sequence, P blocks of the pool,
C tokens of a block, D head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from archs.attention import attend
from archs.cache import Cache, FullCache, StateCache, with_tensors, zeros
from archs.cpu.attention import split_kv, takes_attention
from archs.decoder import Decoder

COPIED = {"cpu": 2**22}  # bytes of keys copied together at once, to be read while they are in the cores' caches


@dataclass(eq=False)
class PagedSequence:
    """`length` tokens in `blocks`, in their order; in windows and states, which do not grow, it has the place `row`."""

    row: int
    length: int = 0
    blocks: list[int] = field(default_factory=list)


class PagedCache:
    """The blocks of a model's cache and the sequences that hold them.

    `nbytes` are those of all storages. Of the blocks' bytes, `used_nbytes` are in a sequence's table, `wasted_nbytes`
    among them behind a last token, `free_nbytes` in no table.
    """

    def __init__(
        self,
        model: Decoder,
        sequences: int,
        blocks: int,
        block_size: int = 16,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        """For up to `sequences` at once and `blocks` x `block_size` tokens in all; dtype and device default to the
        model's."""
        for name, value in (("sequences", sequences), ("blocks", blocks), ("block_size", block_size)):
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        weight = model.embed.weight
        dtype, self.device = dtype or weight.dtype, torch.device(device or weight.device)
        # A block is to the model a short sequence, so that its own cache for `blocks` of them is the pool.
        pools = model.new_parts(blocks, block_size, dtype, "meta")
        constant = model.new_parts(sequences, blocks * block_size, dtype, "meta")
        parts = [pool if isinstance(pool, FullCache) else rows for pool, rows in zip(pools, constant, strict=True)]
        with torch.inference_mode(False):
            parts = with_tensors(parts, lambda t: zeros(*t.shape, dtype=t.dtype, device=self.device))
        self.storages = Cache(parts, blocks, block_size)
        self.block_size, self.block_count = block_size, blocks
        self.free_blocks, self.free_rows = list(range(blocks))[::-1], list(range(sequences))[::-1]
        self.sequences: list[PagedSequence] = []

    # Sequences

    def admit(self) -> PagedSequence:
        """A new sequence, without a token or a block. ValueError if there are as many as the cache was made for."""
        if not self.free_rows:
            held = len(self.sequences)
            raise ValueError(f"all {held} sequences are there; free one, or make the cache with sequences={held + 1}")
        self.sequences.append(PagedSequence(self.free_rows.pop()))
        self.clear(self.sequences[-1])
        return self.sequences[-1]

    def clear(self, sequence: PagedSequence) -> None:
        """Lets go of its tokens, and gives its blocks back."""
        self.free_blocks += sequence.blocks[::-1]
        sequence.blocks, sequence.length = [], 0
        for part in self.parts:
            if not isinstance(part, FullCache):
                _empty(part, [sequence.row])

    def free(self, sequence: PagedSequence) -> None:
        """Clears it and ends it. ValueError if it is not one of this cache's."""
        self.check([sequence])
        self.clear(sequence)
        self.sequences.remove(sequence)
        self.free_rows.append(sequence.row)

    def batch(self, sequences: Sequence[PagedSequence]) -> "PagedBatch":
        """These as a cache for `model.prefill` (of one, or of several of equal length) and `model.decode` (of any)."""
        self.check(sequences)
        return PagedBatch(self, sequences)

    def check(self, sequences: Sequence[PagedSequence]) -> None:
        if not sequences:
            raise ValueError("a batch of no sequences")
        if not all(sequence in self.sequences for sequence in sequences):
            raise ValueError("a sequence is not in this cache; it was freed, or is another cache's")
        if len(set(sequences)) < len(sequences):
            raise ValueError("a sequence is twice in the batch")

    def take(self, sequences: Sequence[PagedSequence], tokens: int) -> None:
        """Gives each the blocks for so many more tokens; ValueError if they are too few, and then nobody gets any."""
        wanted = [max(0, -(-(s.length + tokens) // self.block_size) - len(s.blocks)) for s in sequences]
        if sum(wanted) > len(self.free_blocks):
            raise ValueError(
                f"{sum(wanted)} blocks of {self.block_size} tokens are wanted ({tokens} more tokens for each of "
                f"{len(sequences)} sequences) and {len(self.free_blocks)} of {self.block_count} are free; free a "
                f"sequence, or make the cache with blocks={self.block_count + sum(wanted) - len(self.free_blocks)}"
            )
        taken = []
        for sequence, count in zip(sequences, wanted, strict=True):
            blocks = [self.free_blocks.pop() for _ in range(count)]
            sequence.blocks += blocks
            taken += blocks
        if taken:  # emptied, as attention gives slots behind the last token no weight, but NaN times zero is NaN
            for part in self.parts:
                if isinstance(part, FullCache):
                    _empty(part, taken)

    # What it holds

    @property
    def parts(self) -> list:
        return self.storages.parts

    @property
    def nbytes(self) -> int:
        return self.storages.nbytes

    @property
    def token_nbytes(self) -> int:
        """Of one token in all layers."""
        blocks = [stream[0, :, 0] for part in self.parts if isinstance(part, FullCache) for stream in part.streams]
        return sum(stream.nbytes for stream in blocks)

    @property
    def used_nbytes(self) -> int:
        return (self.block_count - len(self.free_blocks)) * self.block_size * self.token_nbytes

    @property
    def wasted_nbytes(self) -> int:
        return self.used_nbytes - sum(sequence.length for sequence in self.sequences) * self.token_nbytes

    @property
    def free_nbytes(self) -> int:
        return len(self.free_blocks) * self.block_size * self.token_nbytes


class PagedBatch(Cache):
    """Some of a PagedCache's sequences, as a cache that the model can append to.

    `length` is a number where they are equally long, else a tensor (B, 1, 1).
    """

    static = False

    def __init__(self, cache: PagedCache, sequences: Sequence[PagedSequence]):
        super().__init__([], len(sequences), cache.block_count * cache.block_size)
        self.cache, self.sequences = cache, list(sequences)
        self._look()

    @property
    def nbytes(self) -> int:
        """Of the whole PagedCache."""
        return self.cache.nbytes

    def check_room(self, batch_size: int, tokens: int) -> None:
        """Also takes the blocks."""
        self.cache.check(self.sequences)
        self._look()
        if batch_size != self.batch_size or tokens < 1:
            super().check_room(batch_size, tokens)
        if tokens > 1 and isinstance(self.length, Tensor):
            raise ValueError("sequences of different lengths take one token at a time; prefill them one by one")
        self.cache.take(self.sequences, tokens)
        blocks, lengths = ([getattr(s, name) for s in self.sequences] for name in ("blocks", "length"))
        most = max(map(len, blocks))
        # Filled up with a block of the same sequence: what is there is finite, and no token sees it.
        table_BN = torch.tensor([held + held[:1] * (most - len(held)) for held in blocks], device=self.cache.device)
        row_B = torch.tensor([sequence.row for sequence in self.sequences], device=self.cache.device)
        self.parts = [_part(part, table_BN, row_B, lengths) for part in self.cache.parts]

    def advance(self, tokens: int) -> None:
        for sequence in self.sequences:
            sequence.length += tokens
        self._look()

    def reset(self) -> None:
        for sequence in self.sequences:
            self.cache.clear(sequence)
        self._look()

    def _look(self) -> None:
        """The sequences may have grown in other batches."""
        lengths = [sequence.length for sequence in self.sequences]
        equal = len(set(lengths)) == 1
        self.length = lengths[0] if equal else torch.tensor(lengths, device=self.cache.device)[:, None, None]


def _part(whole, table_BN: Tensor, row_B: Tensor, lengths: list[int]) -> "Blocks | StateRows":
    """What stands for a part of the cache in a batch. A window's ring is a table of one block, that comes round."""
    if isinstance(whole, StateCache):
        return StateRows(whole.state, row_B)
    return Blocks(whole.streams, table_BN if isinstance(whole, FullCache) else row_B[:, None], lengths)


def _empty(part, places: list[int]) -> None:
    for stream in [part.state] if isinstance(part, StateCache) else part.streams:
        stream[places] = 0


class Blocks:
    """Streams (P, G, C, D) in which a batch's tokens lie as `table_BN` says, token t in its block t // C mod N.

    Stands for a part of the cache, and for the keys and values that one new token of each sequence attends to.
    """

    def __init__(self, streams: list[Tensor], table_BN: Tensor, lengths: list[int]):
        self.streams, self.table_BN, self.block_size = streams, table_BN, streams[0].shape[2]
        self.slots = table_BN.shape[1] * self.block_size
        self.ends = [min(length + 1, self.slots) for length in lengths]

    def append(self, start: int | Tensor, *new_BGTD: Tensor) -> tuple[list, None]:
        """Writes T new tokens at `start`, or one for each sequence, at its place in the tensor (B, 1, 1).

        Returns copies (B, G, start + T, D) of all that is now held; of one token itself, which then attends.
        """
        T = new_BGTD[0].shape[2]
        kept = min(T, self.slots)
        block, offset = self._places(start + T - kept, kept)
        for stream, new in zip(self.streams, new_BGTD, strict=True):
            stream[block, :, offset] = new[:, :, T - kept :].transpose(1, 2).to(stream.dtype)
        if T == 1:
            return [self] * len(new_BGTD), None
        every = slice(None)
        return [self.held(stream, every, self.table_BN.shape[1])[:, :, : start + T] for stream in self.streams], None

    def recent(self, start: int, count: int) -> list[Tensor]:
        """As of a WindowCache."""
        count = min(count, start, self.slots)
        block, offset = self._places(start - count, count)
        return [stream[block, :, offset].transpose(1, 2) for stream in self.streams]

    def attend(self, q_BH1D: Tensor, scale: float | None, value_size: int | None) -> Tensor:
        """Of one token of each sequence on all that it holds; (B, H, 1, E).

        On a CPU our kernel reads the blocks where they lie; else they are copied together, a few sequences at a time.
        """
        stream, out = self.streams[0], []
        if self.block_size % 16 == 0 or self.table_BN.shape[1] == 1:  # whole tiles of the kernel's
            k, v = stream, self.streams[1] if len(self.streams) == 2 else stream[..., :value_size]
            if takes_attention(q_BH1D, k, v):
                position_B = torch.tensor(self.ends) - 1
                return split_kv(q_BH1D, k, v, scale or q_BH1D.shape[3] ** -0.5, position_B, self.table_BN.contiguous())
        most = stream[0].nbytes * self.table_BN.shape[1]
        some = max(1, COPIED.get(q_BH1D.device.type, most * len(q_BH1D)) // most)
        for first in range(0, len(q_BH1D), some):
            rows = slice(first, first + some)
            ends, longest = self.ends[rows], max(self.ends[rows])
            blocks = -(-longest // self.block_size)
            k, *v = (self.held(stream, rows, blocks)[:, :, :longest] for stream in self.streams)
            seen = None
            if min(ends) < longest:
                end_B111 = torch.tensor(ends, device=k.device)[:, None, None, None]
                seen = torch.arange(longest, device=k.device) < end_B111
            out.append(attend(q_BH1D[rows], k, v[0] if v else None, scale, seen, value_size))
        return torch.cat(out)

    def held(self, stream_PGCD: Tensor, rows: slice, blocks: int) -> Tensor:
        """(B, G, S, D) of some of the batch: each KV head's blocks one after the other, in one copy."""
        table_BN, (P, G, C, D) = self.table_BN[rows, :blocks], stream_PGCD.shape
        index_BGN = table_BN[:, None] * G + torch.arange(G, device=table_BN.device)[:, None]
        # Along dimension 1: torch copies those on all cores.
        copied = stream_PGCD.view(1, P * G, C * D).index_select(1, index_BGN.flatten())
        return copied.view(len(table_BN), G, blocks * C, D)

    def _places(self, start: int | Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """Blocks (B, T), and slots in them, of the tokens from `start` on."""
        B, N = self.table_BN.shape
        start_B1 = start.view(B, 1) if isinstance(start, Tensor) else start
        position = start_B1 + torch.arange(tokens, device=self.table_BN.device).expand(B, -1)
        return self.table_BN.gather(1, position // self.block_size % N), position % self.block_size


class StateRows:
    """Some rows of a StateCache, read and written in place."""

    def __init__(self, state: Tensor, row_B: Tensor):
        self.whole, self.row_B = state, row_B

    @property
    def state(self) -> "StateRows":
        return self

    @property
    def dtype(self) -> torch.dtype:
        return self.whole.dtype

    def float(self) -> Tensor:
        return self.whole[self.row_B].float()

    def double(self) -> Tensor:
        return self.whole[self.row_B].double()

    def copy_(self, state_BHDD: Tensor) -> None:
        self.whole[self.row_B] = state_BHDD.to(self.whole.dtype)
