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
from collections.abc import Callable, Container
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

HERE = Path(__file__).parent
STORED = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "fp16"}  # a cache's dtypes and C++ types
FLAGS = ["-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC"]


# Building


def compiler() -> str | None:
    """The C++ compiler that torch.compile would use; None where there is none."""
    return shutil.which(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++"))


@functools.cache
def build(D: int = 0, E: int = 0, M: int = 0, cache: torch.dtype = torch.float32) -> ctypes.CDLL | None:
    """The library of layers.cpp, or of attention.cpp for key size D and value size E, with M its decode kernel; for a
    cache of that dtype.

    None where there is no compiler, and after a warning where the build fails.
    """
    if not compiler():
        return None
    values = {"D": D, "E": E, "M": M, "STORED": STORED[cache]}
    source, defines = HERE / ("attention.cpp" if D else "layers.cpp"), [f"-D{k}={v}" for k, v in values.items() if v]
    try:
        try:
            return _load(kernel_cache_dir(), source, defines)
        except (OSError, RuntimeError):  # no home, or a folder that cannot be written or that nothing may be run from
            with tempfile.TemporaryDirectory(prefix="kvfrontier-") as folder:
                return _load(Path(folder), source, defines)
    except (subprocess.CalledProcessError, OSError) as e:
        reason = (getattr(e, "stderr", None) or str(e)).strip().partition("\n")[0]
        warnings.warn(f"decode, prefill and training go without the C++ kernel, more slowly: {reason}", stacklevel=2)
        return None


def kernel_cache_dir() -> Path:
    """$XDG_CACHE_HOME/kvfrontier/kernels, else ~/.cache/kvfrontier/kernels."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvfrontier" / "kernels"


def _load(folder: Path, source: Path, defines: list[str]) -> ctypes.CDLL:
    """Builds the library unless the folder has one from the same source, flags, compiler and processor."""
    command = [compiler(), *FLAGS, *defines]
    run = partial(subprocess.run, capture_output=True, check=True, encoding="utf-8", errors="replace")
    macros = run([*command, "-dM", "-E", "-x", "c++", os.devnull]).stdout
    parts = *command, macros, source.read_text(), (HERE / "vectors.h").read_text()
    path = folder / f"{hashlib.sha256(repr(parts).encode()).hexdigest()[:24]}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as new:
            run([*command, "-o", f"{new}/new.so", str(source)])
            os.replace(f"{new}/new.so", path)  # atomic: other processes may build it, too
    return ctypes.CDLL(str(path))


# Calling


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


def usable(*tensors: Tensor, dtypes: Container[torch.dtype] = (torch.float32,)) -> bool:
    """True if a C++ kernel without a gradient can run on these tensors: of such a dtype, on a CPU, no gradient needed,
    not inside torch.compile or torch.func, and a compiler to build it with."""
    grad = torch.is_grad_enabled()
    for x in tensors:
        if not x.is_cpu or x.dtype not in dtypes or (grad and x.requires_grad):
            return False
    return not torch.compiler.is_compiling() and not is_transformed() and build() is not None


def is_transformed() -> bool:
    """True inside torch.func (grad, vmap, ...) or forward-mode differentiation, which do not know these kernels."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


# Operators

library = torch.library.Library("kvfrontier", "DEF")
Prepared = tuple  # (the result, still empty, a C function that fills it, its arguments as of `bind`)
# What runs in C++, by PyTorch's operator; None where the arguments are not supported.
PREPARE: dict[Any, Callable[..., Prepared | None]] = {}


def operator(
    schema: str, supports: Callable[..., bool] | None = None, flops: Callable[..., int] | None = None
) -> Callable[[Callable[..., Prepared]], Callable]:
    """Makes an operator of PyTorch from a function that prepares it.

    With `supports` the operator is a kernel; `flops` computes its FLOPs from its arguments, shapes in place of tensors.
    """

    def define(prepare: Callable[..., Prepared]) -> Callable:
        def run(*arguments: Any) -> Any:
            result, *call = prepare(*arguments)
            bind(*call)()
            return result

        name = schema.partition("(")[0]
        library.define(schema)
        library.impl(name, run, "CPU")
        torch.library.register_fake(f"kvfrontier::{name}", lambda *arguments: prepare(*arguments)[0], lib=library)
        registered = getattr(torch.ops.kvfrontier, name).default
        registered.supports = supports
        PREPARE[registered] = prepare
        if flops:
            register_flop_formula(registered.overloadpacket)(lambda *shapes, out_shape=None: flops(*shapes))
        return registered

    return define
