"""What a model has beside attention, on a CPU in C++.

Shapes: B batch, H heads, G KV heads, S cached tokens, D size of a head; K inputs and F outputs of a matrix.
"""

import functools
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from archs.cpu.building import Prepared, bound, build, learning, library, operator, takes, threads, transformed

FEW = 32  # rows; torch's products are as fast with more
MANY, MUCH = 1024, 2**28  # rows and multiplications from which on `product` has enough to do


def reader(x: Tensor) -> Callable[[], float] | None:
    """Reads all of x as fast as the kernel could, returns the sum; for 2^17 fp32 numbers, or a multiple, on a CPU."""
    built = build()
    return built and (lambda: bound(built.read_all, x, x.numel(), torch.get_num_threads())())


def takes_few(x: Tensor, *weights: Tensor) -> bool:
    """Whether `linear` or `swiglu` takes these: also few rows, and sizes of 16 or more."""
    if weights and x.shape[-1] != weights[0].shape[1]:
        return False  # torch says so
    for w in weights:
        if min(w.shape) < 16 or not w.is_contiguous():
            return False
    return x.numel() <= FEW * x.shape[-1] and not torch.is_autocast_enabled("cpu") and takes(x, *weights)


@functools.cache
def _is_amd() -> bool:
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False


@torch.compiler.assume_constant_result
def rows_that_pay() -> float:
    """From how many on `product` is faster than torch's own: measured on an AMD with AVX2, infinite on others."""
    if torch.backends.cpu.get_cpu_capability() != "AVX2" or not _is_amd() or build() is None:
        return math.inf
    return max(MANY, 4 * 48 * torch.get_num_threads())  # blocks of 48 are what threads share out


def takes_product(x: Tensor, weight_FK: Tensor) -> bool:
    """Whether `product` takes these: fp32 on a CPU, many rows, a contiguous matrix.

    Unlike what `takes` is asked for, torch.compile takes it as it is; torch.func and torch.export do not.
    """
    F, K = weight_FK.shape
    if not (x.is_cpu and weight_FK.is_cpu and x.dtype == weight_FK.dtype == torch.float32 and x.shape[-1] == K):
        return False
    if min(F, K) < 16 or not weight_FK.is_contiguous() or x.numel() * F < MUCH or torch.is_autocast_enabled("cpu"):
        return False
    return not torch.compiler.is_exporting() and not transformed() and x.numel() // K >= rows_that_pay()


def takes_heads(x_BHTK: Tensor, weight_HKF: Tensor) -> bool:
    """Whether `head_linear` takes these: also one token of few sequences, and sizes that are multiples of 16."""
    B, _, T, K = x_BHTK.shape
    fits = T == 1 and B <= FEW and K % 16 == weight_HKF.shape[2] % 16 == 0
    fits = fits and x_BHTK.stride(3) == 1 and 1 in weight_HKF.stride()[1:]
    return fits and takes(x_BHTK, weight_HKF)


def takes_retention(q_BH1D: Tensor, k_BH1D: Tensor, v_BH1D: Tensor, decay_BH1: Tensor, state_BHDD: Tensor) -> bool:
    """Whether `retention` takes these: also nothing between heads."""
    dense = all(x[0].is_contiguous() for x in (q_BH1D, k_BH1D, v_BH1D)) and decay_BH1.is_contiguous()
    return dense and state_BHDD.is_contiguous() and takes(q_BH1D, k_BH1D, v_BH1D, decay_BH1, state_BHDD)


@operator("put(Tensor(a!) stream, Tensor new, Tensor position) -> ()")
def put(stream_BGSD: Tensor, new_BG1D: Tensor, position: Tensor) -> Prepared:
    """Writes one token's vectors into the slot that `position` says."""
    B, G, _, D = new_BG1D.shape
    strides = *stream_BGSD.stride()[:2], *new_BG1D.stride()[:2]
    return None, bound(build().put, stream_BGSD, new_BG1D, position, B, G, D, *strides)


