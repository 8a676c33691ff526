"""From text to tokens in one pass: split, encoded on all cores, and written shard by shard.

A shard is there whole or not at all, and says where in the text it ends. A pass that was killed goes on after the last
one, to the same bytes. Memory is bounded: a shard's tokens, and some pieces of text for each core.
"""

import hashlib
import itertools
import math
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from train.corpus import SPLITS, Item, Part, Splitter
from train.errors import InputError
from train.files import content_key, read_json, write_atomic, write_json
from train.machine import cores
from train.progress import StudyProgress
from train.sections import TokenizerConfig
from train.tokenizer import RANKS, Encoding, load_tokenizer

SHARD_BYTES = 2**27  # of text; fingerprints of files that are in two shards depend on it
GROUP_CHARS, GROUP_ITEMS = 2**18, 1024  # encoded together, at most
SAMPLE_PARTS, SAMPLE_READ, SAMPLE_CHARS = 1024, 32_000_000, 8_000_000  # parts and characters for a vocabulary


def tokenise(
    title: str,
    parts: Sequence[Part],
    held_out: float,
    tokenizer: TokenizerConfig,
    folder: Path,
    last_folder: Path,
    last_files: list[list],
    limit_bytes: int | None = None,
    limit_tokens: int | None = None,
) -> dict:
    """Writes the shards of a text that are not in the folder yet, and returns the token part of the manifest. Shards of
    the last pass, whose files were `last_files`, are reused up to the first file that has changed. The pass ends with
    the document that reaches a limit (bytes of text, tokens of the split `train`)."""
    splitter = Splitter(parts, held_out)
    encoding = load_tokenizer(tokenizer, folder, lambda: sample(parts, splitter))
    limits = limit_bytes or math.inf, limit_tokens or math.inf
    pairs = zip(last_files, (part.identity for part in parts), strict=False)
    unchanged = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    reuse_shards(last_folder, folder, unchanged, splitter)
    with StudyProgress("tokenising", sum(part.size for part in parts)) as progress:
        shards = write_shards(parts, splitter, encoding, folder, progress, *limits)
    return manifest(title, parts, shards, token_type(encoding))


def sample(parts: Sequence[Part], splitter: Splitter) -> list[str]:
    """Training text for a vocabulary, about SAMPLE_CHARS characters in pieces: every k-th piece of the beginnings of
    up to SAMPLE_PARTS parts, SAMPLE_READ characters in all."""
    parts = [part for part in parts if part.split in (None, "train")]
    parts = parts[:: max(1, math.ceil(len(parts) / SAMPLE_PARTS))]
    texts: list[str] = []
    for part in parts:
        read = 0
        for item in splitter.items(part):
            texts += [item.text] if item.split == "train" else []
            read += len(item.text)
            if read >= SAMPLE_READ // len(parts):
                break
    return texts[:: max(1, math.ceil(sum(map(len, texts)) / SAMPLE_CHARS))]


def token_type(encoding: Encoding) -> np.dtype:
    return np.dtype(np.uint16 if encoding.n_vocab <= 1 << 16 else np.uint32)


class Shard:
    """Consecutive items: their tokens by split, counts, and digests of their parts."""

    def __init__(self):
        self.ids: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
        self.tokens = dict.fromkeys(SPLITS, 0)
        self.text_bytes = self.without_text = 0
        self.digests: list[tuple[int, Any]] = []  # (number of a part, hash of its items here)

    def add(self, part: int, item: Item, ids: np.ndarray) -> int:
        """Adds an item; returns the bytes of its text."""
        data = item.text.encode()
        self.text_bytes += len(data)
        if item.split:
            self.ids[item.split].append(ids)
            self.tokens[item.split] += len(ids)
        else:
            self.without_text += 1
        if not self.digests or self.digests[-1][0] != part:
            self.digests.append((part, hashlib.sha256()))
        head = f"{item.split}\0{item.begins:d}{item.ends:d}\0{len(data)}\0".encode()
        self.digests[-1][1].update(head + os.fsencode(item.document) + b"\0" + data)
        return len(data)

    def save(self, path: Path, ends: tuple[int, int], is_last: bool, many: bool) -> dict:
        """Writes the tokens to `path`, split by split, and its metadata to a .json beside it. `ends`: (part, item) that
        come next. `many`: documents are split as a whole."""
        arrays = [ids for split in SPLITS for ids in self.ids[split]]
        write_atomic(path, memoryview(np.concatenate(arrays)).cast("B") if arrays else b"")
        digests = [(part, digest.hexdigest()) for part, digest in self.digests]
        counts = {"tokens": self.tokens, "text_bytes": self.text_bytes, "without_text": self.without_text}
        about = {"path": path.name, "ends": ends, "is_last": is_last, "many": many, **counts, "digests": digests}
        write_json(path.with_suffix(".json"), about)
        return about


