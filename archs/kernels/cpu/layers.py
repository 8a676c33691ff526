"""The layers of a model besides attention, in C++ for a CPU in fp32 without gradients.

A recorded decode step runs some of PyTorch's own operators in C++, too: they start faster, and a product with
few rows reads its weights as fast as memory gives them, in half of PyTorch's time.

Shapes: B batch, H heads, G KV heads, S cached tokens, D head size; K inputs and F outputs of a matrix, N rows.
"""

import contextlib
import ctypes
import math
import mmap
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from archs.kernels import kernel
from archs.kernels.cpu.build import PREPARE, STORED, Prepared, bind, build, is_transformed, operator, threads, usable

FEW_ROWS = 32  # PyTorch's products are as fast with more
HUGE_PAGE = 2**21  # bytes
NORM_EPS = 1e-6  # as in archs/ops.py


# Operators of models


def steps_of_rows(x: Tensor) -> tuple[int, int, int] | None:
    """(rows in a group, elements from group to group, and from row to row) where x's rows lie in evenly spaced groups,
    as the query heads of each sequence do, without gaps in a row."""
    levels = [(1, 0)]  # (size, step), the innermost first
    for size, step in list(zip(x.shape[:-1], x.stride()[:-1], strict=True))[::-1]:
        if levels[-1][0] == 1:
            levels[-1] = size, step
        elif size != 1 and step == math.prod(levels[-1]):
            levels[-1] = size * levels[-1][0], levels[-1][1]
        elif size != 1:
            levels.append((size, step))
    if x.dim() < 2 or x.stride(-1) != 1 or len(levels) > 2:
        return None
    (per_group, step), (_, group_step) = levels[0], levels[-1]
    return per_group, group_step, step


@operator(
    f"rms_norm(Tensor x, Tensor? weight=None, float eps={NORM_EPS}) -> Tensor",
    lambda x, weight=None, eps=NORM_EPS: (
        steps_of_rows(x) is not None and usable(x) and (weight is None or usable(weight))
    ),
)
def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = NORM_EPS) -> Prepared:
    out = x.new_empty(x.shape)
    sizes = x.numel() // x.shape[-1], x.shape[-1], *steps_of_rows(x)
    return out, build().rms_norm, x, weight, out, *sizes, eps, threads(x.numel())


@operator("swiglu(Tensor gate_up) -> Tensor", lambda gate_up: gate_up.is_contiguous() and usable(gate_up))
def swiglu(gate_up: Tensor) -> Prepared:
    F = gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], F)
    return out, build().swiglu, gate_up, out, out.numel() // F, F, threads(gate_up.numel())


@operator(
    "rope(Tensor position, Tensor frequencies) -> (Tensor, Tensor)",
    lambda position, frequencies: position.shape == (1,) and position.dtype == torch.int64 and usable(frequencies),
)
def rope(position: Tensor, frequencies: Tensor) -> Prepared:
    table = frequencies.new_empty(1, len(frequencies)), frequencies.new_empty(1, len(frequencies))
    return table, build().rope, position, frequencies, *table, len(frequencies)


