"""Attention on a CPU in C++: of one token over a static cache, and of many, with gradients.

Shapes: B batch, H query heads, G KV heads, M = H/G, T tokens of the queries, S of keys and values, D key size, E value
size; with a table P blocks of C tokens.
"""

import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from archs.cpu.building import Prepared, bound, build, library, operator, takes, threads, transformed


def takes_attention(q_BHTD: Tensor, k_BGSD: Tensor, v_BGSE: Tensor) -> bool:
    """Whether `split_kv` takes these: also one token, and no gaps between tokens or between queries."""
    (H, T, D), (G, _, E) = q_BHTD.shape[1:], v_BGSE.shape[1:]
    fits = T == 1 and q_BHTD[0].is_contiguous() and k_BGSD.stride()[2:] == v_BGSE.stride()[2:] == (D, 1)
    fits = fits and takes(q_BHTD, k_BGSD, v_BGSE)
    if fits and D != E:  # values are columns of the keys
        fits = v_BGSE.data_ptr() == k_BGSD.data_ptr() and v_BGSE.stride() == k_BGSD.stride()
    return fits and build(D, E, H // G) is not None


def takes_causal(q_BHTD: Tensor, k_BGSD: Tensor, v_BGSE: Tensor) -> bool:
    """Whether `causal` takes these, once they are in fp32, and keys and values have no gaps.

    Of few tokens torch's is as fast. It has gradients, and torch.compile takes it as it is; torch.func does not.
    """
    (T, D), E = q_BHTD.shape[2:], v_BGSE.shape[3]
    widened = torch.is_autocast_enabled("cpu")  # torch's would be, too
    ours = all(x.is_cpu and (widened or x.dtype == torch.float32) for x in (q_BHTD, k_BGSD, v_BGSE))
    return ours and not transformed() and T >= 8 and q_BHTD.stride(3) == 1 and builds(D, E)


@torch.compiler.assume_constant_result
def builds(D: int, E: int) -> bool:
    return build(D, E) is not None


@operator("split_kv(Tensor q, Tensor k, Tensor v, float scale, Tensor? position=None, Tensor? table=None) -> Tensor")
def split_kv(
    q_BHTD: Tensor,
    k_BGSD: Tensor,
    v_BGSE: Tensor,
    scale: float,
    position: Tensor | None = None,
    table_BN: Tensor | None = None,
) -> Prepared:
    """Attention of one token over S tokens, or those up to `position`, query head h using KV head h // (H/G).

    Returns (B, H, 1, E). Queries have no gaps within a sequence, keys and values none between tokens. The position is
    that of all (1), or one for each sequence (B). With a table each sequence's tokens are in the blocks it numbers, of
    keys (P, G, C, D) and values (P, G, C, E): C is a multiple of 16, or there is one block.
    """
    B, H, T, D = q_BHTD.shape
    G, C, E = v_BGSE.shape[1:]
    blocks = 1 if table_BN is None else table_BN.shape[1]
    out_BHTE = q_BHTD.new_empty(B, H, T, E)
    tensors = q_BHTD, k_BGSD, v_BGSE, out_BHTE
    sizes = q_BHTD.stride(0), *k_BGSD.stride()[:2], *v_BGSE.stride()[:2], B, G, blocks * C
    held = position, position is not None and len(position) > 1, table_BN, blocks, C
    return out_BHTE, bound(
        build(D, E, H // G).split_kv, *tensors, *sizes, *held, scale, threads(B * G * blocks * C * (D + E))
    )


@operator("causal(Tensor q, Tensor k, Tensor v, float scale, int? window=None) -> (Tensor, Tensor)")
def causal(q_BHTD: Tensor, k_BGSD: Tensor, v_BGSE: Tensor, scale: float, window: int | None = None) -> Prepared:
    """Causal attention of the last T of S tokens, query head h using KV head h // (H/G).

    With a window each token sees only itself and the window - 1 before it.
    Returns (B, H, T, E), laid out as (B, T, H, E), and of each query log2 of the sum of its weights 2^score (B, H, T).
    Keys and values have no gaps between tokens. It has gradients.
    """
    B, H, T, D = q_BHTD.shape
    G, S, E = v_BGSE.shape[1:]
    out_BTHE = q_BHTD.new_empty(B, T, H, E)
    strides = *q_BHTD.stride()[:3], *k_BGSD.stride()[:2], *v_BGSE.stride()[:2]
    sizes = B, H, G, T, S, S if window is None else window, scale, threads(B * H * T * S)
    weight_BHT = q_BHTD.new_empty(B, H, T)
    call = bound(build(D, E).causal, q_BHTD, k_BGSD, v_BGSE, out_BTHE, weight_BHT, *strides, *sizes)
    return (out_BTHE.transpose(1, 2), weight_BHT), call


@operator(
    "causal_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor weight, float scale, "
    "int? window=None) -> (Tensor, Tensor, Tensor)"
)
def causal_backward(
    grad_BHTE: Tensor,
    q_BHTD: Tensor,
    k_BGSD: Tensor,
    v_BGSE: Tensor,
    out_BHTE: Tensor,
    weight_BHT: Tensor,
    scale: float,
    window: int | None = None,
) -> Prepared:
    """Gradients of `causal`: of queries, and of keys and values each query head's own, (B, H, S, D) and (B, H, S, E).

    All are laid out as (B, tokens, H, size). Results and their gradients have no gaps within a query's.
    """
    B, H, T, D = q_BHTD.shape
    G, S, E = v_BGSE.shape[1:]
    found = [q_BHTD.new_empty(B, tokens, H, size) for tokens, size in ((T, D), (S, D), (S, E))]
    tensors = grad_BHTE, q_BHTD, k_BGSD, v_BGSE, out_BHTE, weight_BHT, *found
    strides = *grad_BHTE.stride()[:3], *q_BHTD.stride()[:3], *k_BGSD.stride()[:2], *v_BGSE.stride()[:2]
    sizes = *out_BHTE.stride()[:3], B, H, G, T, S, S if window is None else window, scale, threads(B * H * T * S)
    return tuple(x.transpose(1, 2) for x in found), bound(build(D, E).causal_backward, *tensors, *strides, *sizes)


@torch.library.register_fake(causal, lib=library)
def _(q_BHTD, k_BGSD, v_BGSE, scale, window=None):
    B, H, T, _ = q_BHTD.shape
    return q_BHTD.new_empty(B, T, H, v_BGSE.shape[3]).transpose(1, 2), q_BHTD.new_empty(B, H, T)


@torch.library.register_fake(causal_backward, lib=library)
def _(grad_BHTE, q_BHTD, k_BGSD, v_BGSE, out_BHTE, weight_BHT, scale, window=None):
    B, H, T, D = q_BHTD.shape
    S, E = v_BGSE.shape[2:]
    return tuple(q_BHTD.new_empty(B, tokens, H, size).transpose(1, 2) for tokens, size in ((T, D), (S, D), (S, E)))


def _keeps(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
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


torch.library.register_autograd(causal, _gradients, setup_context=_keeps, lib=library)
torch.library.register_autograd(causal_backward, _no_second_gradients, lib=library)


@register_flop_formula(split_kv.overloadpacket)
def _attention_flops(q_shape, k_shape, v_shape, scale, position=None, table_shape=None, *, out_shape=None) -> int:
    B, H, T, D = q_shape
    blocks = 1 if table_shape is None else table_shape[1]
    return 2 * B * H * T * blocks * v_shape[2] * (D + v_shape[3])


@register_flop_formula(causal.overloadpacket)
def _causal_flops(q_shape, k_shape, v_shape, scale, window=None, *, out_shape=None) -> int:
    return 2 * math.prod(q_shape[:3]) * min(k_shape[2], window or k_shape[2]) * (k_shape[3] + v_shape[3])


@register_flop_formula(causal_backward.overloadpacket)
def _causal_backward_flops(grad_shape, q_shape, k_shape, v_shape, out, weight, scale, window=None, **kwargs) -> int:
    """Five products: scores and gradients of weights, of queries, of keys and of values."""
    pairs = math.prod(q_shape[:3]) * min(k_shape[2], window or k_shape[2])
    return 2 * pairs * (3 * k_shape[3] + 2 * v_shape[3])
