"""Bytes that caches of sequences of different lengths hold and waste: contiguous, doubling and paged ones.

A contiguous cache has room for `max_tokens` in every sequence. A doubling one starts with room for 16 tokens and is
copied to one of twice the size when it is full. A paged one has the blocks that its tokens fill (PagedAttention, arXiv
2309.06180). What is wasted is room without a token: what a cache holds less what its tokens need.
"""

import numpy as np
import torch

from archs import Decoder
from archs.paged import PagedCache
from eval.memory import BytesDiffer
from eval.subject import EvalContext
from train.tokens import TokenSet

FIRST = 16  # tokens that a doubling cache has room for at first
SCANNED = 2**24  # tokens of the training text that document lengths are taken from

Held = dict[tuple[str, int | None], int]  # (kind of cache, block size) -> bytes


def measure(subject: EvalContext) -> dict:
    """paging: a row for each kind of cache, {cache, block_size, held_bytes, wasted_bytes} and the facts about the
    sequences; nothing unless the study has `eval.paging`. BytesDiffer where a real cache and the formula disagree."""
    paging, model, dtype = subject.config.paging, subject.model, subject.dtype
    if paging is None:
        return {}
    documents = document_lengths(subject.data) if paging.lengths == "documents" else None
    lengths = draw_lengths(paging.sequences, paging.max_tokens, documents)
    check_formulas(model, dtype, paging.block_sizes)
    needed = sum(model.kv_stored_bytes(length, dtype) for length in lengths)
    about = {"lengths": paging.lengths, "sequences": len(lengths), "max_tokens": paging.max_tokens}
    about |= {"tokens": sum(lengths), "needed_bytes": needed}
    held = held_bytes(model, dtype, lengths, paging.max_tokens, paging.block_sizes)
    rows = [
        about | {"cache": cache, "block_size": block_size, "held_bytes": nbytes, "wasted_bytes": nbytes - needed}
        for (cache, block_size), nbytes in held.items()
    ]
    shares = ", ".join(f"{row['cache']} {row['wasted_bytes'] / row['held_bytes']:.1%}" for row in rows)
    subject.show(f"wasted: {shares}")
    return {"paging": rows}


def document_lengths(data: TokenSet) -> np.ndarray:
    """Tokens of each document at the beginning of the training text."""
    ends = np.flatnonzero(data.train[:SCANNED] == data.tokenizer.eot_token)
    return np.diff(ends, prepend=-1) - 1


def draw_lengths(sequences: int, max_tokens: int, documents: np.ndarray | None = None) -> list[int]:
    """Lengths from 1 to `max_tokens`, always the same: one from each of `sequences` equal shares of the distribution,
    which is uniform or that of `documents`, cut at `max_tokens`."""
    shares = (np.arange(sequences) + np.random.default_rng(0).random(sequences)) / sequences
    lengths = np.ceil(shares * max_tokens) if documents is None else np.quantile(documents, shares, method="nearest")
    return np.clip(lengths, 1, max_tokens).astype(int).tolist()


def held_bytes(model: Decoder, dtype: torch.dtype, lengths: list[int], max_tokens: int, block_sizes: list[int]) -> Held:
    """By formula. Windows and states do not grow: a sequence of a paged cache has them in their full size."""
    held: Held = {
        ("contiguous", None): len(lengths) * model.kv_stored_bytes(max_tokens, dtype),
        ("doubling", None): sum(model.kv_stored_bytes(doubled(length, max_tokens), dtype) for length in lengths),
    }
    for size in block_sizes:
        pool = count_blocks(lengths, size) * size
        blocks = pool * model.kv_bytes_per_token(dtype)
        held["paged", size] = blocks + len(lengths) * (model.kv_stored_bytes(pool, dtype) - blocks)
    return held


def doubled(length: int, max_tokens: int) -> int:
    """Tokens that a cache has room for when it has doubled until `length` tokens fit."""
    return min(max_tokens, max(FIRST, 1 << (length - 1).bit_length()))


def count_blocks(lengths: list[int], block_size: int) -> int:
    return sum(-(-length // block_size) for length in lengths)


@torch.inference_mode()
def check_formulas(model: Decoder, dtype: torch.dtype, block_sizes: list[int]) -> None:
    """Compares the formulas with real caches of three short sequences. BytesDiffer where they disagree."""
    longest = max(block_sizes)
    lengths, max_tokens = [1, longest, longest + 1], 2 * longest
    formula = held_bytes(model, dtype, lengths, max_tokens, block_sizes)
    rooms = [doubled(length, max_tokens) for length in lengths]
    real: Held = {
        ("contiguous", None): model.new_cache(len(lengths), max_tokens, dtype).nbytes,
        ("doubling", None): sum(model.new_cache(1, room, dtype).nbytes for room in rooms),
    }
    for size in block_sizes:
        cache = paged_cache(model, lengths, size, dtype)
        real["paged", size] = cache.nbytes
        wasted = count_blocks(lengths, size) * size - sum(lengths)
        if cache.free_nbytes or cache.wasted_nbytes != wasted * model.kv_bytes_per_token(dtype):
            raise BytesDiffer(f"blocks of {size} waste {cache.wasted_nbytes} bytes, by formula {wasted} tokens")
    if real != formula:
        raise BytesDiffer(f"caches of {lengths} tokens hold {real}; the formulas say {formula}")


def paged_cache(
    model: Decoder, lengths: list[int], block_size: int, dtype: torch.dtype | None = None, spare: int = 0
) -> PagedCache:
    """A paged cache with sequences of these lengths, of zeros, and blocks for `spare` further tokens each."""
    blocks = count_blocks([length + spare for length in lengths], block_size)
    cache = PagedCache(model, len(lengths), blocks, block_size, dtype)
    for length in lengths:
        sequence = cache.admit()
        cache.allocate([sequence], length)
        sequence.length = length
    return cache
