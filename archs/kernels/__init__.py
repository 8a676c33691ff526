"""Everything that exists for speed alone: kernels in C++ and Triton, PyTorch's fused attention, recorded decode steps.

A kernel computes what an operator of `archs/ops.py` defines; its `supports` is called with the operator's arguments.
"""

from collections.abc import Callable


def kernel(supports: Callable[..., bool]) -> Callable[[Callable], Callable]:
    """Marks a function as a kernel: `supports(*arguments)` is True where it can compute the operator's result."""

    def mark(function: Callable) -> Callable:
        function.supports = supports
        return function

    return mark