@operator("linear(Tensor x, Tensor weight) -> Tensor")
def linear(x: Tensor, weight_FK: Tensor) -> Prepared:
    """x (..., K) weight^T; (..., F). x is contiguous."""
    F, K = weight_FK.shape
    out = x.new_empty(*x.shape[:-1], F)
    return out, bound(build().linear, x, weight_FK, out, x.numel() // K, K, F, threads(K * F))


@operator("product(Tensor x, Tensor weight, bool transposed) -> Tensor")
def product(x: Tensor, weight_FK: Tensor, transposed: bool) -> Prepared:
    """x (..., K) weight^T, (..., F), or x (..., F) weight, (..., K); both contiguous. It has gradients."""
    K, N = x.shape[-1], weight_FK.shape[0 if transposed else 1]
    out, rows = x.new_empty(*x.shape[:-1], N), x.numel() // K

    def multiply() -> None:
        panels = x.new_empty(-(-N // 32) * 32, K)  # what the matrix is laid out in: of 32 columns or a divisor
        bound(build().product, x, weight_FK, panels, out, rows, N, K, transposed, threads(rows * N * K))()

    return out, multiply


@torch.library.register_fake(product, lib=library)
def _(x, weight_FK, transposed):
    return x.new_empty(*x.shape[:-1], weight_FK.shape[0 if transposed else 1])


def _keeps(ctx, inputs: tuple, output: Tensor) -> None:
    x, weight, ctx.transposed = inputs
    ctx.save_for_backward(x, weight)


def _gradients(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, weight = ctx.saved_tensors
    grad, (of_x, of_weight, _) = grad.contiguous(), ctx.needs_input_grad
    pair = [some.view(-1, some.shape[-1]) for some in ((grad, x) if ctx.transposed else (x, grad))]
    x_grad = product(grad, weight, not ctx.transposed) if of_x else None
    return x_grad, pair[0].t() @ pair[1] if of_weight else None, None


torch.library.register_autograd(product, _gradients, setup_context=_keeps, lib=library)


@register_flop_formula(product.overloadpacket)
def _product_flops(x_shape, weight_shape, transposed, *, out_shape=None) -> int:
    return 2 * math.prod(x_shape[:-1]) * math.prod(weight_shape)


@operator("swiglu(Tensor x, Tensor gate_up, Tensor down) -> Tensor")
def swiglu(x: Tensor, gate_up_GK: Tensor, down_KF: Tensor) -> Prepared:
    """(silu(x gate^T) * (x up^T)) down^T of x (..., K), gate and up one after the other (arXiv 2002.05202).

    x is contiguous.
    """
    K, F = down_KF.shape
    out = torch.empty_like(x)
    return out, bound(build().swiglu, x, gate_up_GK, down_KF, out, x.numel() // K, K, F, threads(3 * K * F))


@operator("gated(Tensor gate_up) -> Tensor")
def gated(gate_up: Tensor) -> Prepared:
    """silu(gate) * up of the halves of (..., 2 F), which is contiguous; (..., F)."""
    F = gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], F)
    return out, bound(build().gated_rows, gate_up, out, out.numel() // F, F, threads(gate_up.numel()))


@operator("gated_backward(Tensor grad, Tensor gate_up) -> Tensor")
def gated_backward(grad: Tensor, gate_up: Tensor) -> Prepared:
    """Of gate and up, (..., 2 F); both arguments are contiguous."""
    F = gate_up.shape[-1] // 2
    found = torch.empty_like(gate_up)
    sizes = grad.numel() // F, F, threads(gate_up.numel())
    return found, bound(build().gated_rows_backward, grad, gate_up, found, *sizes)


learning_gated = learning(gated, lambda grad, gate_up: gated_backward(grad.contiguous(), gate_up))


@operator("cross_entropy(Tensor(a!) logits, Tensor targets) -> Tensor")
def cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> Prepared:
    """Nats (N); the logits become its gradients: softmax, less 1 at the target. IndexError for a target of no logit.

    Both are contiguous, targets int64.
    """
    nats_N = logits_NV.new_empty(len(logits_NV))
    return nats_N, bound(
        build().cross_entropy, logits_NV, targets_N, nats_N, *logits_NV.shape, threads(logits_NV.numel())
    )


@operator("take(Tensor table, Tensor index) -> Tensor")
def take(table_VW: Tensor, index: Tensor) -> Prepared:
    """Rows of a table, (..., W); both arguments contiguous. IndexError for a number of no row."""
    out = table_VW.new_empty(*index.shape, table_VW.shape[1])
    return out, bound(build().take, table_VW, index, out, index.numel(), *table_VW.shape)


@operator("rope(Tensor position, Tensor frequencies) -> (Tensor, Tensor)")
def rope(position: Tensor, frequencies: Tensor) -> Prepared:
    """Cosine and sine (1, D/2) of one position times the frequencies."""
    table = frequencies.new_empty(1, len(frequencies)), frequencies.new_empty(1, len(frequencies))
    return table, bound(build().rope, position, frequencies, *table, len(frequencies))


@operator("rotate(Tensor x, Tensor cosine, Tensor sine) -> Tensor")
def rotate(x_BHTD: Tensor, cosine: Tensor, sine: Tensor) -> Prepared:
    """Rotary positions by tables that broadcast to (B, 1, T, D/2), whose rows have no gaps; (B, H, T, D)."""
    B, H, T, D = x_BHTD.shape
    out = x_BHTD.new_empty(B, H, T, D)
    rows = cosine.expand(B, 1, T, D // 2).stride()
    strides = *x_BHTD.stride()[:3], rows[0], rows[2]
    call = bound(build().rotate, x_BHTD, cosine, sine, out, B, H, T, D // 2, *strides, threads(x_BHTD.numel()))
    return out, call


def _turned_back(grad: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor | None, ...]:
    grad = grad if grad.stride(3) == 1 else grad.contiguous()
    return rotate(grad, cosine.contiguous(), (-sine).contiguous()), None, None


learning_rotate = learning(rotate, _turned_back, slice(1, None))  # x itself is not needed


@operator("fade(Tensor(a!) scores, Tensor q, Tensor k, Tensor log_decay) -> ()")
def fade(scores_NCC: Tensor, q_NCD: Tensor, k_NCD: Tensor, log_decay_NC: Tensor) -> Prepared:
    """Scores of earlier tokens of a chunk fade by summed log decays; a token's own is summed in fp64; others are 0.

    All are contiguous, N is any number of dimensions.
    """
    C, D = q_NCD.shape[-2:]
    sizes = log_decay_NC.numel() // C, C, D, threads(scores_NCC.numel())
    return None, bound(build().fade, scores_NCC, q_NCD, k_NCD, log_decay_NC, *sizes)


@operator("rms_norm(Tensor x, Tensor? weight, float eps) -> Tensor")
def rms_norm(x_NW: Tensor, weight: Tensor | None, eps: float) -> Prepared:
    """x / sqrt(mean(x^2) + eps), times a weight, over the last dimension (RMSNorm, arXiv 1910.07467)."""
    out = x_NW.new_empty(x_NW.shape)
    sizes = *x_NW.shape, x_NW.stride(0)
    return out, bound(build().rms_norm, x_NW, weight, out, *sizes, eps, threads(x_NW.numel()))


@operator("rms_norm_backward(Tensor grad, Tensor x, Tensor? weight, float eps) -> (Tensor, Tensor)")
def rms_norm_backward(grad_NW: Tensor, x_NW: Tensor, weight: Tensor | None, eps: float) -> Prepared:
    """Of x (N, W), and parts of the weight's (16, W) to be summed; the gradient is contiguous."""
    found, parts = torch.empty_like(grad_NW), grad_NW.new_empty(16, grad_NW.shape[1])
    sizes = len(parts), *x_NW.shape, x_NW.stride(0)
    tensors = grad_NW, x_NW, weight, found, parts
    return (found, parts), bound(build().rms_norm_backward, *tensors, *sizes, eps, threads(x_NW.numel()))


def _norms_gradients(grad: Tensor, x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor | None, ...]:
    of_x, parts = rms_norm_backward(grad.contiguous(), x, weight, eps)
    return of_x, None if weight is None else parts.sum(0), None


learning_rms_norm = learning(rms_norm, _norms_gradients)


@operator("head_linear(Tensor x, Tensor weight) -> Tensor")
def head_linear(x_BH1K: Tensor, weight_HKF: Tensor) -> Prepared:
    """One token's heads, each times a matrix of its own; (B, H, 1, F)."""
    B, H, _, K = x_BH1K.shape
    F = weight_HKF.shape[2]
    out = x_BH1K.new_empty(B, H, 1, F)
    transposed = weight_HKF.stride(2) != 1
    steps = *x_BH1K.stride()[:2], weight_HKF.stride(0), weight_HKF.stride(2 if transposed else 1)
    sizes = B, H, K, F, *steps, transposed
    return out, bound(build().head_linear, x_BH1K, weight_HKF, out, *sizes, threads(weight_HKF.numel()))


@operator("join(Tensor a, Tensor b) -> Tensor")
def join(a_BH1D: Tensor, b_BH1E: Tensor) -> Prepared:
    """One token's vectors side by side, (B, H, 1, D + E)."""
    B, H, _, D = a_BH1D.shape
    out = a_BH1D.new_empty(B, H, 1, D + b_BH1E.shape[3])
    sizes = B, H, D, b_BH1E.shape[3], *a_BH1D.stride()[:2], *b_BH1E.stride()[:2]
    return out, bound(build().join, a_BH1D, b_BH1E, out, *sizes)


@operator("add(Tensor x, Tensor y) -> Tensor")
def add(x: Tensor, y: Tensor) -> Prepared:
    """Of the same shape, both contiguous."""
    out = torch.empty_like(x)
    return out, bound(build().add, x, y, out, x.numel())


@operator("retention(Tensor q, Tensor k, Tensor v, Tensor decay, Tensor(a!) state) -> Tensor")
def retention(q_BH1D: Tensor, k_BH1D: Tensor, v_BH1D: Tensor, decay_BH1: Tensor, state_BHDD: Tensor) -> Prepared:
    """One token of gated retention, which changes the state; (B, H, 1, D). Queries, keys and values have no gaps."""
    B, H, _, D = q_BH1D.shape
    out = q_BH1D.new_empty(B, H, 1, D)
    tensors = q_BH1D, k_BH1D, v_BH1D, decay_BH1, state_BHDD, out
    batches = [x.stride(0) for x in tensors[:3]]
    return out, bound(build().retention, *tensors, B, H, D, *batches, threads(state_BHDD.numel()))


@register_flop_formula(linear.overloadpacket)
def _linear_flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * math.prod(x_shape) * weight_shape[0]


@register_flop_formula(swiglu.overloadpacket)
def _swiglu_flops(x_shape, gate_up_shape, down_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * math.prod(x_shape) * (gate_up_shape[0] + down_shape[1])


@register_flop_formula(head_linear.overloadpacket)
def _head_linear_flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * math.prod(x_shape) * weight_shape[2]


@register_flop_formula(retention.overloadpacket)
def _retention_flops(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    return 4 * math.prod(q_shape) * q_shape[3]
