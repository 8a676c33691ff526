"""Gated retention of one new token on a GPU: each number of the state read once and written once, in Triton.

In torch's operators the state would be widened, faded, read, added to and narrowed, each through memory. With
TRITON_INTERPRET=1 in the environment before this is imported, the kernel runs on CPU tensors, slowly.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2**12  # numbers of the state a program holds in registers


@triton.jit
def retain_columns(
    q_ptr, k_ptr, v_ptr, decay_ptr, state_ptr, out_ptr,
    q_b, q_h, k_b, k_h, v_b, v_h, decay_b, decay_h,
    H, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One head's output in BLOCK_E columns, and these columns of its state."""
    head = tl.program_id(0).to(tl.int64)
    b, h = head // H, head % H
    d, e = tl.arange(0, BLOCK_D), tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    q_D = tl.load(q_ptr + b * q_b + h * q_h + d, mask=d < D, other=0.0)
    k_D = tl.load(k_ptr + b * k_b + h * k_h + d, mask=d < D, other=0.0)
    v_E = tl.load(v_ptr + b * v_b + h * v_h + e, mask=e < D, other=0.0)
    decay = tl.load(decay_ptr + b * decay_b + h * decay_h)

    at = state_ptr + head * D * D + d[:, None] * D + e[None, :]
    mask = (d[:, None] < D) & (e[None, :] < D)
    state_DE = tl.load(at, mask=mask, other=0.0).to(tl.float32) * decay
    own = tl.sum((q_D * k_D).to(tl.float64), 0).to(tl.float32)
    out_E = tl.sum(q_D[:, None] * state_DE, 0) + own * v_E
    tl.store(out_ptr + head * D + e, out_E, mask=e < D)
    state_DE += k_D[:, None] * v_E[None, :]
    tl.store(at, state_DE.to(state_ptr.dtype.element_ty), mask=mask)


def retain(q_BH1D: Tensor, k_BH1D: Tensor, v_BH1D: Tensor, decay_BH1: Tensor, state_BHDD: Tensor) -> Tensor:
    """`ops.retention_step`. All except the state are fp32 with contiguous last dimensions; the state is contiguous."""
    B, H, _, D = q_BH1D.shape
    out_BH1D = torch.empty(B, H, 1, D, dtype=torch.float32, device=q_BH1D.device)
    rows = triton.next_power_of_2(D)
    columns = min(rows, max(16, TILE // rows))
    retain_columns[(B * H, -(-D // columns))](
        q_BH1D, k_BH1D, v_BH1D, decay_BH1, state_BHDD, out_BH1D,
        *(stride for x in (q_BH1D, k_BH1D, v_BH1D, decay_BH1) for stride in x.stride()[:2]),
        H, D=D, BLOCK_D=rows, BLOCK_E=columns,
    )  # fmt: skip
    return out_BH1D
