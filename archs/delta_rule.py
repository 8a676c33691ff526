"""The gated delta rule (Gated DeltaNet, arXiv 2412.06464): token by token for decode, in chunks for training.

Shapes: B batch, T tokens, H heads, D size of a key, E size of a value; within chunks (B, H, N, C, ..): N chunks of C.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 32


def delta_step(q: Tensor, k: Tensor, v: Tensor, a_BH1: Tensor, b_BH1: Tensor, state_BHDE: Tensor) -> Tensor:
    """One token, (B, H, 1, E); the state becomes that after it."""
    state_BHDE.mul_(a_BH1[..., None])
    state_BHDE.add_(k.mT @ ((v - k @ state_BHDE) * b_BH1[..., None]))
    return q @ state_BHDE


def delta_chunkwise(
    q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, b: Tensor, state_BHDE: Tensor, document_BT: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """T tokens (B, H, T, D) with decays and strengths (B, H, T) from a state: (outputs, the state after them).

    Within a chunk the corrections of earlier tokens are the solution of a triangular system (section 3.3). A state is
    not carried into another document; the one that is given belongs to the first.
    """
    T, tail = q.shape[2], -q.shape[2] % CHUNK  # zeros leave the state as it is
    cut = [F.pad(x, (0, 0, 0, tail)).unflatten(2, (-1, CHUNK)) for x in (q, k, v, log_a[..., None], b[..., None])]
    q, k, v, log_a, b = cut
    total = log_a.cumsum(3)  # (B, H, N, C, 1)
    ones = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device)
    seen, carried, kept = (
        ones.tril(),
        torch.ones_like(total, dtype=torch.bool),
        torch.ones_like(total, dtype=torch.bool),
    )
    if document_BT is not None:
        document = document_BT[:, None, torch.arange(T + tail, device=q.device).clamp(max=T - 1)]
        document = document.unflatten(2, (-1, CHUNK))[..., None]
        last = document[..., -1:, :]
        before = torch.cat((document[:, :, :1, :1], last[:, :, :-1]), dim=2)
        seen, carried, kept = seen & (document == document.mT), document == before, document == last
    decay = (total - total.mT).masked_fill(~seen, -torch.inf).exp()
    into, out_of = total.exp() * carried, (total[..., -1:, :] - total).exp() * kept
    system = (b * k @ k.mT * decay).tril(-1) + torch.eye(CHUNK, dtype=q.dtype, device=q.device)
    right = torch.cat((b * v, b * k * into), dim=-1)
    values, keys = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True).split(v.shape[-1], -1)
    scores, whole, outs = q @ k.mT * decay, into[..., -1:, :], []
    for n in range(q.shape[2]):
        new = values[:, :, n] - keys[:, :, n] @ state_BHDE
        outs.append((q[:, :, n] * into[:, :, n]) @ state_BHDE + scores[:, :, n] @ new)
        state_BHDE = whole[:, :, n] * state_BHDE + (k[:, :, n] * out_of[:, :, n]).mT @ new
    return torch.cat(outs, dim=2)[:, :, :T], state_BHDE