def can_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Tables without gaps in a row that broadcast to (B, 1, T, D/2)."""
    tables = cos.stride(-1) == 1 and cos.shape == sin.shape and cos.stride() == sin.stride()
    return x.dim() == 4 and x.stride(3) == 1 and tables and usable(x, cos, sin)


@operator("rotate(Tensor x, Tensor cos, Tensor sin) -> Tensor", can_rotate)
def rotate(x_BHTD: Tensor, cos: Tensor, sin: Tensor) -> Prepared:
    B, H, T, D = x_BHTD.shape
    out = x_BHTD.new_empty(B, H, T, D)
    rows = cos.expand(B, 1, T, D // 2).stride()
    sizes = B, H, T, D // 2, *x_BHTD.stride()[:3], rows[0], rows[2]
    return out, build().rotate, x_BHTD, cos, sin, out, *sizes, threads(x_BHTD.numel())


def can_multiply_heads(x: Tensor, weight: Tensor) -> bool:
    """One token of few sequences, and sizes that are multiples of 16."""
    B, _, T, K = x.shape
    fits = T == 1 and 0 < B <= FEW_ROWS and K % 16 == weight.shape[2] % 16 == 0
    return fits and x.stride(3) == 1 and 1 in weight.stride()[1:] and usable(x, weight)


@operator(
    "head_linear(Tensor x, Tensor weight) -> Tensor",
    can_multiply_heads,
    flops=lambda x, weight: 2 * math.prod(x) * weight[2],
)
def head_linear(x_BH1K: Tensor, weight_HKF: Tensor) -> Prepared:
    B, H, _, K = x_BH1K.shape
    F = weight_HKF.shape[2]
    out = x_BH1K.new_empty(B, H, 1, F)
    transposed = weight_HKF.stride(2) != 1
    steps = *x_BH1K.stride()[:2], weight_HKF.stride(0), weight_HKF.stride(2 if transposed else 1)
    sizes = B, H, K, F, *steps, transposed
    return out, build().head_linear, x_BH1K, weight_HKF, out, *sizes, threads(weight_HKF.numel())


def can_retain(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor) -> bool:
    """No gaps between the heads of a sequence; a state of any dtype in STORED."""
    dense = all(x[:1].is_contiguous() for x in (q, k, v)) and decay.is_contiguous() and state.is_contiguous()
    return dense and usable(q, k, v, decay) and usable(state, dtypes=STORED)


@operator(
    "retention(Tensor q, Tensor k, Tensor v, Tensor decay, Tensor(a!) state) -> Tensor",
    can_retain,
    flops=lambda q, *_: 4 * math.prod(q) * q[3],
)
def retention_step(q_BH1D: Tensor, k_BH1D: Tensor, v_BH1D: Tensor, decay_BH1: Tensor, state_BHDD: Tensor) -> Prepared:
    B, H, _, D = q_BH1D.shape
    out = q_BH1D.new_empty(B, H, 1, D)
    tensors = q_BH1D, k_BH1D, v_BH1D, decay_BH1, state_BHDD, out
    batches = [x.stride(0) for x in tensors[:3]]
    return out, build(cache=state_BHDD.dtype).retention, *tensors, B, H, D, *batches, threads(state_BHDD.numel())


def can_put(cache: Tensor, slots: Tensor, new: Tensor) -> bool:
    """One slot and no gaps in its vector; a cache of any dtype in STORED."""
    fits = slots.shape == (1,) and new.stride(3) == 1 and cache.stride()[2:] == (cache.shape[3], 1)
    return fits and usable(new) and usable(cache, dtypes=STORED)


@operator("put(Tensor(a!) cache, Tensor slots, Tensor new) -> ()", can_put)
def put(cache_BGSD: Tensor, slot_1: Tensor, new_BG1D: Tensor) -> Prepared:
    B, G, _, D = new_BG1D.shape
    strides = *cache_BGSD.stride()[:2], *new_BG1D.stride()[:2]
    return None, build(cache=cache_BGSD.dtype).put, cache_BGSD, new_BG1D, slot_1, B, G, D, *strides


@operator("cross_entropy(Tensor(a!) logits, Tensor targets) -> Tensor")
def cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> Prepared:
    """Nats (N); the logits become their gradients. IndexError for a target that is no token."""
    nats_N, function = logits_NV.new_empty(len(logits_NV)), build().cross_entropy
    function.errcheck = _check_rows
    return nats_N, function, logits_NV, targets_N, nats_N, *logits_NV.shape, threads(logits_NV.numel())


@operator(
    "draw(Tensor logits, Tensor place, float temperature) -> Tensor",
    lambda logits, place, temperature: logits.is_contiguous() and usable(logits, place),
)
def draw(logits_BV: Tensor, place_B1: Tensor, temperature: float) -> Prepared:
    token_B = place_B1.new_empty(len(place_B1), dtype=torch.int64)
    return token_B, build().draw, logits_BV, place_B1, token_B, *logits_BV.shape, temperature


class UnembedCrossEntropy(torch.autograd.Function):
    """The gradients are computed with the loss, some rows at a time, so that the logits of a whole batch never exist
    (as in Liger Kernel, arXiv 2410.10989, section 3.2)."""

    ROWS = 512  # products of fewer rows are slower, by a sixth with a vocabulary of 50,000; with more hardly faster

    @staticmethod
    def forward(ctx, x_BTW: Tensor, weight_VW: Tensor, targets_BT: Tensor, trains: bool) -> Tensor:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight_VW.dtype
        x_NW, weight = x_BTW.detach().flatten(0, 1), weight_VW.detach().to(dtype)
        targets_N, sum_nats = targets_BT.flatten(), torch.zeros((), dtype=torch.float32)
        x_grad, weight_grad = torch.zeros_like(x_NW), torch.zeros_like(weight_VW, dtype=torch.float32)
        with torch.autocast("cpu", enabled=False):
            for rows in (targets_N != -100).nonzero()[:, 0].split(UnembedCrossEntropy.ROWS):
                x, targets = x_NW[rows].to(dtype), targets_N[rows].long()
                logits = (x @ weight.T).float()
                if build() is not None:
                    sum_nats += cross_entropy(logits, targets).sum()
                else:
                    logits = logits.log_softmax(1)
                    sum_nats -= logits.gather(1, targets[:, None]).sum()
                    logits.exp_()[torch.arange(len(rows)), targets] -= 1
                if not trains:
                    continue
                logits_grad = logits.to(dtype)
                x_grad[rows] = (logits_grad @ weight).to(x_grad.dtype)
                weight_grad += logits_grad.T @ x
        ctx.save_for_backward(x_grad.view_as(x_BTW), weight_grad.to(weight_VW.dtype))
        return sum_nats

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x_grad, weight_grad = ctx.saved_tensors
        return x_grad * grad, weight_grad * grad, None, None


def can_unembed(x: Tensor, weight: Tensor, targets: Tensor) -> bool:
    """Any dtype except fp64, for which the loss is summed too coarsely, and also under autocast."""
    return x.is_cpu and x.dtype != torch.float64 and not torch.compiler.is_compiling() and not is_transformed()


@kernel(can_unembed)
def unembed_cross_entropy(x_BTW: Tensor, weight_VW: Tensor, targets_BT: Tensor) -> Tensor:
    return UnembedCrossEntropy.apply(x_BTW, weight_VW, targets_BT, torch.is_grad_enabled())


# Operators of PyTorch in a recorded step; None where the arguments are not supported


def linear(x_NK: Tensor, weight_KF: Tensor) -> Prepared | None:
    """For few rows, and a transposed weight of at least 16 rows and columns."""
    (N, K), weight_FK = x_NK.shape, weight_KF.t()
    F = len(weight_FK)
    fits = N <= FEW_ROWS and min(F, K) >= 16 and weight_FK.is_contiguous() and x_NK.is_contiguous()
    if not fits or not usable(x_NK, weight_FK):
        return None
    out = x_NK.new_empty(N, F)
    return out, build().linear, x_NK, weight_FK, out, N, K, F, threads(K * F)


def take(table_VW: Tensor, index: Tensor, *_: Any) -> Prepared | None:
    """Rows of a table, for few numbers. IndexError for a number of no row."""
    fits = index.numel() <= FEW_ROWS and table_VW.is_contiguous() and index.is_contiguous()
    if not fits or not usable(table_VW):
        return None
    out, function = table_VW.new_empty(*index.shape, table_VW.shape[1]), build().take
    function.errcheck = _check_rows
    return out, function, table_VW, index, out, index.numel(), *table_VW.shape


def _check_rows(missing: int, *call: Any) -> None:
    if missing:
        raise IndexError(f"{missing} of the numbers are out of range")


def add(x: Tensor, y: Any, alpha: float = 1) -> Prepared | None:
    """For equal shapes."""
    same = isinstance(y, Tensor) and x.shape == y.shape and alpha == 1 and x.is_contiguous() and y.is_contiguous()
    if not same or not usable(x, y):
        return None
    out = torch.empty_like(x)
    return out, build().add, x, y, out, x.numel()


def join(parts: list[Tensor], dim: int = 0) -> Prepared | None:
    """For vectors (B, H, 1, D) and (B, H, 1, E) of one token."""
    fits = len(parts) == 2 and dim in (3, -1) and all(x.dim() == 4 and x.shape[2] == x.stride(3) == 1 for x in parts)
    if not fits or not usable(*parts):
        return None
    (B, H, _, D), E = parts[0].shape, parts[1].shape[3]
    out = parts[0].new_empty(B, H, 1, D + E)
    return out, build().join, *parts, out, B, H, D, E, *(step for x in parts for step in x.stride()[:2])


aten = torch.ops.aten
PREPARE |= {aten.mm.default: linear, aten.embedding.default: take, aten.add.Tensor: add}
PREPARE |= {aten.cat.default: join}


# Memory


def can_be_huge(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> bool:
    large = math.prod(shape) * dtype.itemsize >= HUGE_PAGE
    return large and torch.device(device).type == "cpu" and hasattr(mmap, "MADV_HUGEPAGE")


@kernel(can_be_huge)
def huge_pages(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros in pages of 2 MiB, which Linux reads up to a fifth faster than PyTorch's of 4 KiB."""
    size = math.prod(shape) * dtype.itemsize
    area = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        area.madvise(mmap.MADV_HUGEPAGE)
    offset = -torch.frombuffer(area, dtype=torch.uint8).data_ptr() % HUGE_PAGE
    aligned = torch.frombuffer(area, dtype=dtype, count=math.prod(shape), offset=offset).view(shape)
    return aligned.zero_()  # so that all pages exist before anything is timed


@kernel(lambda x: x.numel() % 2**17 == 0 and x.is_contiguous() and usable(x))
def read_all(x: Tensor) -> float:
    """A sum of x with prefetching; for a multiple of 2^17 elements."""
    function = build().read_all
    function.restype = ctypes.c_float
    return bind(function, x, x.numel(), torch.get_num_threads())()
