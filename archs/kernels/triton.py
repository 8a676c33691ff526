"""Which GPUs and tensors the Triton kernels support. Triton is imported only where there is a GPU."""

import functools
import importlib.util
import warnings

import torch
from torch import Tensor

from archs.kernels import kernel, present
from archs.kernels.cpu.build import is_transformed
from archs.kernels.fused import capability

DTYPES = {torch.float32, torch.bfloat16, torch.float16}


@functools.cache
def runs_on(device: torch.device) -> bool:
    """True on an NVIDIA GPU from Ampere on for which Triton can compile."""
    if capability(device) < (8, 0) or not importlib.util.find_spec("triton"):
        return False
    from archs.kernels.triton_attention import split_kv_attention

    try:
        x = torch.zeros(1, 1, 1, 16, device=device)
        with torch.cuda.device(device):  # Triton launches on the current one
            split_kv_attention(x, x, x, 1.0, torch.zeros(1, dtype=torch.int64, device=device))
    except Exception as e:  # no C compiler, for one
        warnings.warn(f"decode goes without Triton and CUDA graphs, more slowly: {e}", stacklevel=2)
        return False
    return True


def usable(*tensors: Tensor) -> bool:
    """True if a Triton kernel without a gradient can run on these tensors: contiguous vectors on a GPU, no gradient
    needed, not inside torch.compile or torch.func."""
    gradient = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    fits = all(x.is_cuda and 1 in (x.stride(-1), x.shape[-1]) for x in tensors)
    return fits and not gradient and not torch.compiler.is_compiling() and not is_transformed()


def supports_decode(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int = 0, position=None, sinks=None) -> bool:
    """One position for all sequences; keys and values of one dtype, up to fp32, to which queries are rounded."""
    if position is None or position.numel() > 1 or window or not usable(q, k, v, *present(sinks)):
        return False
    return k.dtype == v.dtype and {q.dtype, k.dtype} <= DTYPES and runs_on(q.device)


@kernel(supports_decode, checked=True)
def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, position: Tensor, sinks: Tensor | None = None
) -> Tensor:
    from archs.kernels.triton_attention import split_kv_attention

    with torch.cuda.device_of(q):
        return split_kv_attention(q.to(k.dtype), k, v, scale, position, sinks).to(q.dtype)


def supports_retention(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor) -> bool:
    """fp32 except for the state."""
    fits = all(x.dtype == torch.float32 for x in (q, k, v, decay)) and state.is_contiguous()
    return fits and usable(q, k, v, state) and not decay.requires_grad and runs_on(state.device)


@kernel(supports_retention, checked=True)
def retention_step(*arguments: Tensor) -> Tensor:
    from archs.kernels.triton_retention import retain

    with torch.cuda.device_of(arguments[0]):
        return retain(*arguments)
