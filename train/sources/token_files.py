"""Files of token ids that were made elsewhere: nanoGPT's raw ones, and those of llm.c and modded-nanogpt with a header.

A raw file has nothing but ids, uint16, or uint32 where the vocabulary needs it. A header (llm.c, train_gpt2.c and
dev/data/data_common.py) is 256 int32: a magic number, a version and the number of tokens. The files are used where they
lie; they are read once, to check every id.
"""

import hashlib
import os
import re
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from train.batches import TrainingData
from train.corpus import SPLITS
from train.errors import InputError
from train.files import content_key
from train.progress import StudyProgress
from train.sections import Count, TokenizerConfig
from train.sources import Place, Source
from train.sources.files import Patterns, matches
from train.tokenizer import Encoding, load_tokenizer, token_bytes
from train.tokens import open_or_build

HEADER = 256  # int32
MAGICS = {20240520: np.dtype(np.uint16), 20240801: np.dtype(np.uint32)}
VERSIONS = 1, 7  # of GPT-2's tokens and of Llama 3's
BLOCK = 2**24  # tokens that are checked together


class Ids(NamedTuple):
    """The ids of a file from its byte `start` on; `size` counts all its bytes."""

    path: Path
    dtype: np.dtype
    start: int
    count: int
    size: int


class Corpus(Source):
    """`tokens`: paths or patterns, as `files` has them. A file with "train" in its name is trained on, one with "val"
    held out: its first half is `tune` and its second half `test`, or all of it is `tune` where others have "test" in
    their names. `limit_tokens` is of those to train on."""

    key: ClassVar[str] = "tokens"
    tokens: Patterns
    tokenizer: Literal["gpt2", "cl100k_base", "o200k_base", "bytes"]
    limit_tokens: Count | None = None

    def load(self, tokenizer: TokenizerConfig, place: Place) -> TrainingData:
        found = sorted({path for pattern in self.tokens for path in matches(pattern, place)})
        stats = {path: path.stat() for path in found}
        by_file = {(stat.st_dev, stat.st_ino): path for path, stat in reversed(stats.items()) if stat.st_size}
        paths = list(by_file.values())[::-1]
        splits = {path: split_of(path) for path in paths}
        if unknown := [path for path, split in splits.items() if split is None]:
            raise InputError(f"corpus: {unknown[0]} has none of train, val and test in its name; name its split so")
        for split, word in (("train", "train"), ("tune", "val")):
            if split not in splits.values():
                raise InputError(
                    f"corpus: no file of tokens has {word!r} in its name, of {len(paths)} with content; give one"
                )
        identity = [[str(path), stats[path].st_size, stats[path].st_mtime_ns, splits[path]] for path in paths]

        def build(folder: Path, *_: Any) -> dict:
            encoding = load_tokenizer(tokenizer, folder)
            files = {path: open_ids(path, encoding.n_vocab) for path in paths}
            with StudyProgress("checking tokens", sum(file.size for file in files.values())) as progress:
                return self.manifest(splits, files, encoding, progress)

        return open_or_build(self, tokenizer, identity, place, build)

    def manifest(
        self, splits: dict[Path, str], files: dict[Path, Ids], encoding: Encoding, progress: StudyProgress
    ) -> dict[str, Any]:
        segments: dict[str, list] = {split: [] for split in SPLITS}
        left, sizes, digests, text = self.limit_tokens, token_bytes(encoding), [], 0
        for n, (path, file) in enumerate(files.items()):
            if splits[path] == "train" and left is not None:
                file = file._replace(count=min(file.count, left))
                left -= file.count
            counts, digest = checked(file, encoding, progress)
            digests.append((str(path), digest))
            text += int((counts * sizes).sum())
            segments[splits[path]].append((n, file.start, file.count))
        if not segments["test"]:
            segments["tune"], segments["test"] = halves(segments["tune"], next(iter(files.values())).dtype.itemsize)
        counts = {split: sum(count for *_, count in parts) for split, parts in segments.items()}
        facts = {
            "name": "tokens",
            "fingerprint": content_key([segments, [digest for _, digest in digests]]),
            "bytes": text,
            "train_tokens": counts["train"],
            "tune_tokens": counts["tune"],
            "val_tokens": counts["test"],
            "bytes_per_token": text / max(1, sum(counts.values())),
        }
        dtype = next(iter(files.values())).dtype
        return {
            "dtype": dtype.name,
            "paths": [str(path) for path in files],
            "segments": segments,
            "facts": facts,
            "digests": digests,
        }


