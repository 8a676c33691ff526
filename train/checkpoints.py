"""Checkpoints of a run: the last two, there whole or not at all, and none believed that is not what was written.

A checkpoint's name has its step and the start of its content's SHA-256: `step-000120-<hash>.ckpt`. It is written beside
its place, flushed to the disk and renamed, so that a kill, a full disk or a flipped bit costs at most the newest one.
Nothing is ever unpickled but tensors and plain values.
"""

import hashlib
import io
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from train.files import read_record, write_atomic
from train.progress import console

if TYPE_CHECKING:
    from train.plan import Run

KEPT = 2
NAME = re.compile(r"step-\d+-[0-9a-f]{16}")


def checkpoint_path(directory: Path, step: int) -> Path:
    """What to hand to `Trainer.save_checkpoint`; the hash is put into the name when it is known."""
    return directory / "checkpoints" / f"step-{step:06}.ckpt"


def checkpoints(directory: Path) -> list[Path]:
    """Those of a run's directory, newest first."""
    found = [path for path in (directory / "checkpoints").glob("step-*.ckpt") if NAME.fullmatch(path.stem)]
    return sorted(found, key=lambda path: int(path.stem.split("-")[1]), reverse=True)


def newest_whole(directory: Path, say: Callable[[str], object]) -> tuple[Path, dict] | None:
    """The newest checkpoint that is as it was written, and what it holds; None where there is none.

    `say` gets a line on each that is damaged.
    """
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


def trained_weights(run: "Run") -> dict[str, torch.Tensor]:
    """Those of its LanguageModel at the end of its training. RuntimeError where they are missing."""
    found = newest_whole(run.directory, console.print)
    if not found or found[1]["seen"]["tokens_seen"] != read_record(run).get("train_tokens"):
        raise RuntimeError(f"its last checkpoint is missing or damaged; delete {run.directory} to train it again")
    return found[1]["state_dict"]


def _digest(content: BinaryIO) -> str:
    content.seek(0)
    return hashlib.file_digest(content, "sha256").hexdigest()[:16]


class DurableCheckpoints(TorchCheckpointIO):
    """How a Trainer writes them; `path` is one of `checkpoint_path`. OSError where that can't be."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        content = io.BytesIO()  # torch's own writing to a full disk can end the process
        torch.save(checkpoint, content)
        path, digest = Path(path), _digest(content)
        write_atomic(path.with_name(f"{path.stem}-{digest}.ckpt"), content.getbuffer())
        for old in [*checkpoints(path.parent.parent)[KEPT:], *path.parent.glob("*.tmp")]:  # left by a kill
            old.unlink(missing_ok=True)
