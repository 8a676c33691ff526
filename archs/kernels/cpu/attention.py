"""Attention in C++ on a CPU: of one new token over a cache, and of a prompt or a training sequence, with gradients.

Shapes: B batch, H query heads, G KV heads, T tokens of the queries, S of keys and values, D key size, E value size;
with a table P blocks of C tokens, N for each sequence.
"""

import math

import torch
from torch import Tensor

from archs.kernels import constant, kernel, present
from archs.kernels.cpu.build import STORED, Prepared, build, is_transformed, library, operator, threads, usable
from archs.kernels.fused import are_columns

# Decode


def can_decode(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int = 0, position=None, sinks=None) -> bool:
    """One token, no gaps between tokens or between queries; values of another size are columns of the keys. Keys and
    values of any dtype in STORED, and queries of the same or in fp32."""
    (H, T, D), (G, _, E) = q.shape[1:], v.shape[1:]
    fits = T == 1 and not window and len(q) > 0 and q[0].is_contiguous()
    fits = fits and k.stride()[2:] == v.stride()[2:] == (D, 1) and k.dtype == v.dtype
    fits = fits and q.dtype in (torch.float32, k.dtype) and (D == E or are_columns(v, k))
    return fits and usable(q, k, v, *present(sinks), dtypes=STORED) and build(D, E, H // G, k.dtype) is not None


@kernel(can_decode)
def decode(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int = 0, position=None, sinks=None, table=None
) -> Tensor:
    """Computed in fp32."""
    sinks = None if sinks is None else sinks.float().contiguous()
    return split_kv(q.float(), k, v, scale, window, position, sinks, table).to(q.dtype)


@operator(
    "split_kv(Tensor q, Tensor k, Tensor v, float scale, int window=0, Tensor? position=None, Tensor? sinks=None, "
    "Tensor? table=None) -> Tensor",
    flops=lambda q, k, v, scale, window=0, position=None, sinks=None, table=(0, 1): (
        2 * math.prod(q[:3]) * table[1] * v[2] * (k[3] + v[3])
    ),
)
def split_kv(
    q_BH1D: Tensor, k: Tensor, v: Tensor, scale: float, window: int = 0, position=None, sinks=None, table_BN=None
) -> Prepared:
    """Keys and values are (B, G, S, D), or with a table of blocks (P, G, C, D)."""
    B, H, _, D = q_BH1D.shape
    G, C, E = v.shape[1:]
    blocks = 1 if table_BN is None else table_BN.shape[1]
    out = q_BH1D.new_empty(B, H, 1, E)
    sizes = q_BH1D.stride(0), *k.stride()[:2], *v.stride()[:2], B, G, blocks * C
    places = position, position is not None and len(position) > 1, table_BN, blocks, C, sinks
    work = threads(B * G * blocks * C * (D + E))
    return out, build(D, E, H // G, k.dtype).split_kv, q_BH1D, k, v, out, *sizes, *places, scale, work


def can_decode_pages(q: Tensor, k: Tensor, v: Tensor, scale: float, position, table, sinks=None) -> bool:
    """Blocks of whole tiles, which have 16 tokens."""
    tiles = k.shape[2] % 16 == 0 or table.shape[1] == 1
    return tiles and position.is_contiguous() and table.is_contiguous() and can_decode(q, k, v, scale, sinks=sinks)


@kernel(can_decode_pages)
def paged_decode(
    q_BH1D: Tensor, k_PGCD: Tensor, v_PGCE: Tensor, scale: float, position_B: Tensor, table_BN: Tensor, sinks=None
) -> Tensor:
    return decode(q_BH1D, k_PGCD, v_PGCE, scale, 0, position_B, sinks, table_BN)


# Prefill and training


def can_causal(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int = 0, position=None, sinks=None) -> bool:
    """Queries in fp32, or under autocast, and so many tokens that it is faster than PyTorch. It has gradients and goes
    through torch.compile, not through torch.func."""
    (T, D), E = q.shape[2:], v.shape[3]
    fits = all(x.is_cpu and x.dtype != torch.float64 for x in (q, k, v, *present(sinks)))
    fits = fits and (q.dtype == torch.float32 or torch.is_autocast_enabled("cpu"))
    return fits and position is None and not is_transformed() and T >= 8 and q.stride(3) == 1 and _builds(D, E)


@constant
def _builds(D: int, E: int) -> bool:
    return build(D, E) is not None


@kernel(can_causal)
def causal(
    q_BHTD: Tensor, k_BGSD: Tensor, v_BGSE: Tensor, scale: float, window: int = 0, position=None, sinks=None
) -> Tensor:
    q, k, v = (x.float() for x in (q_BHTD, k_BGSD, v_BGSE))
    k, v = (x if x.stride()[2:] == (x.shape[3], 1) else x.contiguous() for x in (k, v))
    sinks = None if sinks is None else sinks.float().flatten().contiguous()
    return causal_forward(q, k, v, scale, window, sinks)[0].to(q_BHTD.dtype)


def _pairs(q: tuple, k: tuple, window: int) -> int:
    """Pairs of a query and a key without the causal mask, as PyTorch counts them."""
    return math.prod(q[:3]) * min(k[2], window or k[2])


@operator(
    "causal(Tensor q, Tensor k, Tensor v, float scale, int window=0, Tensor? sinks=None) -> (Tensor, Tensor)",
    flops=lambda q, k, v, scale, window=0, sinks=None: 2 * _pairs(q, k, window) * (k[3] + v[3]),
)
def causal_forward(
    q_BHTD: Tensor, k_BGSD: Tensor, v_BGSE: Tensor, scale: float, window: int = 0, sinks_H: Tensor | None = None
) -> Prepared:
    """`ops.attention` (B, H, T, E), laid out as (B, T, H, E), and log2 of the sum of each query's weights 2^score,
    (B, H, T). Keys and values have no gaps between tokens.
    """
    B, H, T, D = q_BHTD.shape
    G, S, E = v_BGSE.shape[1:]
    out_BTHE, weight_BHT = q_BHTD.new_empty(B, T, H, E), q_BHTD.new_empty(B, H, T)
    tensors = q_BHTD, k_BGSD, v_BGSE, out_BTHE, weight_BHT
    strides = *q_BHTD.stride()[:3], *k_BGSD.stride()[:2], *v_BGSE.stride()[:2]
    sizes = B, H, G, T, S, window or S, sinks_H, scale, threads(B * H * T * S)
    return (out_BTHE.transpose(1, 2), weight_BHT), build(D, E).causal, *tensors, *strides, *sizes


@operator(
    "causal_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor weight, float scale, "
    "int window=0) -> (Tensor, Tensor, Tensor)",
    # five products: scores and gradients of weights, of queries, of keys and of values
    flops=lambda grad, q, k, v, out, weight, scale, window=0: 2 * _pairs(q, k, window) * (3 * k[3] + 2 * v[3]),
)
def causal_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, weight: Tensor, scale: float, window: int = 0
) -> Prepared:
    """Gradients of queries, and for each query head of its keys and values, (B, H, S, D) and (B, H, S, E), laid out as
    (B, tokens, H, size)."""
    B, H, T, D = q.shape
    G, S, E = v.shape[1:]
    grads = [q.new_empty(B, tokens, H, size) for tokens, size in ((T, D), (S, D), (S, E))]
    tensors = grad, q, k, v, out, weight, *grads
    strides = *grad.stride()[:3], *q.stride()[:3], *k.stride()[:2], *v.stride()[:2], *out.stride()[:3]
    sizes = B, H, G, T, S, window or S, scale, threads(B * H * T * S)
    return tuple(x.transpose(1, 2) for x in grads), build(D, E).causal_backward, *tensors, *strides, *sizes


def _save(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *ctx.how, sinks = inputs
    ctx.save_for_backward(q, k, v, *output, sinks)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx, grad_BHTE: Tensor, _) -> tuple:
    q_BHTD, k_BGSD, *rest, sinks_H = ctx.saved_tensors
    grad_BHTE = grad_BHTE if grad_BHTE.stride(3) == 1 else grad_BHTE.contiguous()
    q_grad, *grads = causal_backward(grad_BHTE, q_BHTD, k_BGSD, *rest, *ctx.how)
    H, G = q_BHTD.shape[1], k_BGSD.shape[1]
    sinks_grad_H = None
    if sinks_H is not None:  # a sink has a value of zero, so the outputs' derivative is -share * out
        _, out_BHTE, weight_BHT = rest
        share_BHT = torch.exp2(sinks_H[:, None] * math.log2(math.e) - weight_BHT)
        sinks_grad_H = -(share_BHT * (grad_BHTE * out_BHTE).sum(-1)).sum((0, 2))
    grads = (x if H == G else x.view(len(x), G, H // G, *x.shape[2:]).sum(2) for x in grads)
    return q_grad, *grads, None, None, sinks_grad_H


def _no_second_gradients(ctx, *grads: Tensor) -> None:
    raise NotImplementedError("attention has no second gradients on a CPU")


torch.library.register_autograd(causal_forward, _gradients, setup_context=_save, lib=library)
torch.library.register_autograd(causal_backward, _no_second_gradients, lib=library)
