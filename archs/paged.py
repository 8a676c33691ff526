"""A paged cache: sequences of different lengths share one pool of blocks, which come and go with them.

A cache of `max_tokens` a sequence holds mostly room for tokens that never come. Here the storages are cut into blocks
of `block_size` tokens; a sequence has a table of the blocks that it fills, the same in every layer, and wastes less
than one (PagedAttention, vLLM, arXiv 2309.06180, section 4).

    cache = PagedCache(model, sequences=8, blocks=512, block_size=16)
    a, b = cache.admit(), cache.admit()
    model.prefill(prompt_1T, cache.batch([a]))          # likewise b, with a prompt of another length
    logits_BV = model.decode(tokens_B, cache.batch([a, b]))
    cache.free(a)                                       # its blocks serve whoever needs them next

Shapes: B sequences of a batch, G KV heads, T new tokens, N blocks of a sequence, P blocks of the pool, C tokens of a
block, D size of a vector.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from torch import Tensor

from archs import ops
from archs.cache import Allocator, Cache, FullCache, Ring, State
from archs.decoder import Decoder
from archs.kv import KV, View, as_wide_as


@dataclass(eq=False)
class PagedSequence:
    """`length` tokens in `blocks`, in their order; windows and states, which do not grow, have the row `row` for it."""

    row: int
    length: int = 0
    blocks: list[int] = field(default_factory=list)


class PagedCache:
    """The blocks of a model's cache and the sequences that hold them.

    `nbytes` are the bytes of all storages. Of the blocks' bytes, `used_nbytes` are in a sequence's table,
    `wasted_nbytes` of these after a last token, and `free_nbytes` in no table. What is in no table is zero.
    """

    def __init__(
        self, model: Decoder, sequences: int, blocks: int, block_size: int = 16, dtype: torch.dtype | None = None
    ):
        """For up to `sequences` at once and `blocks` x `block_size` tokens; the dtype defaults to the model's."""
        for name, value in (("sequences", sequences), ("blocks", blocks), ("block_size", block_size)):
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        self.device, dtype = model.embed.weight.device, dtype or model.embed.weight.dtype
        rows = Allocator(sequences, blocks * block_size, dtype, self.device)
        pool = Allocator(blocks, block_size, dtype, self.device)
        self.storages = model.new_layers(SimpleNamespace(full=pool.full, ring=rows.ring, state=rows.state))
        self.nbytes, self.block_size, self.block_count = Cache(self.storages, 1, 1).nbytes, block_size, blocks
        full = dict.fromkeys(layer for layer in self.storages if type(layer) is FullCache)
        self.token_nbytes = sum(tensor[0, :, 0].nbytes for layer in full for tensor in layer.tensors)
        own = f"{type(model).__name__} computes attention itself, and not on tokens in blocks"
        self.refusal = own if model.attends_itself else None
        self.free_blocks, self.free_rows = list(range(blocks))[::-1], list(range(sequences))[::-1]
        self.sequences: list[PagedSequence] = []

    def admit(self) -> PagedSequence:
        """A new sequence without tokens. ValueError if there are as many as the cache was made for."""
        if not self.free_rows:
            n = len(self.sequences)
            raise ValueError(f"all {n} sequences are there; free one, or make the cache with sequences={n + 1}")
        self.sequences.append(PagedSequence(self.free_rows.pop()))
        return self.sequences[-1]

    def free(self, sequence: PagedSequence) -> None:
        """Clears the sequence and ends it. ValueError if it is not one of this cache's."""
        self.check([sequence])
        self.clear(sequence)
        self.sequences.remove(sequence)
        self.free_rows.append(sequence.row)

    def clear(self, sequence: PagedSequence) -> None:
        """Drops its tokens and returns its blocks."""
        for layer in self.storages:
            rows = sequence.blocks if type(layer) is FullCache else sequence.row
            for tensor in [layer.state] if isinstance(layer, State) else layer.tensors:
                tensor[rows] = 0  # slots after a last token have no weight, but NaN times zero is NaN
        self.free_blocks += sequence.blocks[::-1]
        sequence.blocks, sequence.length = [], 0

    def batch(self, sequences: Sequence[PagedSequence]) -> "PagedBatch":
        """A cache of these for `model.prefill` (one, or several of equal length) and `model.decode` (any)."""
        self.check(sequences)
        if self.refusal:
            raise ValueError(self.refusal)
        return PagedBatch(self, sequences)

    def check(self, sequences: Sequence[PagedSequence]) -> None:
        if not sequences:
            raise ValueError("a batch of no sequences")
        if not all(sequence in self.sequences for sequence in sequences):
            raise ValueError("a sequence is not in this cache; it was freed, or is another cache's")
        if len(set(sequences)) < len(sequences):
            raise ValueError("a sequence is twice in the batch")

    def allocate(self, sequences: Sequence[PagedSequence], tokens: int) -> None:
        """Gives each the blocks for more tokens. ValueError if there are too few, and then nobody gets any."""
        needed = [max(0, -(-(s.length + tokens) // self.block_size) - len(s.blocks)) for s in sequences]
        if (lacking := sum(needed) - len(self.free_blocks)) > 0:
            raise ValueError(
                f"{sum(needed)} blocks of {self.block_size} tokens are needed and {len(self.free_blocks)} of "
                f"{self.block_count} are free; free a sequence, or use blocks={self.block_count + lacking}"
            )
        for sequence, count in zip(sequences, needed, strict=True):
            sequence.blocks += [self.free_blocks.pop() for _ in range(count)]

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
    """A cache of some of a PagedCache's sequences. `length` is a tensor (B, 1, 1) where they differ in length."""

    static = False

    def __init__(self, cache: PagedCache, sequences: Sequence[PagedSequence]):
        self.cache, self.sequences, self.batch_size, self.layers = cache, list(sequences), len(sequences), []

    @property
    def length(self) -> int | Tensor:
        lengths = [sequence.length for sequence in self.sequences]  # they may have grown in other batches
        return lengths[0] if len(set(lengths)) == 1 else torch.tensor(lengths, device=self.cache.device)[:, None, None]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole PagedCache."""
        return self.cache.nbytes

    def begin(self, tokens_BT: Tensor) -> None:
        """Also allocates the blocks."""
        T, device = tokens_BT.shape[1], self.cache.device
        self.cache.check(self.sequences)
        if len(tokens_BT) != self.batch_size or T < 1:
            super().begin(tokens_BT)  # raises
        if T > 1 and isinstance(self.length, Tensor):
            raise ValueError("sequences of different lengths take one token at a time; prefill them one by one")
        self.cache.allocate(self.sequences, T)
        most = max(len(s.blocks) for s in self.sequences)
        # Padded with a block of the same sequence: its numbers are finite, and no token sees them.
        table_BN = torch.tensor([s.blocks + s.blocks[:1] * (most - len(s.blocks)) for s in self.sequences]).to(device)
        self.row_B, length_B = torch.tensor([(s.row, s.length) for s in self.sequences]).to(device).unbind(1)
        # A window is one block, that comes round; a state is copied back by `advance`.
        tables = {FullCache: table_BN, Ring: self.row_B[:, None]}
        layers = {
            s: State(s.state[self.row_B]) if isinstance(s, State) else Blocks(s, tables[type(s)], length_B)
            for s in self.cache.storages
        }
        self.layers = [layers[s] for s in self.cache.storages]

    def advance(self, tokens: int) -> None:
        for storage, layer in zip(self.cache.storages, self.layers, strict=True):
            if isinstance(storage, State):
                storage.state[self.row_B] = layer.state
        for sequence in self.sequences:
            sequence.length += tokens

    def reset(self) -> None:
        for sequence in self.sequences:
            self.cache.clear(sequence)


class Blocks(KV):
    """Token t of a sequence is in block t // C mod N of its row in `table_BN`, in tensors (P, G, C, D)."""

    def __init__(self, storage: FullCache, table_BN: Tensor, length_B: Tensor):
        self.tensors, self.value_size = storage.tensors, storage.value_size
        self.table_BN, self.length_B = table_BN, length_B
        self.block_size = self.tensors[0].shape[2]
        self.room = self.block_size * table_BN.shape[1]
        self.window = self.room if isinstance(storage, Ring) else 0

    def write(self, start: int | Tensor, *new_BGTD: Tensor | None) -> View:
        """A prompt attends to copies of all that is held; one token of each sequence reads the blocks."""
        new = [x.to(tensor.dtype) for x, tensor in zip(new_BGTD, self.tensors, strict=False)]
        T, device = new[0].shape[2], self.length_B.device
        position_B, (k, *v) = self.length_B.clamp(max=self.room - 1), self.tensors
        if T > 1:
            seen = torch.arange(max(0, start - self.window + 1) if self.window else 0, start, device=device)
            block, slot = self.places(seen.expand(len(self.table_BN), -1))
            pairs = zip(self.tensors, new, strict=True)
            position_B, (k, *v) = None, [torch.cat((t[block, :, slot].transpose(1, 2), x), 2) for t, x in pairs]
        last = torch.arange(max(0, T - self.room), T, device=device)
        block, slot = self.places(self.length_B[:, None] + last)
        for tensor, x in zip(self.tensors, new, strict=True):
            tensor[block, :, slot] = x[:, :, last].transpose(1, 2)
        return View(k, v[0] if v else k[..., : self.value_size], self.window, position_B)

    def places(self, position_BT: Tensor) -> tuple[Tensor, Tensor]:
        """The block of each token, and its slot there."""
        block_BT = position_BT // self.block_size % self.table_BN.shape[1]
        return self.table_BN.gather(1, block_BT), position_BT % self.block_size

    def attend(self, q_BHTD: Tensor, scale: float, sinks_1H11: Tensor | None = None) -> Tensor:
        k, v, _, position_B, _ = self.view
        if position_B is None:
            return super().attend(q_BHTD, scale, sinks_1H11)
        q = as_wide_as(q_BHTD, k)
        return ops.paged_attention(q, k, v, scale, position_B, self.table_BN, sinks_1H11).to(q_BHTD.dtype)
