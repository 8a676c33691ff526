"""Softmax attention over compact keys and values, and the rotary embedding: what all variants share.

Keys and values are never repeated to the number of query heads: for one new token the query heads of a group are taken
as that group's query length, so that each cached byte is read once and no mask is needed.

Shapes: B batch, T query tokens, S cached tokens, H query heads, G KV heads, D key size, E value size.
"""

import contextlib
import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from archs.cpu.attention import causal, split_kv, takes_attention, takes_causal
from archs.cpu.building import takes
from archs.cpu.layers import learning_rotate
from archs.cpu.layers import rope as rope_of_one

Rope = tuple[Tensor, Tensor]
# For one query on a GPU: cuDNN, torch's choice on Hopper, makes a plan for each length.
NOT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def rope_table(start: int | Tensor, tokens: int, dim: int, base: float, device, dtype=torch.float32) -> Rope:
    """Cosine and sine (T, dim/2) for positions from `start` (RoFormer, arXiv 2104.09864, section 3).

    A tensor is the position of one token, (1), or one for each sequence, (B, 1, 1): then (B, 1, 1, dim/2).
    """
    if isinstance(start, Tensor):
        turns = kept_frequencies(dim, base, device, dtype)
        if start.dim() == 1 and takes(turns):
            return rope_of_one(start, turns)
        angle = start[..., None] * turns
    else:
        angle = (start + torch.arange(tokens, device=device))[:, None] * frequencies(dim, base, device, dtype)
    return angle.cos(), angle.sin()


def frequencies(dim: int, base: float, device, dtype=torch.float32) -> Tensor:
    """By how much each pair (dim/2) turns from one position to the next."""
    return base ** (torch.arange(0, dim, 2, dtype=dtype, device=device) / -dim)


@functools.cache
def kept_frequencies(dim: int, base: float, device, dtype) -> Tensor:
    """For decode steps, in each of which they would be made anew."""
    with torch.inference_mode(False):
        return frequencies(dim, base, device, dtype)


def wide(x: Tensor) -> Tensor:
    """In fp32, or in fp64 as it is."""
    return x.double() if x.dtype == torch.float64 else x.float()


def last(rope: Rope) -> Rope:
    """Of the last position."""
    return rope[0][..., -1:, :], rope[1][..., -1:, :]


def rotate(x_BHTD: Tensor, rope: Rope) -> Tensor:
    """Applies rotary positions; dimension i is paired with i + D/2, as Llama does. Also to (N, D), a table row each."""
    cos, sin = rope
    rows = cos.stride(-1) == 1 and cos.shape == sin.shape and cos.stride() == sin.stride()
    if x_BHTD.dim() == 4 and x_BHTD.stride(3) == 1 and rows and takes(x_BHTD, learns=True) and takes(cos, sin):
        return learning_rotate(x_BHTD, cos, sin)
    a, b = wide(x_BHTD).chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x_BHTD.dtype)


