"""Attention of one new token over a static cache on a GPU, each cached byte read once: split-KV in Triton.

The tokens held are split among programs, so that a small batch fills the GPU too (Flash-Decoding, Dao et al. 2023); the
queries of a KV head, up to 64, go through one program, so that its keys and values are loaded once for them; and where
the values are a part of the keys (MLA's latent, arXiv 2405.04434), one tile serves as both, as in FlashMLA. How many
tokens are held is read on the device: a CUDA graph of the step holds for every length.

With TRITON_INTERPRET=1 in the environment before this is imported, the kernels run on CPU tensors, slowly.

Shapes: B batch, H query heads, G KV heads, M = H/G, S slots, D key size, E value size, N slots a tile.
"""

import functools
import itertools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from archs.kernels.fused import are_columns

LOG2_E = 1.4426950408889634
TILE_BYTES = 2**14
STAGES = 3  # Triton's default
FEWEST_TILES = 2  # a split is worth its share of the second kernel


@triton.jit
def attend_split(
    q_ptr, k_ptr, v_ptr, position_ptr, part_ptr, weight_ptr, scale,
    q_b, q_g, q_m, k_b, k_g, k_s, v_b, v_g, v_s,
    G, M, S, splits,
    A: tl.constexpr, R: tl.constexpr, E: tl.constexpr, SHARED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Softmax attention of BLOCK_M queries over one split: weighted mean of values, and log2 of the weights' sum.

    The key's D columns are A and then R; the second part is there where the values are the first A of the keys.
    """
    head, split, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, g = (head // G).to(tl.int64), (head % G).to(tl.int64)
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    a, r, e = tl.arange(0, BLOCK_A), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_E)
    n = tl.arange(0, BLOCK_N)

    seen = tl.minimum(tl.load(position_ptr).to(tl.int32) + 1, S)
    per_split = tl.cdiv(tl.cdiv(seen, splits), BLOCK_N) * BLOCK_N
    first = split * per_split
    last = tl.minimum(first + per_split, seen)

    q_row = q_ptr + b * q_b + g * q_g + m[:, None] * q_m
    q_MA = tl.load(q_row + a[None, :], mask=(m[:, None] < M) & (a[None, :] < A), other=0.0)
    if R:
        q_MR = tl.load(q_row + A + r[None, :], mask=(m[:, None] < M) & (r[None, :] < R), other=0.0)
    k_ptr += b * k_b + g * k_g
    v_ptr += b * v_b + g * v_g

    top_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
    sum_M = tl.zeros([BLOCK_M], tl.float32)
    out_ME = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    for start in range(first, last, BLOCK_N):
        s = start + n
        live = s < last
        k_row = k_ptr + s[:, None] * k_s
        k_NA = tl.load(k_row + a[None, :], mask=live[:, None] & (a[None, :] < A), other=0.0)
        score_MN = tl.dot(q_MA, tl.trans(k_NA), input_precision=PRECISION)
        if R:
            k_NR = tl.load(k_row + A + r[None, :], mask=live[:, None] & (r[None, :] < R), other=0.0)
            score_MN += tl.dot(q_MR, tl.trans(k_NR), input_precision=PRECISION)
        score_MN = tl.where(live[None, :], score_MN * scale, float("-inf"))
        new_top_M = tl.maximum(top_M, tl.max(score_MN, 1))
        weight_MN = tl.exp2(score_MN - new_top_M[:, None])
        fade_M = tl.exp2(top_M - new_top_M)
        if SHARED:
            v_NE = k_NA
        else:
            v_NE = tl.load(v_ptr + s[:, None] * v_s + e[None, :], mask=live[:, None] & (e[None, :] < E), other=0.0)
        sum_M = sum_M * fade_M + tl.sum(weight_MN, 1)
        out_ME = out_ME * fade_M[:, None] + tl.dot(weight_MN.to(v_NE.dtype), v_NE, input_precision=PRECISION)
        top_M = new_top_M

    row = (head.to(tl.int64) * splits + split) * M + m
    sum_M = tl.where(first < last, sum_M, 1.0)  # of an empty split the weight below is 2^-inf, its output 0
    tl.store(weight_ptr + row, top_M + tl.log2(sum_M), mask=m < M)
    out_ME = out_ME / sum_M[:, None]
    tl.store(part_ptr + row[:, None] * E + e[None, :], out_ME, mask=(m[:, None] < M) & (e[None, :] < E))


@triton.jit
def combine_splits(
    part_ptr, weight_ptr, sink_ptr, out_ptr, G, M, splits,
    SINKS: tl.constexpr, E: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One query's mean over the splits, by the sums of their weights, to which a sink adds its own."""
    head, m = tl.program_id(0).to(tl.int64), tl.program_id(1)
    s, e = tl.arange(0, BLOCK_S), tl.program_id(2) * BLOCK_E + tl.arange(0, BLOCK_E)
    row_S = (head * splits + s) * M + m
    weight_S = tl.load(weight_ptr + row_S, mask=s < splits, other=float("-inf"))
    top = tl.max(weight_S, 0)
    if SINKS:
        sink = tl.load(sink_ptr + head % G * M + m).to(tl.float32) * 1.4426950408889634
        top = tl.maximum(top, sink)
    weight_S = tl.exp2(weight_S - top)
    total = tl.sum(weight_S, 0)
    if SINKS:
        total += tl.exp2(sink - top)
    mask = (s[:, None] < splits) & (e[None, :] < E)
    part_SE = tl.load(part_ptr + row_S[:, None] * E + e[None, :], mask=mask, other=0.0)
    out_E = tl.sum(part_SE * weight_S[:, None], 0) / total
    tl.store(out_ptr + (head * M + m) * E + e, out_E.to(out_ptr.dtype.element_ty), mask=e < E)


class Chip(NamedTuple):
    """What tiles depend on."""

    processors: int
    shared_bytes: int  # shared memory that a program may have


@functools.cache
def chip(device: torch.device) -> Chip:
    if device.type != "cuda":
        return Chip(4, 101_376)
    properties = torch.cuda.get_device_properties(device)
    return Chip(properties.multi_processor_count, properties.shared_memory_per_block_optin)


class Tiling(NamedTuple):
    """How attention is divided among programs."""

    stages: int  # num_stages: stages - 1 tiles are fetched ahead
    queries: int  # a program
    slots: int  # a tile
    warps: int  # a program
    programs: int  # a processor, enough to have loads under way always

    def splits(self, heads: int, S: int, processors: int) -> int:
        """Of each of so many heads' tokens."""
        return max(1, min(self.programs * processors // heads, S // (FEWEST_TILES * self.slots), 128))

    def shared_bytes(self, key: int, value: int, itemsize: int) -> int:
        """At most, what Triton allots to a program: queries, tiles under way, weights, and a number of each query that
        warps exchange. Hopper's and Blackwell's matrix instructions, for 64 queries in half precision, hold on to a
        tile that they read."""
        tiles = STAGES if self.queries == 64 and itemsize == 2 else self.stages - 1
        numbers = self.queries * (key + self.slots) + tiles * self.slots * (key + value)
        return numbers * itemsize + 4 * self.queries * self.warps


def tiling(M: int, A: int, R: int, E: int, dtype: torch.dtype, shared_bytes: int) -> Tiling:
    """The sizes are powers of two; R is 0 where no columns are left, E where the values are a part of the keys.

    What does not fit into `shared_bytes` gets half the slots, then half the queries, then fewer tiles ahead. As many
    programs as a processor can hold where each has a large tile and large outputs, which the second kernel reads
    (bench/tiles.py tries others).
    """
    queries, slots = min(64, M), min(128, max(16, TILE_BYTES // (A * dtype.itemsize)))
    warps, programs = 8 if dtype == torch.float32 or A > 256 else 4, 8 if E else 4
    for sizes in itertools.product((STAGES, 2), halves(queries), halves(slots)):
        tile = Tiling(*sizes, warps, programs)
        if tile.shared_bytes(A + R, E, dtype.itemsize) <= shared_bytes:
            break
    return tile


def halves(size: int) -> list[int]:
    """Of a power of two, down to 16, the smallest size of a product."""
    return [2**n for n in range(size.bit_length() - 1, 3, -1)]


def split_kv_attention(
    q_BH1D: Tensor, k_BGSD: Tensor, v_BGSE: Tensor, scale: float, position: Tensor, sinks_1H11: Tensor | None = None
) -> Tensor:
    """Attention of one token a sequence over the slots up to `position` (device tensor, one number), or all S.

    Query head h uses KV head h // (H/G). Keys, values and queries have one dtype and contiguous last dimensions; sinks
    are those of `ops.softmax`, in any dtype. Returns (B, H, 1, E).
    """
    (B, H, _, D), (G, S), E = q_BH1D.shape, k_BGSD.shape[1:3], v_BGSE.shape[3]
    M, shared = H // G, are_columns(v_BGSE, k_BGSD)
    A = E if shared else D
    q_BGMD = q_BH1D.reshape(B, G, M, D)
    block_M, block_A, block_R, block_E = (max(16, triton.next_power_of_2(size)) for size in (M, A, D - A, E))
    processors, shared_bytes = chip(q_BH1D.device)
    sizes = block_M, block_A, block_R if D > A else 0, 0 if shared else block_E
    tile = tiling(*sizes, k_BGSD.dtype, shared_bytes)
    splits = tile.splits(B * G, S, processors)
    part = torch.empty(B * G * splits * M * E, dtype=torch.float32, device=q_BH1D.device)
    weight = torch.empty(B * G * splits * M, dtype=torch.float32, device=q_BH1D.device)
    out_BH1E = torch.empty(B, H, 1, E, dtype=q_BH1D.dtype, device=q_BH1D.device)
    precision = "ieee" if q_BH1D.dtype == torch.float32 else "tf32"
    attend_split[(B * G, splits, -(-M // tile.queries))](
        q_BGMD, k_BGSD, v_BGSE, position, part, weight, scale * LOG2_E,
        *q_BGMD.stride()[:3], *k_BGSD.stride()[:3], *v_BGSE.stride()[:3],
        G, M, S, splits,
        A=A, R=D - A, E=E, SHARED=shared, PRECISION=precision,
        BLOCK_M=tile.queries, BLOCK_N=tile.slots, BLOCK_A=block_A, BLOCK_R=block_R, BLOCK_E=block_E,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    some = min(64, block_E)  # of the columns: all would not fit into a program's registers
    combine_splits[(B * G, M, -(-E // some))](
        part, weight, weight if sinks_1H11 is None else sinks_1H11.contiguous(), out_BH1E, G, M, splits,
        SINKS=sinks_1H11 is not None, E=E, BLOCK_S=triton.next_power_of_2(splits), BLOCK_E=some,
    )  # fmt: skip
    return out_BH1E
