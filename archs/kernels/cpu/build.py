"""C++ kernels for a CPU: how they are built, called and made operators of PyTorch.

A build takes a second or two and stays in the user's cache folder. Without a compiler, operators run as their formulas.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

HERE = Path(__file__).parent
FLAGS = ["-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC"]


def compiler() -> str | None:
    """The C++ compiler that torch.compile would use; None where there is none."""
    return shutil.which(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++"))


@functools.cache
def build(D: int = 0, E: int = 0, M: int = 0) -> ctypes.CDLL | None:
    """The library of attention.cpp for key size D and value size E, with M the one for decode, or of layers.cpp.

    None where there is no compiler, and after a warning where the build fails.
    """
    if not compiler():
        return None
    sizes = [f"-D{name}={value}" for name, value in (("D", D), ("E", E), ("M", M)) if value]
    source = HERE / ("attention.cpp" if sizes else "layers.cpp")
    try:
        try:
            built = _load(kernel_cache_dir(), source, sizes)
        except (OSError, RuntimeError):  # no home, a folder that cannot be written, or nothing run from
            with tempfile.TemporaryDirectory(prefix="kvfrontier-") as folder:
                built = _load(Path(folder), source, sizes)
    except (subprocess.CalledProcessError, OSError) as e:
        message = e.stderr.decode(errors="replace") if isinstance(e, subprocess.CalledProcessError) else str(e)
        reason = (message.strip().splitlines() or ["no message"])[0]
        warnings.warn(f"decode, prefill and training go without the C++ kernel, more slowly: {reason}", stacklevel=2)
        return None
    if not D:
        built.take.errcheck = built.cross_entropy.errcheck = _check_indices
        built.read_all.restype = ctypes.c_float
    return built


def kernel_cache_dir() -> Path:
    """$XDG_CACHE_HOME/kvfrontier/kernels, else ~/.cache/kvfrontier/kernels."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvfrontier" / "kernels"


def _load(folder: Path, source: Path, sizes: list[str]) -> ctypes.CDLL:
    """Builds the library unless the folder has one from the same source, flags, compiler and processor."""
    command = [compiler(), *FLAGS, *sizes]
    macros = subprocess.run([*command, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, check=True).stdout
    sources = source.read_bytes(), (HERE / "vectors.h").read_bytes()
    key = hashlib.sha256(b"\0".join((macros, " ".join(command).encode(), *sources))).hexdigest()[:24]
    path = folder / f"{key}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as new:
            subprocess.run([*command, "-o", f"{new}/new.so", str(source)], capture_output=True, check=True)
            os.replace(f"{new}/new.so", path)  # atomic: other processes may build it, too
    return ctypes.CDLL(str(path))


def _check_indices(missing: int, *call: Any) -> None:
    if missing:
        raise IndexError(f"{missing} of the numbers are out of range")


def bind(function: Callable, *arguments: Tensor | float | None) -> Callable[[], Any]:
    """A call of a C function: tensors go by address (keep them alive), integers as long, other numbers as float."""

    def to_c(x: Tensor | float | None) -> Any:
        if x is None or isinstance(x, Tensor):
            return ctypes.c_void_p(None if x is None else x.data_ptr())
        return ctypes.c_float(x) if isinstance(x, float) else ctypes.c_long(x)

    return partial(function, *map(to_c, arguments))


def threads(work: int) -> int:
    """One thread for each 2^15 numbers, as in PyTorch's own operators, and at most as many as PyTorch has.

    A thread with less to do wakes up for longer than it works, and all wait for it where another program has its core.
    """
    return max(1, min(torch.get_num_threads(), work >> 15))


def usable(*tensors: Tensor) -> bool:
    """True if a C++ kernel without a gradient can run on these tensors: fp32 on a CPU, no gradient needed, not inside
    torch.compile or torch.func, and a compiler to build it with."""
    grad = torch.is_grad_enabled()
    for x in tensors:
        if not x.is_cpu or x.dtype != torch.float32 or (grad and x.requires_grad):
            return False
    return not torch.compiler.is_compiling() and not is_transformed() and build() is not None


def is_transformed() -> bool:
    """True inside torch.func (grad, vmap, ...) or forward-mode differentiation, which do not know these kernels."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


library = torch.library.Library("kvfrontier", "DEF")
Prepared = tuple[Any, Callable[[], object]]
PREPARE: dict[Any, Callable[..., Prepared]] = {}


def operator(schema: str, supports: Callable[..., bool] | None = None) -> Callable[[Callable[..., Prepared]], Callable]:
    """Makes an operator of PyTorch from a function that returns the empty result and a call that fills it.

    The call works on addresses: a recorded step (replay.py) keeps it, and everything that it was prepared with. With
    `supports` the operator is a kernel.
    """

    def define(prepare: Callable[..., Prepared]) -> Callable:
        def run(*arguments: Any) -> Any:
            result, call = prepare(*arguments)
            call()
            return result

        name = schema.partition("(")[0]
        library.define(schema)
        library.impl(name, run, "CPU")
        registered = getattr(torch.ops.kvfrontier, name).default
        registered.supports = supports
        PREPARE[registered] = prepare
        return registered

    return define