def whole_shards(folder: Path, dtype: np.dtype) -> list[dict]:
    """The metadata of the shards in a folder, up to the first that is missing or damaged."""
    shards: list[dict] = []
    while not shards or not shards[-1]["is_last"]:
        path = folder / f"{len(shards):05}.bin"
        about = read_json(path.with_suffix(".json"))
        if not about or not path.exists() or path.stat().st_size != sum(about["tokens"].values()) * dtype.itemsize:
            break
        shards.append(about)
    return shards


def reuse_shards(last: Path, folder: Path, unchanged: int, splitter: Splitter) -> None:
    """Links shards of another folder that hold only the first `unchanged` parts, if both have the same vocabulary."""
    ranks = [(where / RANKS).read_bytes() if (where / RANKS).exists() else None for where in (last, folder)]
    if last == folder or ranks[0] != ranks[1]:
        return
    for path in sorted(last.glob("*.bin")):
        about = read_json(path.with_suffix(".json"))
        kept = about and about["many"] == splitter.many and about["ends"][0] < unchanged and not about["is_last"]
        if not kept:
            return
        if (folder / path.name).with_suffix(".json").exists():
            continue
        (folder / path.name).unlink(missing_ok=True)
        try:
            os.link(path, folder / path.name)
        except OSError:  # a file system without links
            shutil.copyfile(path, folder / path.name)
        write_json((folder / path.name).with_suffix(".json"), about)


def write_shards(
    parts: Sequence[Part],
    splitter: Splitter,
    encoding: Encoding,
    folder: Path,
    progress: StudyProgress,
    most_text: float,
    most_tokens: float,
) -> list[dict]:
    """Writes the missing shards and returns the metadata of all of them."""
    shards = whole_shards(folder, token_type(encoding))
    ends, is_last = (tuple(shards[-1]["ends"]), shards[-1]["is_last"]) if shards else ((0, 0), False)
    text, trained_on = (sum(about["text_bytes"] for about in shards), sum(about["tokens"]["train"] for about in shards))
    show = progress_of(parts, ends[0], progress)
    shard = Shard()
    for n, k, item, ids in [] if is_last else encoded(items(parts, splitter, *ends), encoding):
        if item.is_first and (text >= most_text or trained_on >= most_tokens):
            break
        text += shard.add(n, item, ids)
        ends = n, k + 1
        trained_on += len(ids) if item.split == "train" else 0
        show(n, text)
        if shard.text_bytes >= SHARD_BYTES:
            shards.append(shard.save(folder / f"{len(shards):05}.bin", ends, False, splitter.many))
            shard = Shard()
    if not is_last:
        shards.append(shard.save(folder / f"{len(shards):05}.bin", ends, True, splitter.many))
    return shards


def items(parts: Sequence[Part], splitter: Splitter, part: int, item: int) -> Iterator[tuple[int, int, Item]]:
    """(number of the part, number of the item in it, item) from a place on."""
    for n in range(part, len(parts)):
        numbered = enumerate(splitter.items(parts[n]))
        for k, each in itertools.islice(numbered, item if n == part else 0, None):
            yield n, k, each


