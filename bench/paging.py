"""Caches for sequences of different lengths: contiguous, doubling and paged; bytes held, share wasted, decode step.

    uv run python bench/paging.py
    uv run python bench/paging.py --context 2048 --batch 32 --variants "yoco kv_heads=2"

`contiguous` holds buffers of `--context` tokens for each sequence, `doubling` a buffer for each that starts at 16
tokens and is copied to one of twice the size when full, `paged C` the blocks of C tokens that the sequences fill
(archs/paged.py). Lengths are drawn, one from each of as many equal shares of a distribution as there are sequences:
uniform up to the context, and the documents of a corpus, cut at the context. Windows and states, alike in all, are not
counted.

Timed is `model.decode` of the whole batch, one token for each sequence, over zeros in place of a prompt's keys and
values. Buffers are read where they lie, and on a CPU so are blocks, by the same attention; on a GPU they are copied
together first, a few sequences at a time. That a buffer is copied when it doubles is not in the time of a step.
"""

# Before torch, whose threads it tells how to wait.
from pairs import Report, in_turns, model_of, model_parser, ratio, spread

# isort: split

import functools

import numpy as np
import torch
from torch import Tensor

from archs import Decoder
from archs.attention import attend
from archs.cache import FullCache
from archs.paged import Blocks, PagedBatch, PagedCache
from train.corpus import load_corpus
from train.tokens import default_cache_dir, prepare

STEPS = 4  # decode steps timed together
FIRST = 16  # tokens of a doubling buffer at the start
BLOCK_SIZES = 16, 64
BPE_SIZE = 1024  # of the tokenizer, as in the study `quick`


class Contiguous(Blocks):
    """One block a sequence, as long as that may become, in the order of the sequences: read in place."""

    def held(self, stream: Tensor, rows: slice, blocks: int) -> Tensor:
        return stream[rows]


class Doubling:
    """Buffers (G, room, D) for each sequence and stream."""

    def __init__(self, blocks: Blocks, lengths: list[int], context: int):
        rooms = [min(context, max(FIRST, 1 << (length - 1).bit_length())) for length in lengths]
        self.streams = [[s.new_zeros(s.shape[1], room, s.shape[3]) for room in rooms] for s in blocks.streams]
        self.nbytes = sum(buffer.nbytes for stream in self.streams for buffer in stream)

    def append(self, start: int | Tensor, *new_BG1D: Tensor) -> tuple[list["Doubling"], None]:
        self.ends = [start + 1] * len(new_BG1D[0]) if isinstance(start, int) else (start.flatten() + 1).tolist()
        for buffers, new in zip(self.streams, new_BG1D, strict=True):
            for b, end in enumerate(self.ends):
                if end > buffers[b].shape[1]:
                    buffers[b] = torch.cat((buffers[b], torch.zeros_like(buffers[b])), dim=1)
                buffers[b][:, end - 1] = new[b, :, 0]
        return [self] * len(new_BG1D), None

    def attend(self, q_BH1D: Tensor, scale: float | None, value_size: int | None) -> Tensor:
        out = []
        for q, end, *buffers in zip(q_BH1D, self.ends, *self.streams, strict=True):
            k, v = ([buffer[None, :, :end] for buffer in buffers] + [None])[:2]
            out.append(attend(q[None], k, v, scale, value_size=value_size))
        return torch.cat(out)


class Instead(PagedBatch):
    """A batch of a PagedCache with something else in place of its blocks: `made(layer, blocks)`."""

    def __init__(self, cache: PagedCache, made):
        super().__init__(cache, cache.sequences)
        self.made = made

    def check_room(self, batch_size: int, tokens: int) -> None:
        super().check_room(batch_size, tokens)
        for n, whole in enumerate(self.cache.parts):
            if isinstance(whole, FullCache):
                self.parts[n] = self.made(n, self.parts[n])


