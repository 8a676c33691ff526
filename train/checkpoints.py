"""Atomic, checksummed checkpoints of a run; the last two are kept.

A checkpoint's name has its step and the start of its content's SHA-256, `step-000120-<hash>.ckpt`, so that a kill, a
full disk or a flipped bit costs at most the newest one. Only tensors and plain values are ever unpickled.
"""

import hashlib
import io
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from train.files import write_atomic

KEPT = 2
WEIGHTS = "seen", "state_dict", "pytorch-lightning_version"  # what is kept of a finished run
NAME = re.compile(r"step-\d+-[0-9a-f]{16}")


def checkpoint_path(directory: Path, step: int) -> Path:
    """The path to give to `Trainer.save_checkpoint`; `write_checkpoint` adds the hash to the name."""
    return directory / "checkpoints" / f"step-{step:06}.ckpt"


def checkpoints(directory: Path) -> list[Path]:
    """The checkpoints in a run's directory, newest first."""
    paths = [path for path in (directory / "checkpoints").glob("step-*.ckpt") if NAME.fullmatch(path.stem)]
    return sorted(paths, key=lambda path: int(path.stem.split("-")[1]), reverse=True)


def newest_whole(directory: Path, say: Callable[[str], object]) -> tuple[Path, dict] | None:
    """(path, content) of the newest checkpoint that is whole, or None; `say` gets a line about each damaged one."""
    for path in checkpoints(directory):
        try:
            with path.open("rb") as f:
                if _digest(f) != path.stem.split("-")[2]:
                    raise ValueError("its content is not what was written")
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            if not isinstance(content, dict) or not {"seen", "state_dict"} <= content.keys():
                raise ValueError("it is no checkpoint of a run's")
            return path, content
        except (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError) as e:
            say(f"{path} is damaged and not used: {str(e).splitlines()[0] if str(e) else type(e).__name__}")
    return None


def keep_weights(directory: Path) -> None:
    """Leaves the weights alone, a third of one checkpoint, where a run is finished."""
    if newest := newest_whole(directory, lambda line: None):
        path, content = newest
        content = {key: value for key, value in content.items() if key in WEIGHTS}
        write_checkpoint(content, path.with_name(f"{path.stem.rpartition('-')[0]}.ckpt"), kept=1)


def _digest(content: BinaryIO) -> str:
    content.seek(0)
    return hashlib.file_digest(content, "sha256").hexdigest()[:16]


def write_checkpoint(checkpoint: dict[str, Any], path: Path, kept: int = KEPT) -> None:
    """Writes to a path from `checkpoint_path`, and keeps as many of the run's. OSError if that fails."""
    content = io.BytesIO()  # if torch itself writes to a full disk, the process can end
    torch.save(checkpoint, content)
    new = path.with_name(f"{path.stem}-{_digest(content)}.ckpt")
    write_atomic(new, content.getbuffer())
    others = [other for other in checkpoints(path.parent.parent) if other != new]
    for old in [*others[kept - 1 :], *path.parent.glob("*.tmp")]:  # a kill leaves .tmp files
        old.unlink(missing_ok=True)