def split_heads(x_BTX: Tensor, *heads: int) -> list[Tensor]:
    """(B, T, (h1 + h2 + ...) D) to one tensor (B, h, T, D) for each h."""
    B, T, X = x_BTX.shape
    return list(x_BTX.view(B, T, sum(heads), X // sum(heads)).transpose(1, 2).split(heads, dim=1))


def merge_heads(x_BHTD: Tensor) -> Tensor:
    return x_BHTD.transpose(1, 2).flatten(2)


def sdpa(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **kwargs) -> Tensor:
    """torch's scaled_dot_product_attention, kept on its fast kernels.

    On a CPU they want equal key and value sizes, and under autocast fp32: their bf16 backward is 4x slower. On a GPU
    those that take a mask do not know groups, so that there, in training and prefill alone, the keys are repeated.
    """
    if attn_mask is not None and q.is_cuda and kwargs.pop("enable_gqa", False):
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    value_size = v.shape[-1]
    if not q.is_cuda and k.shape[-1] > value_size:
        v = F.pad(v, (0, k.shape[-1] - value_size))
    if q.is_cuda and attn_mask is None and not kwargs.get("is_causal"):
        context = sdpa_kernel(NOT_CUDNN, set_priority=True)
    elif q.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        context = torch.autocast("cpu", enabled=False)
        q, k, v = q.float(), k.float(), v.float()
    else:
        context = contextlib.nullcontext()
    with context:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, **kwargs)[..., :value_size]


def attend_on_device(
    q_BHD: Tensor, k_BGSD: Tensor, v_BGSE: Tensor | None, position: Tensor, scale: float, value_size: int | None
) -> Tensor:
    """One token's attention up to a position that only the device knows; (B, H, E)."""
    if q_BHD.is_cuda:
        from archs.split_kv import split_kv_attention  # which imports Triton

        return split_kv_attention(q_BHD, k_BGSD, v_BGSE, position, scale, value_size)
    v = k_BGSD if v_BGSE is None else v_BGSE
    seen = torch.arange(k_BGSD.shape[2]) <= position
    return sdpa(q_BHD[:, :, None], k_BGSD, v, seen[None], scale=scale, enable_gqa=True)[:, :, 0, :value_size]


def attend(
    q_BHTD: Tensor,
    k_BGSD: Tensor,
    v_BGSE: Tensor | None,
    scale: float | None = None,
    seen: Tensor | None = None,
    value_size: int | None = None,
) -> Tensor:
    """Causal attention of the last T of S positions; query head h uses KV head h // (H/G). Returns (B, H, T, E).

    Without values, the keys' first `value_size` columns are them. With `seen`, a position (1) on the device, one token
    sees the slots up to it, or all S; `seen` may also say which slots each sequence's one token sees: booleans
    (B, 1, 1, S). On a CPU the kernel is ours, for one token where no gradient is wanted, on a GPU for a position, else
    torch's. A cache under a technique, or in blocks, which stands for keys and values, attends itself.
    """
    if not isinstance(k_BGSD, Tensor):
        return k_BGSD.attend(q_BHTD, scale, value_size)
    B, H, T, D = q_BHTD.shape
    G, S = k_BGSD.shape[1:3]
    q = q_BHTD.to(k_BGSD.dtype)
    v = k_BGSD[..., :value_size] if v_BGSE is None else v_BGSE
    masked = seen is not None and seen.dtype == torch.bool
    if not masked and takes_attention(q, k_BGSD, v):
        return split_kv(q, k_BGSD, v, scale or D**-0.5, seen).to(q_BHTD.dtype)
    if seen is not None and not masked:
        out = attend_on_device(q[:, :, 0], k_BGSD, v_BGSE, seen, scale or D**-0.5, value_size)
        return out[:, :, None].to(q_BHTD.dtype)
    if (out := ours(q, k_BGSD, v, scale or D**-0.5)) is not None:
        return out.to(q_BHTD.dtype)
    v = k_BGSD if v_BGSE is None else v_BGSE  # the columns too many are cut off: equal sizes keep the fast kernels
    if T == 1:
        out = sdpa(q.reshape(B, G, H // G, D), k_BGSD, v, attn_mask=seen, scale=scale).reshape(B, H, 1, -1)
    else:
        mask = None if T == S else torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
        out = sdpa(q, k_BGSD, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=H != G)
    return out[..., :value_size].to(q_BHTD.dtype)


def ours(q_BHTD: Tensor, k_BGSD: Tensor, v_BGSE: Tensor, scale: float, window: int | None = None) -> Tensor | None:
    """A prompt's attention by the C++ kernel; None where it does not take these. Under autocast it is in fp32."""
    if not takes_causal(q_BHTD, k_BGSD, v_BGSE):
        return None
    q, k, v = (x.float() for x in (q_BHTD, k_BGSD, v_BGSE))
    k, v = (x if x.stride()[2:] == (x.shape[3], 1) else x.contiguous() for x in (k, v))
    return causal(q, k, v, scale, window)[0]


def attend_window(q_BHTD: Tensor, k_BGSD: Tensor, v_BGSE: Tensor, window: int) -> Tensor:
    """As `attend`, but each token sees only itself and the window - 1 before it; S - T may be at most window - 1.

    For torch's kernels queries go in blocks of `window`, each against its own and the previous block of keys: time and
    memory grow with T x 2 window, not with T x S.
    """
    B, H, T, D = q_BHTD.shape
    G, S = k_BGSD.shape[1:3]
    if window >= S:
        return attend(q_BHTD, k_BGSD, v_BGSE)
    q = q_BHTD.to(k_BGSD.dtype)
    if (out := ours(q, k_BGSD, v_BGSE, D**-0.5, window)) is not None:
        return out.to(q_BHTD.dtype)
    before, blocks = S - T, -(-T // window)
    tail = blocks * window - T

    def keys(x_BGSD: Tensor) -> Tensor:  # (blocks, B G, 2 window, D)
        x = F.pad(x_BGSD, (0, 0, window - before, tail)).reshape(B * G, blocks + 1, window, -1)
        return torch.cat((x[:, :-1], x[:, 1:]), dim=2).transpose(0, 1)

    q = F.pad(q, (0, 0, 0, tail)).reshape(B * H, blocks, window, D).transpose(0, 1)
    ones = torch.ones(window, 2 * window, dtype=torch.bool, device=q.device)
    mask = (ones.triu(1) & ones.tril(window)).repeat(blocks, 1, 1, 1)
    mask[0, :, :, : window - before] = False  # padding before the first key
    out = sdpa(q, keys(k_BGSD), keys(v_BGSE), attn_mask=mask, enable_gqa=H != G)
    return out.transpose(0, 1).reshape(B, H, blocks * window, -1)[:, :, :T].to(q_BHTD.dtype)
