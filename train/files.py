"""Files that are there whole or not at all, and the records in them."""

import contextlib
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

PACKAGES = "kvfrontier", "torch", "lightning", "tiktoken", "tokenizers", "numpy"

if TYPE_CHECKING:
    import torch

    from train.plan import Run


def write_atomic(path: Path, content: bytes | memoryview) -> None:
    """Beside its place, flushed to the disk and renamed. OSError, and nothing of it left, where that can't be.

    Processes that write the same file at once do not disturb each other; the last one stands.
    """
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
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """So that a rename in it outlasts a loss of power; not all systems can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json(path: Path, content: Any) -> None:
    write_atomic(path, (json.dumps(content, indent=1) + "\n").encode())


def read_json(path: Path) -> dict:
    """The object in a file; {} where there is no such file or no whole one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_rows(path: Path) -> list[dict]:
    """The objects of a file of JSON lines; [] without a file. Lines torn or filled by a kill are left out."""
    rows = []
    with contextlib.suppress(OSError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("tokens"), int)]


def read_record(run: "Run") -> dict:
    """A run's record, {} unless it was made by this very run (by its key)."""
    record = read_json(run.directory / "record.json")
    return record if record.get("key") == run.key else {}


def is_finished(run: "Run") -> bool:
    """Whether it is trained, or has shown that its learning rate is too high where that was to be found out."""
    record = read_record(run)
    return "train" in record or (run.tunes and record.get("diverged", False))


def is_evaluated(run: "Run") -> bool:
    return read_record(run).get("eval_key") == run.eval_key


def lock(directory: Path, wait: float = 0.5) -> FileLock:
    """Who trains a run, or evaluates, holds it until the process ends; Timeout where another does for `wait` seconds.

    -1 is for ever. `is_locked` may hold it for an instant.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(lock_path(directory), timeout=wait)


def lock_path(directory: Path) -> Path:
    return directory.with_name(f"{directory.name}.lock")


def is_locked(directory: Path) -> bool:
    """Whether a process is at work on a run."""
    if not lock_path(directory).exists():
        return False
    try:
        with lock(directory).acquire(timeout=0):
            return False
    except Timeout:
        return True


def device_name(device: "torch.device") -> str:
    """The model name of a GPU or of this machine's CPU."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo", encoding="utf-8") as f:
        return next(line.partition(":")[2].strip() for line in f if line.startswith("model name"))
    return device.type


def describe_machine() -> dict:
    """{machine, versions}: what a measurement was made on and with."""
    import torch

    cuda = torch.cuda.is_available()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    machine = {
        "device": device_name(torch.device("cuda" if cuda else "cpu")),
        "cpu": device_name(torch.device("cpu")),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "system": f"{platform.system()} {platform.machine()}",
    }
    versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"machine": machine, "versions": versions}
