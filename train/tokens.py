"""A corpus as token files, written once and memory-mapped by every run.

The tokens lie flat in two files, each document followed by the end of text. The name of their folder is a hash of the
corpus and the tokenizer: a changed corpus is another folder, and nothing has to be invalidated.
"""

import hashlib
import itertools
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import tiktoken
import torch

from train.batches import TrainingBatches, ValidationBatches
from train.corpus import Corpus
from train.errors import InputError
from train.tokenizer import PIECE_CHARS, load_tokenizer, pieces, token_bytes

FILES_FORMAT = 1
BATCH_PIECES = 256


@dataclass(frozen=True)
class TokenSet:
    """TrainingData of a corpus: read-only token ids of both splits and the encoding that made them."""

    train: np.memmap
    val: np.memmap
    tokenizer: tiktoken.Encoding
    corpus_name: str
    fingerprint: str
    text_bytes: int

    @property
    def n_vocab(self) -> int:
        return self.tokenizer.n_vocab

    @cached_property
    def token_bytes(self) -> np.ndarray:
        return token_bytes(self.tokenizer)

    def check(self, context: int) -> None:
        for split, tokens in (("training", len(self.train)), ("validation", len(self.val))):
            if tokens <= context:
                need = f"one sequence of model.context={context} and the token after it"
                has = f"the corpus has {tokens} {split} tokens, too few for"
                raise InputError(f"{has} {need}: give more text or a shorter context")

    def training(self, context: int, batch_size: int, seed: int) -> TrainingBatches:
        return TrainingBatches(self.train, context, batch_size, seed)

    def validation(self, context: int, batch_size: int, limit: int) -> ValidationBatches:
        return ValidationBatches(self.val, self.token_bytes, context, batch_size, limit)

    def spread(self, sequences: int, available: int) -> list[int]:
        """Numbers of `sequences` held-out sequences, evenly spread over the `available` ones."""
        return torch.linspace(0, available - 1, min(sequences, available)).long().tolist()

    @property
    def facts(self) -> dict[str, str | int | float]:
        """The "corpus" of results.json; each end of text counts as a token without bytes."""
        return {
            "name": self.corpus_name,
            "fingerprint": self.fingerprint,
            "bytes": self.text_bytes,
            "train_tokens": len(self.train),
            "val_tokens": len(self.val),
            "bytes_per_token": self.text_bytes / (len(self.train) + len(self.val)),
        }


def default_cache_dir() -> Path:
    """$KVFRONTIER_CACHE, else $XDG_CACHE_HOME/kvfrontier, else ~/.cache/kvfrontier."""
    if path := os.environ.get("KVFRONTIER_CACHE"):
        return Path(path).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvfrontier"


def prepare(corpus: Corpus, tokenizer_name: str, vocab_size: int | None, cache_dir: Path) -> TokenSet:
    """The tokens of `corpus`, encoded at the first call and read from `cache_dir` afterwards. Several processes may
    call it at once; files that were cut short are written again."""
    if not corpus.train or not corpus.val:
        raise InputError(f"corpus {corpus.name}: no documents to {'train on' if corpus.val else 'validate with'}")
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"cannot make the cache folder {cache_dir} ({e.strerror}); set KVFRONTIER_CACHE") from e
    tokenizer = load_tokenizer(tokenizer_name, vocab_size, corpus.train, cache_dir)
    identity = json.dumps([FILES_FORMAT, PIECE_CHARS, corpus.fingerprint, tokenizer.name])
    folder = cache_dir / hashlib.sha256(identity.encode()).hexdigest()[:16]
    dtype = np.dtype(np.uint16 if tokenizer.n_vocab <= 1 << 16 else np.uint32)
    while (arrays := _open(folder, dtype)) is None:
        _build(corpus, tokenizer, folder, dtype)
    return TokenSet(*arrays, tokenizer, corpus.name, corpus.fingerprint, corpus.bytes)


def _open(folder: Path, dtype: np.dtype) -> tuple[np.memmap, np.memmap] | None:
    """The token arrays (train, val) in a folder; None if they are missing or cut short."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        for part in ("train", "val"):
            if (folder / f"{part}.bin").stat().st_size != meta[f"{part}_tokens"] * dtype.itemsize:
                return None
        return tuple(np.memmap(folder / f"{part}.bin", dtype=dtype, mode="r") for part in ("train", "val"))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _build(corpus: Corpus, tokenizer: tiktoken.Encoding, folder: Path, dtype: np.dtype) -> None:
    """Encodes the corpus into a temporary folder, then renames that to `folder`."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.") as temporary:
        with suppress(FileNotFoundError):
            folder.rename(Path(temporary) / "corrupt")
        built = Path(temporary) / "built"
        built.mkdir()
        meta = {"corpus": corpus.fingerprint, "tokenizer": tokenizer.name, "dtype": dtype.name}
        for part, texts in (("train", corpus.train), ("val", corpus.val)):
            meta[f"{part}_tokens"] = _write(built / f"{part}.bin", _encoded(texts, tokenizer, dtype)) // dtype.itemsize
        _write(built / "meta.json", [json.dumps(meta, indent=2).encode()])
        try:
            built.rename(folder)
        except OSError:  # another process may have been first: the caller opens its files
            if not folder.exists():
                raise


def _write(path: Path, blocks: Iterator[bytes] | Sequence[bytes]) -> int:
    with path.open("xb") as file:
        size = sum(file.write(block) for block in blocks)
        file.flush()
        os.fsync(file.fileno())
    return size


def _encoded(texts: Sequence[str], tokenizer: tiktoken.Encoding, dtype: np.dtype) -> Iterator[bytes]:
    """The flat array in blocks of about 16 MB of text: the lists of ids are many times as large as the text."""
    parts = (part for text in texts for part in (*pieces(text), None))  # None: the document's end
    while batch := list(itertools.islice(parts, BATCH_PIECES)):
        text = [part for part in batch if part is not None]
        ids = iter(tokenizer.encode_ordinary_batch(text, num_threads=os.cpu_count() or 1))
        for part in batch:
            tokens = [tokenizer.eot_token] if part is None else next(ids)
            yield np.array(tokens, dtype=dtype).tobytes()
