"""The operators that models are written in, each as its formula in PyTorch.

An operator may have kernels. A kernel's `supports(*arguments)` says whether it can compute them (device, dtype, shapes,
gradients); a call runs the first kernel that can, or else the formula. Operators take positional arguments only. Tests
compare each kernel with its operator's `.formula`.

Shapes: B batch, T query tokens, S all tokens attended to, H query heads, G KV heads, D key size, E value size, W width,
V vocabulary, K inputs and F outputs of a matrix; a paged cache has P blocks of C tokens, N for each sequence.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from archs.kernels import fused, replay, triton
from archs.kernels.checked import attention_kernels, difference, is_right
from archs.kernels.cpu import attention as cpu_attention
from archs.kernels.cpu import layers as cpu
from archs.kernels.fused import gains_by_compiling, sequences_at_once, visible
from archs.kernels.replay import record, repeated

__all__ = ["attention_kernels", "difference", "gains_by_compiling", "record", "repeated", "sequences_at_once"]

NORM_EPS = 1e-6


def accelerated(*kernels: Callable) -> Callable[[Callable], Callable]:
    """Turns a formula into an operator that these kernels may compute."""

    def define(formula: Callable) -> Callable:
        @functools.wraps(formula)
        def operator(*arguments: Any) -> Any:
            for supports, kernel, checked in choices:
                if supports(*arguments) and (not checked or is_right(kernel, formula, arguments)):
                    return kernel(*arguments)
            return formula(*arguments)

        choices = [(kernel.supports, kernel, getattr(kernel, "checked", False)) for kernel in kernels]
        operator.formula, operator.kernels, operator.choices = formula, kernels, choices
        return operator

    return define


def compiled(operator: Callable, **options: Any) -> Callable:
    """The operator with its formula compiled, for arguments that no kernel supports; `options` go to torch.compile."""
    return accelerated(*operator.kernels)(torch.compile(operator.formula, dynamic=False, **options))


@contextlib.contextmanager
def formulas() -> Iterator[None]:
    """Within it operators run as their formulas."""
    operators = [each for each in globals().values() if hasattr(each, "choices")]
    before = [list(each.choices) for each in operators]
    for each in operators:
        each.choices.clear()
    try:
        yield
    finally:
        for each, choices in zip(operators, before, strict=True):
            each.choices.extend(choices)


# Layers


@accelerated(cpu.rms_norm)
def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = NORM_EPS) -> Tensor:
    """x / sqrt(mean(x^2) + eps), times the weight (W); the mean is over the last dimension (arXiv 1910.07467)."""
    return F.rms_norm(x, x.shape[-1:], weight, eps)


@accelerated(cpu.swiglu)
def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, (..., F), where gate and up are the halves of (..., 2 F) (arXiv 2002.05202, eq. 6)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@accelerated(cpu.head_linear)
def head_linear(x_BHTK: Tensor, weight_HKF: Tensor) -> Tensor:
    """Multiplies each head by a matrix of its own; (B, H, T, F)."""
    # einsum and not @, which would copy the weights for each sequence
    return torch.einsum("bhtk,hkf->bhtf", x_BHTK, weight_HKF)


@accelerated(cpu.unembed_cross_entropy)
def unembed_cross_entropy(x_BTW: Tensor, weight_VW: Tensor, targets_BT: Tensor) -> Tensor:
    """The sum of the cross-entropies, in nats, of logits x @ weight^T. Targets of -100 are ignored."""
    logits_NV = at_least_fp32(x_BTW @ weight_VW.T).flatten(0, 1)
    return F.cross_entropy(logits_NV, targets_BT.flatten(), reduction="sum")


def at_least_fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


# Rotary positions


@functools.cache
def frequencies(dim: int, base: float, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Radians per position of each pair of dimensions, base^(-2i/dim), (dim/2); in fp32, or fp64 if asked for."""
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    with torch.inference_mode(False):
        return base ** (torch.arange(0, dim, 2, dtype=dtype, device=device) / -dim)


