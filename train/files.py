"""Atomic files, JSON in them, and locks that processes on one machine respect."""

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout


def write_atomic(path: Path, content: bytes | memoryview) -> None:
    """Writes a temporary file, flushes it to the disk and renames it to `path`: a reader sees the old content or the
    new, never a part. OSError if that fails; no temporary file is left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # so that the rename survives a loss of power, on systems that can do that
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_json(path: Path, content: Any) -> None:
    write_atomic(path, (json.dumps(content, indent=1) + "\n").encode())


def content_key(content: Any) -> str:
    """A hash of what JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def read_json(path: Path) -> dict:
    """The JSON object in a file; {} if the file does not exist, is cut short or holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_rows(path: Path) -> list[dict]:
    """The objects with a whole number of `tokens` in a file of JSON lines, [] without a file. Leaves out lines that a
    kill has cut short or filled with zeros."""
    rows = []
    with contextlib.suppress(OSError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("tokens"), int)]


def lock(directory: Path, wait: float = 0.5) -> FileLock:
    """The lock that a process holds while it works on `directory`, as a context; it ends with its process. Entering
    raises filelock's Timeout if another process holds it for `wait` seconds (-1: waits forever)."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(lock_path(directory), timeout=wait)


def lock_path(directory: Path) -> Path:
    return directory.with_name(f"{directory.name}.lock")


def is_locked(directory: Path) -> bool:
    """True if a process is at work on `directory`."""
    if not lock_path(directory).exists():
        return False
    try:
        with lock(directory).acquire(timeout=0):
            return False
    except Timeout:
        return True
