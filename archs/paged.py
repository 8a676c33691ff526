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

import torch
from torch import Tensor

from archs import ops
from archs.cache import Cache, FullCache, Ring, State, Static
from archs.decoder import Decoder
from archs.kv import KV, View


@dataclass(eq=False)
class PagedSequence:
    """`length` tokens in `blocks`, in their order; windows and states, which do not grow, have the row `row` for it."""

    row: int
    length: int = 0
    blocks: list[int] = field(default_factory=list)


class Pool(Static):
    """Makes storages in which full caches have blocks of tokens, and windows and states a row for each sequence."""

    def __init__(self, sequences: int, blocks: int, block_size: int, dtype: torch.dtype, device: torch.device):
        super().__init__(sequences, blocks * block_size, dtype, device)
        self.blocks = Static(blocks, block_size, dtype, device)

    def full(self, *sizes: int | None, **options: bool) -> FullCache:
        return self.blocks.full(*sizes, **options)


class PagedCache:
    """The blocks of a model's cache and the sequences that hold them.

    `nbytes` are the bytes of all storages. Of the blocks' bytes, `used_nbytes` are in a sequence's table,
    `wasted_nbytes` of these after a last token, and `free_nbytes` in no table.
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
        """For up to `sequences` at once and `blocks` x `block_size` tokens; dtype and device default to the model's."""
        for name, value in (("sequences", sequences), ("blocks", blocks), ("block_size", block_size)):
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        weight = model.embed.weight
        self.device = torch.device(device or weight.device)
        pool = Pool(sequences, blocks, block_size, dtype or weight.dtype, self.device)
        self.storages = Cache(model.new_layers(pool), blocks, block_size)
        self.block_size, self.block_count = block_size, blocks
        self.free_blocks, self.free_rows = list(range(blocks))[::-1], list(range(sequences))[::-1]
        self.sequences: list[PagedSequence] = []

    # Sequences

    def admit(self) -> PagedSequence:
        """A new sequence without tokens. ValueError if there are as many as the cache was made for."""
        if not self.free_rows:
            held = len(self.sequences)
            raise ValueError(f"all {held} sequences are there; free one, or make the cache with sequences={held + 1}")
        self.sequences.append(PagedSequence(self.free_rows.pop()))
        self.clear(self.sequences[-1])
        return self.sequences[-1]

    def clear(self, sequence: PagedSequence) -> None:
        """Drops its tokens and returns its blocks."""
        self.free_blocks += sequence.blocks[::-1]
        sequence.blocks, sequence.length = [], 0
        for layer in self.storages.layers:
            if isinstance(layer, State):
                layer.state[sequence.row] = 0
            elif isinstance(layer, Ring):
                _empty(layer, [sequence.row])

    def free(self, sequence: PagedSequence) -> None:
        """Clears the sequence and ends it. ValueError if it is not one of this cache's."""
        self.check([sequence])
        self.clear(sequence)
        self.sequences.remove(sequence)
        self.free_rows.append(sequence.row)

    def batch(self, sequences: Sequence[PagedSequence]) -> "PagedBatch":
        """A cache of these for `model.prefill` (one, or several of equal length) and `model.decode` (any)."""
        self.check(sequences)
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
        if sum(needed) > len(self.free_blocks):
            raise ValueError(
                f"{sum(needed)} blocks of {self.block_size} tokens are wanted ({tokens} more tokens for each of "
                f"{len(sequences)} sequences) and {len(self.free_blocks)} of {self.block_count} are free; free a "
                f"sequence, or make the cache with blocks={self.block_count + sum(needed) - len(self.free_blocks)}"
            )
        for sequence, count in zip(sequences, needed, strict=True):
            new = [self.free_blocks.pop() for _ in range(count)]
            sequence.blocks += new
            for layer in self.storages.layers if new else ():
                if type(layer) is FullCache:  # slots after the last token have no weight, but NaN times zero is NaN
                    _empty(layer, new)

    # What it holds

    @property
    def nbytes(self) -> int:
        return self.storages.nbytes

    @property
    def token_nbytes(self) -> int:
        """Bytes of one token in all layers."""
        full = dict.fromkeys(layer for layer in self.storages.layers if type(layer) is FullCache)
        return sum(tensor[0, :, 0].nbytes for layer in full for tensor in layer.tensors)

    @property
    def used_nbytes(self) -> int:
        return (self.block_count - len(self.free_blocks)) * self.block_size * self.token_nbytes

    @property
    def wasted_nbytes(self) -> int:
        return self.used_nbytes - sum(sequence.length for sequence in self.sequences) * self.token_nbytes

    @property
    def free_nbytes(self) -> int:
        return len(self.free_blocks) * self.block_size * self.token_nbytes


def _empty(layer: FullCache, rows: list[int]) -> None:
    for tensor in layer.tensors:
        tensor[rows] = 0


