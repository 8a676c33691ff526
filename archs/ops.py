"""The operators that models are written in, each as its formula in PyTorch.

Kernels may stand behind an operator. Each alone knows what it supports (device, dtype, shapes, gradients); the first
that supports the arguments runs, and the formula does where none does. Tests hold it against `op.formula`.

Shapes: B batch, T query tokens, S cached tokens, H query heads, G KV heads, D key size, E value size, W width,
V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from archs.kernels import fused, replay, triton
from archs.kernels.cpu import attention as cpu_attention
from archs.kernels.cpu import layers as cpu
from archs.kernels.fused import gains_by_compiling, sequences_at_once
from archs.kernels.replay import record

__all__ = ["gains_by_compiling", "record", "sequences_at_once"]  # and the operators below

NORM_EPS = 1e-6


def accelerated(*kernels: Callable) -> Callable[[Callable], Callable]:
    """Makes an operator of a formula and the kernels that may compute it."""

    def define(formula: Callable) -> Callable:
        @functools.wraps(formula)
        def operator(*arguments: Any) -> Any:
            for supports, kernel in choices:
                if supports(*arguments):
                    return kernel(*arguments)
            return formula(*arguments)

        choices = [(kernel.supports, kernel) for kernel in kernels]
        operator.formula, operator.kernels = formula, kernels
        return operator

    return define


def compiled(operator: Callable, **options: Any) -> Callable:
    """The operator with its formula compiled; `options` go to torch.compile."""
    return accelerated(*operator.kernels)(torch.compile(operator.formula, dynamic=False, **options))


# Layers


@accelerated(cpu.rms_norm)
def rms_norm(x: Tensor, weight: Tensor | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + eps), times the weight, over the last dimension (RMSNorm, arXiv 1910.07467, eq. 4)."""
    return F.rms_norm(x, x.shape[-1:], weight, NORM_EPS)


@accelerated(cpu.swiglu)
def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of (..., 2 F), the gate's half first; (..., F) (GLU variants, arXiv 2002.05202, eq. 6)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@accelerated(cpu.head_linear)
def head_linear(x_BHTK: Tensor, weight_HKF: Tensor) -> Tensor:
    """Each head times a matrix of its own; (B, H, T, F)."""
    # einsum and not @, which would copy the weights for each sequence
    return torch.einsum("bhtk,hkf->bhtf", x_BHTK, weight_HKF)


@accelerated(fused.unembed_cross_entropy)
def unembed_cross_entropy(x_BTW: Tensor, weight_VW: Tensor, targets_BT: Tensor) -> Tensor:
    """Cross-entropy of the logits x weight^T in nats, summed over all targets except those that are -100."""
    logits_NV = at_least_fp32(x_BTW @ weight_VW.T).flatten(0, 1)
    return F.cross_entropy(logits_NV, targets_BT.flatten(), reduction="sum")


def at_least_fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


# Rotary positions


