"""A corpus as files of tokens, which every run memory-maps, and the manifest that says what they are of.

    ~/.cache/kvfrontier/tokens-0123456789abcdef/
        manifest.json            settings, files (size, time, digest), places of the tokens, facts
        tokenizer.tiktoken       of a vocabulary trained on this text
        00000.bin  00000.json    a shard (train/shards.py)

The folder's name is a hash of the settings and of the files' names, sizes and times. So a second start reads no text,
and a changed corpus is another folder. With the folder nothing else is needed: a worker gets its name.
"""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import Timeout

from train.batches import HeldOutBatches, TrainingBatches
from train.corpus import SPLITS
from train.errors import InputError
from train.files import content_key, lock, read_json, write_json
from train.progress import console
from train.sections import TokenizerConfig
from train.sources import Place, Source
from train.tokenizer import JSON, Encoding, file_of, load_tokenizer, token_bytes

FORMAT = 3  # to be raised when the same text gives other tokens
MANIFEST = "manifest.json"


class Tokens:
    """Arrays of token ids, one after the other as one."""

    def __init__(self, arrays: Sequence[np.ndarray]):
        self.arrays = arrays
        self.starts = np.cumsum([0, *map(len, arrays)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, places: slice) -> np.ndarray:
        first, last, _ = places.indices(len(self))
        n = int(self.starts.searchsorted(first, "right")) - 1
        parts = []
        while first < last:
            start, end = int(self.starts[n]), min(last, int(self.starts[n + 1]))
            parts.append(self.arrays[n][first - start : end - start])
            first, n = end, n + 1
        return parts[0] if len(parts) == 1 else np.concatenate([*parts, self.arrays[0][:0]])


@dataclass(frozen=True)
class TokenSet:
    """TrainingData of a corpus in tokens; `folder` has its manifest."""

    train: Tokens
    tune: Tokens
    test: Tokens
    tokenizer: Encoding
    facts: dict[str, Any]  # each end of text counts as a token without bytes
    folder: Path

    @property
    def n_vocab(self) -> int:
        return self.tokenizer.n_vocab

    @property
    def end_of_text(self) -> int:
        return self.tokenizer.eot_token

    @cached_property
    def token_bytes(self) -> np.ndarray:
        return token_bytes(self.tokenizer)

    def check(self, context: int) -> None:
        for split in SPLITS:
            if (tokens := len(getattr(self, split))) <= context:
                need = f"one sequence of model.context={context} and the token after it"
                has = f"the corpus has {tokens} tokens in the split {split!r}, too few for"
                raise InputError(f"{has} {need}: give more text, a higher limit or a shorter context")

    def training(self, context: int, batch_size: int, seed: int) -> TrainingBatches:
        return TrainingBatches(self.train, context, batch_size, seed)

    def held_out(self, split: str, context: int, batch_size: int, limit: int) -> HeldOutBatches:
        return HeldOutBatches(getattr(self, split), self.token_bytes, context, batch_size, limit)

    def spread(self, sequences: int, available: int) -> list[int]:
        """Numbers of `sequences` held-out sequences, evenly spread over the `available` ones."""
        return torch.linspace(0, available - 1, min(sequences, available)).long().tolist()


def default_cache_dir() -> Path:
    """$KVFRONTIER_CACHE, else $XDG_CACHE_HOME/kvfrontier, else ~/.cache/kvfrontier."""
    if path := os.environ.get("KVFRONTIER_CACHE"):
        return Path(path).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvfrontier"


# The manifest


def open_or_build(
    source: Source,
    tokenizer: TokenizerConfig,
    files: list[list],
    place: Place,
    build: Callable[[Path, Path, list], dict],
) -> TokenSet:
    """The tokens of `files`, each [name, size, modified, split]. If they are not there yet, `build` writes them and
    returns the rest of their manifest: dtype, paths, segments and facts. It gets the folder to write to and, of the
    last pass with these settings, the folder and the files as they were. Several processes may call this at once: one
    builds, the others wait for it."""
    cache, of_others = default_cache_dir(), file_of(tokenizer) == JSON
    asked = {"format": FORMAT, "corpus": source.model_dump(), "tokenizer": tokenizer.model_dump()}
    if of_others:
        path = place.find(tokenizer.name, "tokenizer")
        asked["tokenizer_file"] = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest = asked | {"files": files}
    folder = cache / f"tokens-{content_key(manifest)}"
    if tokens := open_tokens(folder):
        return tokens
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"cannot make the cache folder {folder} ({e.strerror}); set KVFRONTIER_CACHE") from e
    try:
        held = lock(folder).acquire()
    except Timeout:
        console.print("another process prepares the same text; waiting for it", markup=False)
        held = lock(folder, wait=-1).acquire()
    with held:
        if tokens := open_tokens(folder):
            return tokens
        latest = cache / f"latest-{content_key([asked, *map(str, place.folders)])}.json"
        last = {"files": [], "folder": folder.name} | read_json(latest)
        if changed := changed_files(last["files"], files):
            console.print(f"corpus: {changed}; the text from there on is read again", markup=False, soft_wrap=True)
        for path in folder.glob("*.tmp"):  # of a process that was killed
            path.unlink()
        try:
            if of_others:
                shutil.copyfile(path, folder / JSON)
            about = build(folder, cache / last["folder"], last["files"])
            write_json(folder / MANIFEST, manifest | about)
        except OSError as e:
            advice = "make room there or set KVFRONTIER_CACHE; what was written is kept"
            raise InputError(f"cannot write tokens to {folder}: {e.strerror or e}; {advice}") from None
        finally:
            if any(folder.glob("[0-9]*.json")) or (folder / MANIFEST).exists():
                with contextlib.suppress(OSError):
                    write_json(latest, {"files": files, "folder": folder.name})
    if not (tokens := open_tokens(folder)):
        raise InputError("corpus: a file was changed while it was read; give the same command again")
    return tokens