class PagedBatch(Cache):
    """Some of a PagedCache's sequences, as a cache that the model can append to.

    `length` is a number where they are equally long, else a tensor (B, 1, 1).
    """

    static = False

    def __init__(self, cache: PagedCache, sequences: Sequence[PagedSequence]):
        self.cache, self.sequences = cache, list(sequences)
        super().__init__([], len(sequences), cache.block_count * cache.block_size)

    @property
    def length(self) -> int | Tensor:
        lengths = [sequence.length for sequence in self.sequences]  # they may have grown in other batches
        return lengths[0] if len(set(lengths)) == 1 else torch.tensor(lengths, device=self.cache.device)[:, None, None]

    @length.setter
    def length(self, tokens: int) -> None:
        """The sequences know."""

    @property
    def nbytes(self) -> int:
        """Bytes of the whole PagedCache."""
        return self.cache.nbytes

    def begin(self, tokens_BT: Tensor) -> None:
        """Also allocates the blocks."""
        T, device = tokens_BT.shape[1], self.cache.device
        self.cache.check(self.sequences)
        if len(tokens_BT) != self.batch_size or T < 1:
            super().begin(tokens_BT)
        if T > 1 and isinstance(self.length, Tensor):
            raise ValueError("sequences of different lengths take one token at a time; prefill them one by one")
        self.cache.allocate(self.sequences, T)
        blocks, lengths, rows = ([getattr(s, name) for s in self.sequences] for name in ("blocks", "length", "row"))
        most = max(map(len, blocks))
        # Padded with a block of the same sequence: its numbers are finite, and no token sees them.
        table_BN = torch.tensor([row + row[:1] * (most - len(row)) for row in blocks], device=device)
        row_B, length_B = torch.tensor(rows, device=device), torch.tensor(lengths, device=device)
        layers = {}
        for layer in self.cache.storages.layers:
            if isinstance(layer, State):
                layers[layer] = StateRows(layer.state, row_B)
            else:  # a ring is a table of one block, that comes round
                table = row_B[:, None] if isinstance(layer, Ring) else table_BN
                layers[layer] = Blocks(layer.tensors, layer.value_size, table, length_B, isinstance(layer, Ring))
        self.layers = [layers[layer] for layer in self.cache.storages.layers]

    def advance(self, tokens: int) -> None:
        for sequence in self.sequences:
            sequence.length += tokens

    def reset(self) -> None:
        for sequence in self.sequences:
            self.cache.clear(sequence)


class Blocks(KV):
    """Tensors (P, G, C, D) in which token t of a sequence is in block t // C mod N of its row in `table_BN`."""

    def __init__(self, tensors: list[Tensor], value_size: int, table_BN: Tensor, length_B: Tensor, window: bool):
        self.tensors, self.value_size, self.table_BN, self.length_B = tensors, value_size, table_BN, length_B
        self.window = tensors[0].shape[2] if window else 0

    def write(self, start: int | Tensor, *new_BGTD: Tensor | None) -> View | None:
        """A prompt attends to copies of all that is held; one token of each sequence reads the blocks."""
        new_BGTD = [new for new in new_BGTD if new is not None]
        T = new_BGTD[0].shape[2]
        before = range(max(0, start - self.window + 1) if self.window else 0, start) if T > 1 else range(0)
        held = [self.read(tensor, before) for tensor in self.tensors] if len(before) else []
        stay = min(T, self.window or T)
        block, slot = self.places(self.length_B[:, None] + torch.arange(T - stay, T, device=self.length_B.device))
        for tensor, new in zip(self.tensors, new_BGTD, strict=True):
            tensor[block, :, slot] = new[:, :, T - stay :].transpose(1, 2).to(tensor.dtype)
        if T == 1:
            return None
        new = [x.to(tensor.dtype) for x, tensor in zip(new_BGTD, self.tensors, strict=True)]
        k, *v = [torch.cat(pair, 2) for pair in zip(held, new, strict=True)] if held else new
        return View(k, v[0] if v else k[..., : self.value_size], self.window)

    def attend(self, q_BHTD: Tensor, scale: float) -> Tensor:
        if self.view is not None:
            return super().attend(q_BHTD, scale)
        k, *v = self.tensors
        last = self.table_BN.shape[1] * k.shape[2] - 1
        q, position_B = q_BHTD.to(k.dtype), self.length_B.clamp(max=last)
        v = v[0] if v else k[..., : self.value_size]
        return ops.paged_attention(q, k, v, scale, position_B, self.table_BN).to(q_BHTD.dtype)

    @property
    def dense(self) -> Tensor | None:
        return None if self.view is None else self.view.k

    def read(self, tensor_PGCD: Tensor, positions: range) -> Tensor:
        """A copy (B, G, tokens, D)."""
        at = torch.tensor(positions, device=self.table_BN.device).expand(len(self.table_BN), -1)
        block, slot = self.places(at)
        return tensor_PGCD[block, :, slot].transpose(1, 2)

    def places(self, position_BT: Tensor) -> tuple[Tensor, Tensor]:
        """The block and the slot in it of each token."""
        (_, N), C = self.table_BN.shape, self.tensors[0].shape[2]
        return self.table_BN.gather(1, position_BT // C % N), position_BT % C


class StateRows(State):
    """Some rows of a State."""

    def __init__(self, state: Tensor, row_B: Tensor):
        super().__init__(state)
        self.row_B = row_B

    def read(self) -> Tensor:
        return self.state[self.row_B]

    def write(self, state: Tensor) -> None:
        self.state[self.row_B] = state.to(self.state.dtype)