@functools.cache
def frequencies(dim: int, base: float, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """The angle (dim/2) by which each pair turns from one position to the next, base^(-2i/dim), in fp32 at least."""
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    with torch.inference_mode(False):
        return base ** (torch.arange(0, dim, 2, dtype=dtype, device=device) / -dim)


@accelerated(cpu.rope)
def rope(position: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine (..., dim/2) of rotary angles at positions (...) (RoFormer, arXiv 2104.09864, section 3)."""
    angle = position[..., None] * frequencies
    return angle.cos(), angle.sin()


@accelerated(cpu.rotate)
def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns x (..., D) by angles with these cosines and sines (..., D/2); dimension i is paired with i + D/2, as in
    Llama."""
    a, b = at_least_fp32(x).chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


# Attention


def split_heads(x_BTX: Tensor, *heads: int) -> list[Tensor]:
    """(B, T, (h1 + h2 + ...) D) to one tensor (B, h, T, D) for each h."""
    B, T, X = x_BTX.shape
    return list(x_BTX.view(B, T, sum(heads), X // sum(heads)).transpose(1, 2).split(heads, dim=1))


def merge_heads(x_BHTD: Tensor) -> Tensor:
    return x_BHTD.transpose(1, 2).flatten(2)


@accelerated(cpu_attention.decode, triton.decode_attention, cpu_attention.causal, fused.attention)
def attention(
    q_BHTD: Tensor, k_BGSD: Tensor, v_BGSE: Tensor, scale: float, window: int = 0, position: Tensor | None = None
) -> Tensor:
    """Causal softmax attention of the last T of S tokens; query head h uses KV head h // (H/G). Returns (B, H, T, E).

    With a window each token sees only itself and the window - 1 tokens before it. With a `position`, one for all
    sequences (1) or one each (B), int64 on the device, T is 1 and the token sees the slots up to it, or all S.
    """
    H, T, G, S = *q_BHTD.shape[1:3], *k_BGSD.shape[1:3]
    slot_S = torch.arange(S, device=q_BHTD.device)
    query = slot_S[S - T :, None] if position is None else position.view(-1, 1, 1, 1)
    seen = (slot_S <= query) & (slot_S > query - (window or S)) if position is None else slot_S <= query
    k_BHSD, v_BHSE = (x.repeat_interleave(H // G, dim=1) for x in (k_BGSD, v_BGSE))
    score_BHTS = (q_BHTD @ k_BHSD.mT * scale).masked_fill(~seen, float("-inf"))
    return score_BHTS.softmax(-1) @ v_BHSE


@accelerated(fused.masked_attention)
def masked_attention(q_BHTD: Tensor, k_BGSD: Tensor, v_BGSE: Tensor, scale: float, mask: Tensor) -> Tensor:
    """Softmax attention with a mask (B, H, T, S) that is added to the scores, and may have gradients."""
    k_BHSD, v_BHSE = (x.repeat_interleave(q_BHTD.shape[1] // x.shape[1], dim=1) for x in (k_BGSD, v_BGSE))
    return (q_BHTD @ k_BHSD.mT * scale + mask).softmax(-1) @ v_BHSE


@accelerated(cpu_attention.paged_decode)
def paged_attention(
    q_BH1D: Tensor, k_PGCD: Tensor, v_PGCE: Tensor, scale: float, position_B: Tensor, table_BN: Tensor
) -> Tensor:
    """`attention` of one token a sequence, whose token t lies in slot t % C of block table[t // C]."""
    k_BGSD, v_BGSE = (x[table_BN].transpose(1, 2).flatten(2, 3) for x in (k_PGCD, v_PGCE))
    return attention(q_BH1D, k_BGSD, v_BGSE, scale, 0, position_B)


def self_score(q: Tensor, k: Tensor) -> Tensor:
    """Q_n K_n^T of each token with itself, (..., 1), summed in fp64.

    For a sequence's first token it is the whole sum, and the norm that follows scales it up, and its rounding with it.
    """
    return (q.double() * k.double()).sum(-1, keepdim=True).to(q.dtype)


@accelerated(cpu.retention_step, triton.retention_step)
def retention_step(q_BH1D: Tensor, k_BH1D: Tensor, v_BH1D: Tensor, decay_BH1: Tensor, state_BHDD: Tensor) -> Tensor:
    """One token of gated retention: S_n = gamma_n S_{n-1} + K_n^T V_n, output Q_n S_n (B, H, 1, D) (YOCO,
    arXiv 2405.05254, section 3.2). S_n replaces S_{n-1} in the storage of the state, in its dtype."""
    decayed_BHDD = at_least_fp32(state_BHDD) * decay_BH1[..., None]
    state_BHDD.copy_(decayed_BHDD + k_BH1D.mT @ v_BH1D)
    return q_BH1D @ decayed_BHDD + self_score(q_BH1D, k_BH1D) * v_BH1D


# Memory and steps


@accelerated(cpu.huge_pages)
def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


@accelerated(cpu.read_all)
def read_all(x: Tensor) -> Tensor | float:
    """The sum of x, which reads all of it: for measuring bandwidth."""
    return x.sum()


@accelerated(replay.decode_step)
def decode_step(model: Any, tokens_B: Tensor, cache: Any) -> Tensor:
    """Logits (B, V) after one more token of each sequence, whose keys and values go into the cache."""
    return model.append(tokens_B[:, None], cache, cache.length)