@accelerated(cpu.rope)
def rope_table(position: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines (..., dim/2) of the angles at positions (...) (RoFormer, arXiv 2104.09864, section 3)."""
    angle = position[..., None] * frequencies
    return angle.cos(), angle.sin()


@accelerated(cpu.rotate)
def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates x (..., D) by tables (..., D/2) that broadcast; dimension i pairs with i + D/2, as in transformers."""
    a, b = at_least_fp32(x).chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


# Attention


def split_heads(x_BTX: Tensor, *heads: int) -> list[Tensor]:
    """(B, T, (h1 + h2 + ...) D) to one tensor (B, h, T, D) for each h."""
    B, T, X = x_BTX.shape
    return list(x_BTX.view(B, T, sum(heads), X // sum(heads)).transpose(1, 2).split(heads, dim=1))


def merge_heads(x_BHTD: Tensor) -> Tensor:
    return x_BHTD.transpose(1, 2).flatten(2)


@accelerated(cpu_attention.decode, triton.decode_attention, cpu_attention.causal, fused.windowed_flash, fused.attention)
def attention(
    q_BHTD: Tensor,
    k_BGSD: Tensor,
    v_BGSE: Tensor,
    scale: float,
    window: int = 0,
    position: Tensor | None = None,
    sinks_1H11: Tensor | None = None,
) -> Tensor:
    """Causal softmax attention (B, H, T, E) of the last T of S tokens; query head h uses KV head h // (H/G).

    Keys and values may have a dtype of fewer bits than queries, and are widened to theirs. With a `window` above 0 each
    query sees only its own token and the window - 1 before it. `position`, int64 of shape (1) or (B) on the device, is
    for decode: T is 1, there is no window, and the query sees slots 0 to position. `sinks` as in `softmax`.
    """
    T, S = q_BHTD.shape[2], k_BGSD.shape[2]
    seen = visible(T, S, window, position, q_BHTD.device)
    return masked_attention.formula(q_BHTD, k_BGSD, v_BGSE, scale, seen, sinks_1H11)


@accelerated(fused.masked_attention)
def masked_attention(
    q_BHTD: Tensor, k_BGSD: Tensor, v_BGSE: Tensor, scale: float, mask: Tensor, sinks_1H11: Tensor | None = None
) -> Tensor:
    """Softmax attention with a mask that broadcasts to (B, H, T, S): True where a query sees a key, or numbers that are
    added to the scores and may require a gradient. `sinks` as in `softmax`."""
    kv = (x.to(q_BHTD.dtype) for x in (k_BGSD, v_BGSE))
    k_BHSD, v_BHSE = (x.repeat_interleave(q_BHTD.shape[1] // x.shape[1], dim=1) for x in kv)
    score_BHTS = q_BHTD @ k_BHSD.mT * scale
    score_BHTS = score_BHTS.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else score_BHTS + mask
    return softmax(score_BHTS, sinks_1H11).to(v_BHSE.dtype) @ v_BHSE


def softmax(score: Tensor, sinks: Tensor | None = None) -> Tensor:
    """Over the last dimension, in fp32 at least where there are `sinks`: logits besides the scores, whose share is
    dropped (gpt-oss, arXiv 2508.10925, section 2.2)."""
    if sinks is None:
        return score.softmax(-1)
    logits = at_least_fp32(score), at_least_fp32(sinks).expand_as(score[..., :1])
    return torch.cat(logits, dim=-1).softmax(-1)[..., :-1]


@accelerated(cpu_attention.paged_decode)
def paged_attention(
    q_BH1D: Tensor,
    k_PGCD: Tensor,
    v_PGCE: Tensor,
    scale: float,
    position_B: Tensor,
    table_BN: Tensor,
    sinks_1H11: Tensor | None = None,
) -> Tensor:
    """`attention` of one query per sequence over a paged cache: token t of sequence b is in slot t % C of block
    table_BN[b, t // C]. All entries of the table are valid blocks."""
    k_BGSD, v_BGSE = (x[table_BN].transpose(1, 2).flatten(2, 3) for x in (k_PGCD, v_PGCE))
    return attention(q_BH1D, k_BGSD, v_BGSE, scale, 0, position_B, sinks_1H11)


def self_score(q: Tensor, k: Tensor) -> Tensor:
    """The product of each token's query with its own key, (..., 1), summed in fp64: retention at a first token is this
    times v, and the norm after it magnifies what is near zero, rounding error included. Each product is rounded
    to the dtype, everywhere in the same way."""
    return (q * k).sum(-1, keepdim=True, dtype=torch.float64).to(q.dtype)


@accelerated(cpu.put)
def put(cache_BGSD: Tensor, slots_T: Tensor, new_BGTD: Tensor) -> None:
    """Writes vectors into these slots, rounded to the cache's dtype."""
    cache_BGSD.index_copy_(2, slots_T, new_BGTD.to(cache_BGSD.dtype))


@accelerated(cpu.retention_step, triton.retention_step)
def retention_step(q_BH1D: Tensor, k_BH1D: Tensor, v_BH1D: Tensor, decay_BH1: Tensor, state_BHDD: Tensor) -> Tensor:
    """One token of gated retention, (B, H, 1, D): Q_n S_n with S_n = gamma_n S_{n-1} + K_n^T V_n (YOCO, arXiv
    2405.05254, section 3.2). Overwrites the state with S_n, rounded to its dtype; the output is of S_n before that."""
    decayed_BHDD = state_BHDD.to(q_BH1D.dtype) * decay_BH1[..., None]
    state_BHDD.copy_(decayed_BHDD + k_BH1D.mT @ v_BH1D)
    return q_BH1D @ decayed_BHDD + self_score(q_BH1D, k_BH1D) * v_BH1D


@accelerated(cpu.draw)
def draw(logits_BV: Tensor, place_B1: Tensor, temperature: float) -> Tensor:
    """The tokens (B,) at these places, from 0 to 1, of the cumulative distribution of softmax(logits / temperature); at
    temperature 0 the likeliest, of equal ones the first."""
    if not temperature:
        return logits_BV.argmax(-1)
    p_BV = (logits_BV.float() / temperature).softmax(-1)
    place_B1 = place_B1.clamp(max=1 - 2**-18)  # the sum may be rounded down, and no place may be beyond it
    return torch.searchsorted(p_BV.cumsum(-1), place_B1, right=True)[:, 0]


# Memory and steps


@accelerated(cpu.huge_pages)
def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.zeros, in memory that is fast to read."""
    return torch.zeros(shape, dtype=dtype, device=device)


@accelerated(cpu.read_all)
def read_all(x: Tensor) -> Tensor | float:
    """The sum of x, which is computed to read all of it: for measuring bandwidth."""
    return x.sum()


@accelerated(replay.decode_step)
def decode_step(model: Any, tokens_B: Tensor, cache: Any) -> Tensor:
    """Appends one token per sequence to the cache; logits (B, V) for the next one."""
    return model.append(tokens_B[:, None], cache, cache.length)
