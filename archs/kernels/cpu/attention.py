"""Attention in C++ on a CPU: of one new token over a cache, and of a prompt or a training sequence, with gradients.

Shapes: B batch, H query heads, G KV heads, M = H/G, T tokens of the queries, S of keys and values, D key size, E value
size; with a table P blocks of C tokens, N for each sequence.
"""

import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from archs.kernels import kernel
from archs.kernels.cpu.build import Prepared, bind, build, is_transformed, library, operator, threads, usable
from archs.kernels.fused import are_columns


def can_split_kv(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """One token, no gaps between tokens or between queries; values of another size are columns of the keys."""
    (H, T, D), (G, _, E) = q.shape[1:], v.shape[1:]
    fits = T == 1 and q.shape[0] > 0 and q[0].is_contiguous() and k.stride()[2:] == v.stride()[2:] == (D, 1)
    return fits and (D == E or are_columns(v, k)) and usable(q, k, v) and build(D, E, H // G) is not None


@operator(
    "split_kv(Tensor q, Tensor k, Tensor v, float scale, int window=0, Tensor? position=None) -> Tensor",
    lambda q, k, v, scale, window=0, position=None: not window and can_split_kv(q, k, v),
)
def decode(
    q_BH1D: Tensor, k_BGSD: Tensor, v_BGSE: Tensor, scale: float, window: int = 0, position: Tensor | None = None
) -> Prepared:
    return split_kv(q_BH1D, k_BGSD, v_BGSE, scale, position, None)


@operator(
    "paged_split_kv(Tensor q, Tensor k, Tensor v, float scale, Tensor position, Tensor table) -> Tensor",
    # The kernel's tiles of 16 tokens do not cross blocks.
    lambda q, k, v, scale, position, table: (
        (k.shape[2] % 16 == 0 or table.shape[1] == 1)
        and position.is_contiguous()
        and table.is_contiguous()
        and can_split_kv(q, k, v)
    ),
)
def paged_decode(
    q_BH1D: Tensor, k_PGCD: Tensor, v_PGCE: Tensor, scale: float, position_B: Tensor, table_BN: Tensor
) -> Prepared:
    return split_kv(q_BH1D, k_PGCD, v_PGCE, scale, position_B, table_BN)


def split_kv(
    q_BH1D: Tensor, k: Tensor, v: Tensor, scale: float, position: Tensor | None, table_BN: Tensor | None
) -> Prepared:
    """Keys and values of one tensor (B, G, S, D), or with a table of blocks (P, G, C, D)."""
    B, H, _, D = q_BH1D.shape
    G, C, E = v.shape[1:]
    blocks = 1 if table_BN is None else table_BN.shape[1]
    out = q_BH1D.new_empty(B, H, 1, E)
    sizes = q_BH1D.stride(0), *k.stride()[:2], *v.stride()[:2], B, G, blocks * C
    places = position, position is not None and len(position) > 1, table_BN, blocks, C
    work = threads(B * G * blocks * C * (D + E))
    return out, bind(build(D, E, H // G).split_kv, q_BH1D, k, v, out, *sizes, *places, scale, work)


def can_causal(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int = 0, position: Tensor | None = None) -> bool:
    """fp32, or what autocast would make fp32, and so many tokens that it is faster than PyTorch. It has gradients and
    goes through torch.compile, not through torch.func."""
    (T, D), E = q.shape[2:], v.shape[3]
    autocast = torch.is_autocast_enabled("cpu")
    fits = all(x.is_cpu and (autocast or x.dtype == torch.float32) for x in (q, k, v))
    return fits and position is None and not is_transformed() and T >= 8 and q.stride(3) == 1 and _builds(D, E)


@torch.compiler.assume_constant_result
def _builds(D: int, E: int) -> bool:
    return build(D, E) is not None


@kernel(can_causal)
def causal(
    q_BHTD: Tensor, k_BGSD: Tensor, v_BGSE: Tensor, scale: float, window: int = 0, position: Tensor | None = None
) -> Tensor:
    q, k, v = (x.float() for x in (q_BHTD, k_BGSD, v_BGSE))
    k, v = (x if x.stride()[2:] == (x.shape[3], 1) else x.contiguous() for x in (k, v))
    return causal_forward(q, k, v, scale, window)[0].to(q_BHTD.dtype)


@operator("causal(Tensor q, Tensor k, Tensor v, float scale, int window=0) -> (Tensor, Tensor)")
def causal_forward(q_BHTD: Tensor, k_BGSD: Tensor, v_BGSE: Tensor, scale: float, window: int = 0) -> Prepared:
    """`ops.attention` (B, H, T, E), laid out as (B, T, H, E), and log2 of the sum of each query's weights 2^score,
    (B, H, T). Keys and values have no gaps between tokens.
    """
    B, H, T, D = q_BHTD.shape
    G, S, E = v_BGSE.shape[1:]
    out_BTHE = q_BHTD.new_empty(B, T, H, E)
    strides = *q_BHTD.stride()[:3], *k_BGSD.stride()[:2], *v_BGSE.stride()[:2]
    sizes = B, H, G, T, S, window or S, scale, threads(B * H * T * S)
    weight_BHT = q_BHTD.new_empty(B, H, T)
    call = bind(build(D, E).causal, q_BHTD, k_BGSD, v_BGSE, out_BTHE, weight_BHT, *strides, *sizes)
    return (out_BTHE.transpose(1, 2), weight_BHT), call


@operator(
    "causal_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor weight, float scale, "
    "int window=0) -> (Tensor, Tensor, Tensor)"
)
def causal_backward(
    grad_BHTE: Tensor,
    q_BHTD: Tensor,
    k_BGSD: Tensor,
    v_BGSE: Tensor,
    out_BHTE: Tensor,
    weight_BHT: Tensor,
    scale: float,
    window: int = 0,
) -> Prepared:
    """Gradients of queries, and for each query head of its keys and values, (B, H, S, D) and (B, H, S, E), laid out as
    (B, tokens, H, size)."""
    B, H, T, D = q_BHTD.shape
    G, S, E = v_BGSE.shape[1:]
    grads = [q_BHTD.new_empty(B, tokens, H, size) for tokens, size in ((T, D), (S, D), (S, E))]
    tensors = grad_BHTE, q_BHTD, k_BGSD, v_BGSE, out_BHTE, weight_BHT, *grads
    strides = *grad_BHTE.stride()[:3], *q_BHTD.stride()[:3], *k_BGSD.stride()[:2], *v_BGSE.stride()[:2]
    sizes = *out_BHTE.stride()[:3], B, H, G, T, S, window or S, scale, threads(B * H * T * S)
    return tuple(x.transpose(1, 2) for x in grads), bind(build(D, E).causal_backward, *tensors, *strides, *sizes)


@torch.library.register_fake(causal_forward, lib=library)
def _(q_BHTD, k_BGSD, v_BGSE, scale, window=0):
    B, H, T, _ = q_BHTD.shape
    return q_BHTD.new_empty(B, T, H, v_BGSE.shape[3]).transpose(1, 2), q_BHTD.new_empty(B, H, T)


@torch.library.register_fake(causal_backward, lib=library)
def _(grad_BHTE, q_BHTD, k_BGSD, v_BGSE, out_BHTE, weight_BHT, scale, window=0):
    B, H, T, D = q_BHTD.shape
    S, E = v_BGSE.shape[2:]
    return tuple(q_BHTD.new_empty(B, tokens, H, size).transpose(1, 2) for tokens, size in ((T, D), (S, D), (S, E)))


def _save(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *ctx.how = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx, grad_BHTE: Tensor, _) -> tuple:
    q_BHTD, k_BGSD, *rest = ctx.saved_tensors
    grad_BHTE = grad_BHTE if grad_BHTE.stride(3) == 1 else grad_BHTE.contiguous()
    q_grad, *grads = causal_backward(grad_BHTE, q_BHTD, k_BGSD, *rest, *ctx.how)
    H, G = q_BHTD.shape[1], k_BGSD.shape[1]
    return q_grad, *(x if H == G else x.view(len(x), G, H // G, *x.shape[2:]).sum(2) for x in grads), None, None


def _no_second_gradients(ctx, *grads: Tensor) -> None:
    raise NotImplementedError("attention has no second gradients on a CPU")


torch.library.register_autograd(causal_forward, _gradients, setup_context=_save, lib=library)
torch.library.register_autograd(causal_backward, _no_second_gradients, lib=library)


@register_flop_formula(decode.overloadpacket)
def _decode_flops(q_shape, k_shape, v_shape, scale, *args, out_shape=None) -> int:
    return 2 * math.prod(q_shape[:3]) * v_shape[2] * (k_shape[3] + v_shape[3])


@register_flop_formula(paged_decode.overloadpacket)
def _paged_decode_flops(q_shape, k_shape, v_shape, scale, position_shape, table_shape, *, out_shape=None) -> int:
    return table_shape[1] * _decode_flops(q_shape, k_shape, v_shape, scale)


@register_flop_formula(causal_forward.overloadpacket)
def _causal_flops(q_shape, k_shape, v_shape, scale, window=0, *, out_shape=None) -> int:
    return 2 * math.prod(q_shape[:3]) * min(k_shape[2], window or k_shape[2]) * (k_shape[3] + v_shape[3])


@register_flop_formula(causal_backward.overloadpacket)
def _causal_backward_flops(grad_shape, q_shape, k_shape, v_shape, out, weight, scale, window=0, **kwargs) -> int:
    """Five products: scores and gradients of weights, of queries, of keys and of values."""
    pairs = math.prod(q_shape[:3]) * min(k_shape[2], window or k_shape[2])
    return 2 * pairs * (3 * k_shape[3] + 2 * v_shape[3])
