"""PyTorch's fused attention, kept on its fast paths, and what it pays to compile or to run at once on a device.

Shapes as in `archs/ops.py`.
"""

import contextlib
import functools
import importlib
import inspect
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from archs.kernels import constant, kernel
from archs.kernels.cpu.build import compiler, is_transformed

# cuDNN is PyTorch's first choice on Hopper and large Blackwell. For one query it makes a plan for each length, it fails
# with a mask that needs a gradient, and its backward with a mask has given NaN (pytorch/pytorch#196678).
CUDNN_FIRST = 9, 10  # major capabilities
NOT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
COMPILED_FROM = {"cuda": 2e15, "cpu": 2e14}  # FLOPs of a run; compiling takes a minute or two
MOST_HEADS = 65_535  # of a kernel's grid on a GPU
MASK_AT_ONCE = 2**27  # numbers
TOKENS_AT_ONCE = {"cpu": 2**11}  # in a layer during prefill: their activations stay in a CPU's caches


def gains_by_compiling(device: torch.device, flops: float) -> bool:
    """True if a training run of this many FLOPs is faster with torch.compile, its compile time included."""
    return flops > COMPILED_FROM.get(device.type, float("inf")) and can_compile(device)


@functools.cache
def can_compile(device: torch.device) -> bool:
    """True if torch.compile works here, which is found by compiling a line. False, after a warning, where it fails: for
    one without Python's headers."""
    if compiler() is None:
        return False
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as e:
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        warnings.warn(f"training goes without torch.compile, more slowly: {reason}", stacklevel=2)
        return False
    return True