def encoded(
    numbered: Iterable[tuple[int, int, Item]], encoding: Encoding
) -> Iterator[tuple[int, int, Item, np.ndarray]]:
    """Adds to each item its token ids, with the end of text where it ends. Keeps the order."""
    dtype, end = token_type(encoding), np.array([encoding.eot_token], np.uint32)

    def encode(group: list[tuple[int, int, Item]]) -> list[np.ndarray]:
        ids = [encoding.encode_to_numpy(item.text, disallowed_special=()) for *_, item in group]
        ends = (end[: item.ends and item.split is not None] for *_, item in group)
        return [np.concatenate(pair).astype(dtype) for pair in zip(ids, ends, strict=True)]

    def results(group: list[tuple[int, int, Item]], future: Future) -> Iterator[tuple[int, int, Item, np.ndarray]]:
        return ((*place, ids) for place, ids in zip(group, future.result(), strict=True))

    with ThreadPoolExecutor(cores()) as pool:
        waiting: deque[tuple[list, Future]] = deque()
        for group in groups(numbered):
            waiting.append((group, pool.submit(encode, group)))
            if len(waiting) > 2 * cores():
                yield from results(*waiting.popleft())
        for group, future in waiting:
            yield from results(group, future)


def groups(numbered: Iterable[tuple[int, int, Item]]) -> Iterator[list[tuple[int, int, Item]]]:
    group, size = [], 0
    for each in numbered:
        group.append(each)
        size += len(each[2].text)
        if size >= GROUP_CHARS or len(group) == GROUP_ITEMS:
            yield group
            group, size = [], 0
    if group:
        yield group


def progress_of(parts: Sequence[Part], first: int, progress: StudyProgress) -> Callable[[int, int], None]:
    """A function of (number of the part, bytes of text so far) that shows how far the pass is, now and then."""
    before = list(itertools.accumulate((part.size for part in parts), initial=0))  # bytes on the disk
    progress.skip(before[first])
    shown, text, first_text, started = before[first], 0, None, time.perf_counter()

    def show(n: int, read: int) -> None:
        nonlocal shown, text, first_text
        first_text = read if first_text is None else first_text
        if read - text >= 2**20:
            text, done = read, before[n] + parts[n].done
            speed = (read - first_text) / (time.perf_counter() - started) / 2**20
            detail = f"{read >> 20:,} MiB of text  {speed:.1f} MiB/s"
            progress.show(Path(parts[n].name).name, detail, max(0, done - shown))
            shown = max(shown, done)

    return show


def manifest(title: str, parts: Sequence[Part], shards: list[dict], dtype: np.dtype) -> dict:
    """The token part of the manifest, from the metadata of all shards. InputError if they have no text."""
    text = sum(about["text_bytes"] for about in shards)
    if not text:
        some = ", ".join(part.name for part in parts[:3]) or "no file"
        raise InputError(f"corpus: empty, there is no text to train on ({some}); give files with text in them")
    segments: dict[str, list] = {split: [] for split in SPLITS}
    with_tokens = [about for about in shards if any(about["tokens"].values())]
    for n, about in enumerate(with_tokens):
        at = 0
        for split, count in about["tokens"].items():
            segments[split].append((n, at, count))
            at += count * dtype.itemsize
    counts = {split: sum(about["tokens"][split] for about in shards) for split in SPLITS}
    digests = [digest for about in shards for digest in about["digests"]]
    by_part = {n: [digest for _, digest in group] for n, group in itertools.groupby(digests, lambda pair: pair[0])}
    facts = {
        "name": title,
        "fingerprint": content_key([digest for _, digest in digests]),
        "bytes": text,
        "train_tokens": counts["train"],
        "tune_tokens": counts["tune"],
        "val_tokens": counts["test"],  # the name that readers of results.json know
        "bytes_per_token": text / sum(counts.values()),
        "documents_without_text": sum(about["without_text"] for about in shards),
    }
    return {
        "dtype": dtype.name,
        "paths": [about["path"] for about in with_tokens],
        "segments": segments,
        "facts": facts,
        "digests": [(parts[n].name, content_key(each)) for n, each in by_part.items()],
    }