def open_tokens(folder: Path) -> TokenSet | None:
    """The tokens that a folder has the manifest of, without a look at any text; None if they are not all there."""
    manifest = read_json(folder / MANIFEST)
    try:
        changes = {name: (size, modified) for name, size, modified, *_ in manifest["files"]}
        for name in changes.keys() & set(manifest["paths"]):  # tokens that lie elsewhere
            if changes[name] != (os.stat(name).st_size, os.stat(name).st_mtime_ns):
                return None
        dtype, splits = np.dtype(manifest["dtype"]), []
        paths = [folder / path for path in manifest["paths"]]
        files = [np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8) for path in paths]
        for split in SPLITS:
            segments = manifest["segments"][split]  # [number of its path, first byte, tokens]
            arrays = [files[n][at : at + count * dtype.itemsize].view(dtype) for n, at, count in segments]
            splits.append(Tokens([np.zeros(0, dtype), *arrays]))
            if len(splits[-1]) != sum(count for *_, count in segments):
                return None
        facts, settings = manifest["facts"], TokenizerConfig(**manifest["tokenizer"])
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None
    if (file := file_of(settings)) and not (folder / file).is_file():
        return None
    return TokenSet(*splits, load_tokenizer(settings, folder), facts, folder)


def changed_files(old: list, new: list) -> str:
    """What has changed between two lists of files, in words; empty without an old list."""
    before, after = ({file[0]: file[1:] for file in files} for files in (old, new))
    kinds = {
        "changed": [name for name in after if name in before and before[name] != after[name]],
        "new": [name for name in after if name not in before],
        "gone": [name for name in before if name not in after],
    }
    words = [
        f"{names[0]}{f' and {len(names) - 1} more' * (len(names) > 1)}: {kind}"
        for kind, names in kinds.items()
        if names
    ]
    return "; ".join(words) if before else ""
