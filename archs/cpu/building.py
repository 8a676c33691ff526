"""Operators in C++ for what torch is slow at on a CPU: how they are built and called, and when.

Attention of one new token over a static cache: torch's kernel computes and waits for memory by turns, ours fetches
ahead (attention.cpp says how). Of a prompt, and its gradients: torch's computes at half the rate of a matrix product
or less. Products of few rows with a weight matrix: torch's takes twice as long as reading it; of many on an AMD, whose
units MKL leaves idle for a tenth of the time. Norms, gates, rotary positions, retention's decay, cross-entropy: several
passes in torch, or operators that take longer to start than to run. And a read of memory, the roof. A build takes a
second or two and is kept in the user's cache folder; without a compiler, torch's take over.
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
from torch.autograd.function import once_differentiable

HERE = Path(__file__).parent
FLAGS = ["-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC"]


def compiler() -> str | None:
    """The C++ compiler, the one that torch.compile looks for; None where there is none."""
    return shutil.which(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++"))


@functools.cache
def build(D: int = 0, E: int = 0, M: int = 0) -> ctypes.CDLL | None:
    """attention.cpp, of a prompt or with M of one token, or without sizes layers.cpp.

    None after a warning where that fails, and without one where there is no compiler.
    """
    if not compiler():
        return None
    sizes = [f"-D{name}={value}" for name, value in (("D", D), ("E", E), ("M", M)) if value]
    source = HERE / ("attention.cpp" if sizes else "layers.cpp")
    try:
        try:
            built = _load(kept(), source, sizes)
        except (OSError, RuntimeError):  # no home, a folder that cannot be written, or nothing run from
            with tempfile.TemporaryDirectory(prefix="kvfrontier-") as folder:
                built = _load(Path(folder), source, sizes)
    except (subprocess.CalledProcessError, OSError) as e:
        said = e.stderr.decode(errors="replace") if isinstance(e, subprocess.CalledProcessError) else str(e)
        reason = (said.strip().splitlines() or ["no message"])[0]
        warnings.warn(f"decode, prefill and training go without the C++ kernel, more slowly: {reason}", stacklevel=2)
        return None
    if not D:
        built.take.errcheck = built.cross_entropy.errcheck = _all_there
        built.read_all.restype = ctypes.c_float
    return built


def kept() -> Path:
    """Where libraries stay that were built: $XDG_CACHE_HOME/kvfrontier/kernels, else ~/.cache/kvfrontier/kernels."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvfrontier" / "kernels"


def _load(folder: Path, source: Path, sizes: list[str]) -> ctypes.CDLL:
    """Built, unless the folder has one of the same source, flags, compiler and processor."""
    command = [compiler(), *FLAGS, *sizes]
    macros = subprocess.run([*command, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, check=True).stdout
    sources = source.read_bytes(), (HERE / "vectors.h").read_bytes()
    key = hashlib.sha256(b"\0".join((macros, " ".join(command).encode(), *sources))).hexdigest()[:24]
    path = folder / f"{key}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as new:
            subprocess.run([*command, "-o", f"{new}/new.so", str(source)], capture_output=True, check=True)
            os.replace(f"{new}/new.so", path)  # whole, whoever else builds it
    return ctypes.CDLL(str(path))


def _all_there(missing: int, *call: Any) -> None:
    if missing:
        raise IndexError(f"{missing} of the numbers are out of range")


def bound(function: Callable, *arguments: Tensor | float | None) -> Callable[[], Any]:
    """A call of a function in C: tensors by address (keep them), whole numbers as long, others as float."""

    def in_c(x: Tensor | float | None) -> Any:
        if x is None or isinstance(x, Tensor):
            return ctypes.c_void_p(None if x is None else x.data_ptr())
        return ctypes.c_float(x) if isinstance(x, float) else ctypes.c_long(x)

    return partial(function, *map(in_c, arguments))


def threads(work: int) -> int:
    """Of torch's threads as many as have 2^15 numbers each to go through, as for torch's own operators.

    One that has less wakes up for longer than it works, and where another program has its core all wait for it.
    """
    return max(1, min(torch.get_num_threads(), work >> 15))


def takes(*tensors: Tensor, learns: bool = False) -> bool:
    """Whether operators in C++ may get these: fp32 on a CPU, and a compiler to build them.

    No gradient is wanted either, unless there is one (`learns`). torch.compile makes its own, torch.func needs torch's.
    """
    grad = torch.is_grad_enabled() and not learns
    for x in tensors:
        if not x.is_cpu or x.dtype != torch.float32 or (grad and x.requires_grad):
            return False
    return not torch.compiler.is_compiling() and not transformed() and build() is not None


def transformed() -> bool:
    """Whether torch.func (grad, vmap, ...) or forward-mode differentiation is at work: neither knows our operators."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


library = torch.library.Library("kvfrontier", "DEF")
Prepared = tuple[Any, Callable[[], object]]
PREPARE: dict[Any, Callable[..., Prepared]] = {}


def operator(schema: str) -> Callable[[Callable[..., Prepared]], Callable]:
    """Makes an operator of torch's, seen by what counts operators, of what returns its result and a call that fills it.

    The call goes by addresses: a step that is recorded (graph.py) keeps it, and all that it was prepared with.
    """

    def define(prepare: Callable[..., Prepared]) -> Callable:
        def run(*arguments: Any) -> Any:
            result, call = prepare(*arguments)
            call()
            return result

        name = schema.partition("(")[0]
        library.define(schema)
        library.impl(name, run, "CPU")
        made = getattr(torch.ops.kvfrontier, name).default
        PREPARE[made] = prepare
        return made

    return define


def learning(made: Callable, gradients: Callable, tensors: slice = slice(None)) -> Callable:
    """An operator with gradients: `gradients` gives them for that of its result, followed by its arguments.

    Of those some are `tensors`, or None, that it needs.
    """

    class Learning(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Tensor:
            kept = arguments[tensors]
            ctx.save_for_backward(*(x for x in kept if x is None or isinstance(x, Tensor)))
            ctx.others = [x for x in kept if not (x is None or isinstance(x, Tensor))]
            return made(*arguments)

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            return gradients(grad, *ctx.saved_tensors, *ctx.others)

    def run(*arguments: Any) -> Tensor:
        return Learning.apply(*arguments) if torch.is_grad_enabled() else made(*arguments)

    return run
