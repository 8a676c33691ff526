"""A kernel's first use for a shape on a GPU is compared with its operator's formula, on the arguments of that use.

What is right on other GPUs may be wrong on this one. A kernel that was wrong once, or failed, is not used again in this
process: the operator goes on with its next kernel or the formula, and a warning and the records say so. Sizes count as
equal up to the next power of two, and one or two sequences are compared, which takes little time.
"""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from archs.kernels.cpu.build import is_transformed

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}  # of the largest
FEW = 4  # a position at which attention is compared as well: among few tokens each one counts
MOST_SCORES = 2**27  # of a sequence's head; of more the last queries alone are compared

WRONG: dict[Callable, str] = {}  # kernels, and what was wrong with them
_seen: set[tuple] = set()


def is_right(kernel: Callable, formula: Callable, arguments: tuple) -> bool:
    """False for a kernel that has differed from the formula, now or before. The first argument is a tensor of
    sequences, and so is the result; the last one may be overwritten."""
    if kernel in WRONG:
        return False
    if not arguments[0].is_cuda or torch.compiler.is_compiling() or is_transformed():
        return True
    trains = torch.is_grad_enabled() and arguments[0].requires_grad
    key = kernel, trains, *map(_kind, arguments)
    if key in _seen or torch.cuda.is_current_stream_capturing():
        return True
    _seen.add(key)
    try:
        with torch.autocast("cuda", enabled=False):
            error = max(_errors(kernel, formula, arguments, trains))
        if error <= max(TOLERANCE.get(getattr(x, "dtype", None), 0.0) for x in arguments):
            return True
        WRONG[kernel] = f"{kernel.__name__} was wrong by {error:.2g}"
    except torch.OutOfMemoryError:  # which says nothing of the kernel
        _seen.discard(key)
        raise
    except Exception as e:  # it does not fit on this chip, for one
        WRONG[kernel] = f"{kernel.__name__} failed: {(str(e) or type(e).__name__).splitlines()[0]}"
    warnings.warn(f"{WRONG[kernel]} (on this GPU, which goes without it; please report it)", stacklevel=3)
    return False


def _kind(x: Any) -> Any:
    return (x.dtype, *(1 << (n - 1).bit_length() for n in x.shape)) if isinstance(x, Tensor) else x


def _errors(kernel: Callable, formula: Callable, arguments: tuple, trains: bool) -> Iterator[float]:
    """The largest differences, as shares of the largest number; of gradients as well if it `trains`."""
    few = tuple(x.clamp(max=FEW) if _is_position(x) else x for x in arguments)
    for given in (arguments, few) if any(map(_is_position, arguments)) else (arguments,):
        *before, last = given
        with torch.no_grad():
            result = kernel(*before, last.clone() if isinstance(last, Tensor) else last)
        queries = max(1, MOST_SCORES // given[1].shape[2])
        for b in {0, len(result) - 1}:
            one = [x[b : b + 1] if isinstance(x, Tensor) and len(x) == len(result) else x for x in given]
            one[0] = one[0][:, :, -queries:]
            exact = [x.float().clone() if isinstance(x, Tensor) and not _is_position(x) else x for x in one]
            with torch.no_grad():
                yield difference(result[b : b + 1, :, -queries:], formula(*exact))
            if trains:
                yield from map(difference, _gradients(kernel, one), _gradients(formula, exact))


def _is_position(x: Any) -> bool:
    return isinstance(x, Tensor) and not x.is_floating_point()


def difference(result: Tensor, expected: Tensor) -> float:
    """The largest, as a share of the largest number; infinite where the result is not finite."""
    share = (result.float() - expected.float()).abs().max() / expected.abs().max().clamp(min=1e-30)
    return share.nan_to_num(float("inf"), float("inf")).item()


def _gradients(function: Callable, arguments: list) -> tuple[Tensor, ...]:
    """Of all arguments that are tensors of floating numbers."""
    given = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
    inputs = [x.requires_grad_() for x in given if isinstance(x, Tensor) and x.is_floating_point()]
    out = function(*given)
    weights = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)
    return torch.autograd.grad((out * weights).sum(), inputs)


class _Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.__name__.partition(".")[0])
        return func(*args, **(kwargs or {}))


def attention_kernels(run: Callable[[], object]) -> str:
    """The kernels of the attention that `run` computes: this project's, or PyTorch's such as `sdpa flash`; `sdpa math`
    if none is fused. Then what kernels were wrong."""
    with _Operators() as operators:
        run()
    ours = {"split_kv": "split-kv c++", "causal": "causal c++", "_varlen_attn": "flash varlen"}
    prefix = "_scaled_dot_product_"
    found = {ours[name] for name in operators.names if name in ours}
    found |= {f"sdpa {name.removeprefix(prefix).split('_')[0]}" for name in operators.names if name.startswith(prefix)}
    return ", ".join([" + ".join(sorted(found)) or "sdpa math", *WRONG.values()])