def split_of(path: Path) -> str | None:
    word = re.search(r"(?<![a-z])(train|val|test)", path.name.lower())  # not the one in "constrained"
    return {"train": "train", "val": "tune", "test": "test"}[word[0]] if word else None


def halves(segments: list[tuple[int, int, int]], itemsize: int) -> tuple[list, list]:
    """The segments' tokens in two halves."""
    left, parts = sum(count for *_, count in segments) // 2, ([], [])
    for n, start, count in segments:
        first = min(left, count)
        left -= first
        parts[0].append((n, start, first))
        parts[1].append((n, start + first * itemsize, count - first))
    return tuple([segment for segment in part if segment[2]] for part in parts)


def open_ids(path: Path, n_vocab: int) -> Ids:
    """Where the ids of a file are. InputError, with the place, for a header that is none of those known."""
    needed = np.dtype(np.uint16 if n_vocab <= 2**16 else np.uint32)
    size = os.path.getsize(path)
    with path.open("rb") as file:
        header = np.frombuffer(file.read(4 * HEADER), np.int32)
    if len(header) == HEADER and not header[3:].any():  # no text begins with so many zeros
        magic, version, count = header[:3].tolist()
        if magic not in MAGICS:
            known = ", ".join(f"{magic} ({dtype})" for magic, dtype in MAGICS.items())
            raise InputError(f"corpus: {path}: unknown magic number {magic} at byte 0; known are {known}")
        if version not in VERSIONS:
            raise InputError(f"corpus: {path}: unknown version {version} at byte 4; known are {VERSIONS}")
        if MAGICS[magic] != needed:
            raise InputError(f"corpus: {path} has {MAGICS[magic]} by its magic number, the vocabulary needs {needed}")
        bytes_of_ids = size - 4 * HEADER
        if bytes_of_ids != count * needed.itemsize:
            says = f"its header (byte 8) says {count:,} tokens of {needed}, and {bytes_of_ids:,} bytes follow"
            raise InputError(f"corpus: {path} is cut short or damaged: {says}")
        return Ids(path, needed, 4 * HEADER, count, size)
    if size % needed.itemsize:
        raise InputError(f"corpus: {path} has {size:,} bytes, no whole number of {needed} ids; is it cut short?")
    return Ids(path, needed, 0, size // needed.itemsize, size)


def checked(file: Ids, encoding: Encoding, progress: StudyProgress) -> tuple[np.ndarray, str]:
    """(how often each id is in the file, digest). InputError with the byte of the first id beyond the vocabulary."""
    counts, digest = np.zeros(encoding.n_vocab, np.int64), hashlib.sha256()
    ids = np.memmap(file.path, file.dtype, "r", file.start, (file.count,)) if file.count else np.zeros(0, file.dtype)
    other = f"were they made with another tokenizer than {encoding.name}, or with other numbers than {file.dtype}?"
    if file.count >= 1024 and not ids[1:1024:2].any():
        raise InputError(f"corpus: {file.path}: every second id from byte {file.start} on is 0; {other}")
    for start in range(0, file.count, BLOCK):
        block = ids[start : start + BLOCK]
        if (beyond := np.flatnonzero(block >= encoding.n_vocab)).size:
            place = file.start + (start + int(beyond[0])) * file.dtype.itemsize
            problem = f"the id {int(block[beyond[0]])} at byte {place:,} is beyond the vocabulary of {encoding.n_vocab}"
            raise InputError(f"corpus: {file.path}: {problem}; {other}")
        counts += np.bincount(block, minlength=encoding.n_vocab)
        digest.update(block)
        progress.show(file.path.name, f"{start + len(block):,} tokens", len(block) * file.dtype.itemsize)
    return counts, digest.hexdigest()
