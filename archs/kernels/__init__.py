"""Everything that exists for speed alone: kernels in C++ and Triton, PyTorch's fused attention, recorded decode steps.

A kernel computes what an operator of `archs/ops.py` defines; its `supports` is called with the operator's arguments.
"""

from collections.abc import Callable
from typing import Any


def kernel(supports: Callable[..., bool], *, checked: bool = False) -> Callable[[Callable], Callable]:
    """Marks a function as a kernel: `supports(*arguments)` is True where it can compute the operator's result. A
    `checked` one is compared with the formula when it is first used on a GPU (archs/kernels/checked.py)."""

    def mark(function: Callable) -> Callable:
        function.supports, function.checked = supports, checked
        return function

    return mark


def present(*optional: Any) -> list:
    """Those that are not None."""
    return [x for x in optional if x is not None]


def constant(function: Callable) -> Callable:
    """Marks a function whose result the compiler may take for constant. `torch.compiler.assume_constant_result` does
    so, too, but imports the compiler, which takes a second of the start of each command."""
    function._dynamo_marked_constant = True
    return function