def sequences_at_once(tokens_BT: Tensor) -> int:
    """How many sequences of a prompt should go through the layers together."""
    return max(1, TOKENS_AT_ONCE.get(tokens_BT.device.type, 2**17) // tokens_BT.shape[1])


def are_columns(v: Tensor, k: Tensor) -> bool:
    """True if the values are the first columns of the keys, in the same memory (MLA's latent). Under torch.compile and
    torch.func tensors have no address, and the answer is False."""
    if v.shape[-1] >= k.shape[-1] or torch.compiler.is_compiling() or is_transformed():
        return False
    return v.data_ptr() == k.data_ptr() and v.stride() == k.stride()


def has_sequences(q: Tensor, *others: object) -> bool:
    return len(q) > 0


def visible(T: int, S: int, window: int, position: Tensor | None, device: torch.device) -> Tensor:
    """Which of S tokens the last T see, or a query at each position; True where it broadcasts to (B, H, T, S)."""
    slot_S = torch.arange(S, device=device)
    if position is not None:
        return slot_S <= position.view(-1, 1, 1, 1)
    query_T1 = slot_S[S - T :, None]
    return (slot_S <= query_T1) & (slot_S > query_T1 - (window or S))


@constant
def capability(device: torch.device) -> tuple[int, int]:
    """Of an NVIDIA GPU; (0, 0) of another's."""
    return (0, 0) if torch.version.hip else torch.cuda.get_device_capability(device)


def can_window(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int = 0, position=None, sinks=None) -> bool:
    """What flash attention computes: several queries on a GPU from Ampere on, in half precision."""
    fits = (
        q.is_cuda and position is None and sinks is None and 0 < window < k.shape[2] and q.shape[2] > 1 and len(q) > 0
    )
    fits = fits and q.dtype == k.dtype == v.dtype and q.dtype in (torch.float16, torch.bfloat16)
    fits = fits and q.shape[3] == v.shape[3] <= 256 and q.shape[3] % 8 == 0
    return fits and HAS_WINDOWS and capability(q.device) >= (8, 0)


# With windows from torch 2.12 on. scaled_dot_product_attention takes a window as a mask, and computes much of what it
# hides. Only a GPU has it, and it imports torch's compiler, which takes a second.
varlen = importlib.import_module("torch.nn.attention.varlen") if torch.cuda.is_available() else None
HAS_WINDOWS = bool(varlen) and {"window_size", "enable_gqa"} <= inspect.signature(varlen.varlen_attn).parameters.keys()


@kernel(can_window, checked=True)
def windowed_flash(
    q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, scale: float, window: int, position=None, sinks=None
) -> Tensor:
    """`ops.attention` with a window, by flash attention for sequences of different lengths, which knows windows."""
    (B, H, T), (G, S) = q_BHTD.shape[:3], k_BGSD.shape[1:3]
    rows = [x.transpose(1, 2).flatten(0, 1) for x in (q_BHTD, k_BGSD, v_BGSD)]
    starts = [torch.arange(0, (B + 1) * n, n, dtype=torch.int32, device=q_BHTD.device) for n in (T, S)]
    how = {"scale": scale, "window_size": (window - 1, 0), "enable_gqa": H != G}
    return varlen.varlen_attn(*rows, *starts, T, S, **how).unflatten(0, (B, T)).transpose(1, 2)


@kernel(has_sequences, checked=True)
def attention(
    q_BHTD: Tensor, k_BGSD: Tensor, v_BGSE: Tensor, scale: float, window: int = 0, position=None, sinks=None
) -> Tensor:
    """`ops.attention` through scaled_dot_product_attention."""
    (B, H, T, D), (G, S), E = q_BHTD.shape, k_BGSD.shape[1:3], v_BGSE.shape[-1]
    if are_columns(v_BGSE, k_BGSD):
        v_BGSE = k_BGSD  # equal sizes are on the fast path; the further columns are cut off
    if 0 < window < S and position is None:  # no query sees the tokens before these
        k_BGSD, v_BGSE = k_BGSD[:, :, -(T + window - 1) :], v_BGSE[:, :, -(T + window - 1) :]
        S = k_BGSD.shape[2]
    if 0 < window < S and T > 1:
        return windowed(q_BHTD, k_BGSD, v_BGSE, scale, window, sinks)[..., :E]
    if sinks is not None:
        return with_sinks(q_BHTD, k_BGSD, v_BGSE, scale, position, sinks)[..., :E]
    if T == 1:  # the query heads of a KV head become its query length: each cached byte is read once
        mask = None if position is None else visible(T, S, 0, position, q_BHTD.device)
        return sdpa(q_BHTD.reshape(B, G, H // G, D), k_BGSD, v_BGSE, scale, mask).reshape(B, H, 1, -1)[..., :E]
    mask = None if T == S else visible(T, S, 0, None, q_BHTD.device)
    return sdpa(q_BHTD, k_BGSD, v_BGSE, scale, mask, causal=T == S)[..., :E]


@kernel(has_sequences)
def masked_attention(q_BHTD: Tensor, k_BGSD: Tensor, v_BGSE: Tensor, scale: float, mask: Tensor, sinks=None) -> Tensor:
    S, E = v_BGSE.shape[2:]
    if sinks is not None:  # one more key, of zeros, and value: the mask adds the sink to a score of 0
        k_BGSD, v_BGSE = (F.pad(x, (0, 0, 0, 1)) for x in (k_BGSD, v_BGSE))
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=q_BHTD.dtype).masked_fill(~mask, float("-inf"))
        shape = torch.broadcast_shapes((1, q_BHTD.shape[1], 1, 1), (*mask.shape[:-1], 1))
        mask = torch.cat((mask.expand(*shape[:-1], S), sinks.to(mask.dtype).expand(shape)), dim=-1)
    return sdpa(q_BHTD, k_BGSD, v_BGSE, scale, mask)[..., :E]


def with_sinks(q_BHTD: Tensor, k_BGSD: Tensor, v_BGSE: Tensor, scale: float, position, sinks: Tensor) -> Tensor:
    """Some queries at a time, as the mask has a number for each head and each pair of tokens."""
    (H, T), S = q_BHTD.shape[1:3], k_BGSD.shape[2]
    at_once, parts = max(1, MASK_AT_ONCE // (H * S)), []
    for first in range(0, T, at_once):
        q = q_BHTD[:, :, first : first + at_once]
        seen = S - T + first + q.shape[2]
        mask = visible(q.shape[2], seen, 0, position, q.device)
        parts.append(masked_attention(q, k_BGSD[:, :, :seen], v_BGSE[:, :, :seen], scale, mask, sinks))
    return torch.cat(parts, dim=2)


def sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """scaled_dot_product_attention on its fast paths; the result may have further columns of zeros.

    These want one dtype and, except for cuDNN's, equal key and value sizes. On a CPU they want fp32 under autocast, as
    bf16 has a backward 4 times as slow. On a GPU those that take a mask do not know groups: there, in training and in
    prefill alone, the keys are repeated.
    """
    context, groups = contextlib.nullcontext(), q.shape[1] // k.shape[1]
    k, v = k.to(q.dtype), v.to(q.dtype)
    if q.is_cuda:
        if mask is not None and groups > 1:
            k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        if not causal:
            context = sdpa_kernel(NOT_CUDNN, set_priority=True)
        if causal and q.dtype in (torch.float16, torch.bfloat16) and capability(q.device)[0] not in CUDNN_FIRST:
            v = F.pad(v, (0, max(0, k.shape[-1] - v.shape[-1])))  # flash attention
    else:
        v = F.pad(v, (0, max(0, k.shape[-1] - v.shape[-1])))
        if torch.is_autocast_enabled("cpu"):
            context = torch.autocast("cpu", enabled=False)
            q, k, v = q.float(), k.float(), v.float()
            mask = mask.float() if mask is not None and mask.is_floating_point() else mask
    with context:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )


def windowed(q_BHTD: Tensor, k_BGSD: Tensor, v_BGSE: Tensor, scale: float, window: int, sinks=None) -> Tensor:
    """Queries in blocks of `window`, each against its own block of keys and the one before it, so that time and memory
    grow with T x 2 window and not with T x S. S - T is at most window - 1."""
    (B, H, T, D), (G, S) = q_BHTD.shape, k_BGSD.shape[1:3]
    if q_BHTD.is_cuda and B * H > MOST_HEADS:
        parts = zip(*(x.split(max(1, MOST_HEADS // H)) for x in (q_BHTD, k_BGSD, v_BGSE)), strict=True)
        return torch.cat([windowed(*part, scale, window, sinks) for part in parts])
    before, blocks = S - T, -(-T // window)
    tail = blocks * window - T

    def pairs_of_blocks(x_BGSD: Tensor) -> Tensor:  # (blocks, B G, 2 window, D)
        x = F.pad(x_BGSD, (0, 0, window - before, tail)).reshape(B * G, blocks + 1, window, -1)
        return torch.cat((x[:, :-1], x[:, 1:]), dim=2).transpose(0, 1)

    q = F.pad(q_BHTD, (0, 0, 0, tail)).reshape(B * H, blocks, window, D).transpose(0, 1)
    ones = torch.ones(window, 2 * window, dtype=torch.bool, device=q.device)
    mask = (ones.triu(1) & ones.tril(window)).repeat(blocks, 1, 1, 1)
    mask[0, :, :, : window - before] = False  # padding before the first key
    sinks = None if sinks is None else sinks.repeat(1, B, 1, 1)
    out = masked_attention(q, pairs_of_blocks(k_BGSD), pairs_of_blocks(v_BGSE), scale, mask, sinks)
    return out.transpose(0, 1).reshape(B, H, blocks * window, -1)[:, :, :T]