def filled(model: Decoder, lengths: list[int], block_size: int) -> PagedCache:
    """Sequences of these lengths, with zeros for keys and values and room for the steps that are timed."""
    blocks = sum(-(-(length + STEPS) // block_size) for length in lengths)
    cache = PagedCache(model, len(lengths), blocks, block_size)
    for length in lengths:
        sequence = cache.admit()
        cache.take([sequence], length)
        sequence.length = length
    return cache


def caches(model: Decoder, lengths: list[int], context: int) -> dict[str, tuple[PagedBatch, int, int]]:
    """Each cache's name: (batch, bytes held, bytes that the tokens need)."""
    whole = filled(model, lengths, context)
    needed = whole.used_nbytes - whole.wasted_nbytes
    buffers = {n: Doubling(part, lengths, context) for n, part in enumerate(whole.parts) if isinstance(part, FullCache)}

    def contiguous(layer: int, blocks: Blocks) -> Contiguous:
        return Contiguous(blocks.streams, blocks.table_BN, [sequence.length for sequence in whole.sequences])

    made = {
        "contiguous": (Instead(whole, contiguous), whole.used_nbytes),
        "doubling": (Instead(whole, lambda layer, _: buffers[layer]), sum(each.nbytes for each in buffers.values())),
    }
    for size in BLOCK_SIZES:
        paged = filled(model, lengths, size)
        made[f"paged {size}"] = paged.batch(paged.sequences), paged.used_nbytes
    return {name: (*batch_and_bytes, needed) for name, batch_and_bytes in made.items()}


def document_tokens(corpus: str, tokenizer: str) -> np.ndarray:
    """Tokens of each document of a corpus."""
    text = prepare(load_corpus(corpus), tokenizer, BPE_SIZE if tokenizer == "bpe" else None, default_cache_dir())
    ends = [np.flatnonzero(split == text.tokenizer.eot_token) for split in (text.train, text.val)]
    return np.concatenate([np.diff(each, prepend=-1) - 1 for each in ends])


@torch.inference_mode()
def main() -> None:
    defaults = {"batch": 8, "context": 8192, "repeats": 7, "corpus": "stdlib", "tokenizer": "bpe"}
    parser = model_parser(__doc__.splitlines()[0], **defaults)
    parser.set_defaults(variants=["mha", "gqa kv_heads=2", "mla kv_rank=128 rope_dim=16"])
    args = parser.parse_args()
    most = args.context - STEPS
    shares = (np.arange(args.batch) + np.random.default_rng(0).random(args.batch)) / args.batch
    lengths = {
        "uniform": shares * args.context,
        args.corpus: np.quantile(document_tokens(args.corpus, args.tokenizer), shares, method="nearest"),
    }
    columns = ["what", "MiB held", "wasted", "step ms", "of contiguous", "quartiles"]
    title = f"a decode step of {args.batch} sequences of up to {args.context} tokens, fp32"
    report = Report(title, args.json, args.device, columns)
    token = torch.zeros(args.batch, dtype=torch.int64, device=args.device)

    def decode(model: Decoder, batch: PagedBatch, start: list[int]) -> None:
        for sequence, length in zip(batch.sequences, start, strict=True):
            sequence.length = length
        for _ in range(STEPS):
            model.decode(token, batch)

    for variant in args.variants:
        model = model_of(variant, args, torch.float32)
        for name, tokens in lengths.items():
            start = [min(max(int(length), 1), most) for length in tokens]
            made = caches(model, start, args.context)
            steps = {kind: functools.partial(decode, model, batch, start) for kind, (batch, *_) in made.items()}
            times = {
                kind: [t / STEPS for t in column] for kind, column in in_turns(steps, args.device, args.repeats).items()
            }
            for kind, (_, held, needed) in made.items():
                found, low, high = ratio(times[kind], times["contiguous"])
                row = {"what": f"{variant}, {name}, {kind}", "MiB held": f"{held / 2**20:.1f}"}
                row |= {"wasted": f"{1 - needed / held:.1%}", "step ms": spread(times[kind])}
                report.add(**row, **{"of contiguous": f"{found:.2f}", "quartiles": f"{low:.2f}-{high:.2f}"})
    report.show()


if __name__ == "__main__":
    main()
