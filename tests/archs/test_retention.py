"""The retention kernel of a GPU, by Triton's interpreter where there is none, against the recurrence in fp64."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton comes with torch's CUDA build; it is not here")

from archs.retention import retain

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("D", [16, 20, 64, 130])
def test_one_token_is_the_recurrence(D, kept):
    B, H = 2, 3
    qkv = torch.randn(B, 1, 3 * H, D, device=DEVICE).transpose(1, 2)  # heads of one projection, as a layer gives them
    q, k, v = qkv.split(H, 1)
    decay = torch.rand(B, 1, H, device=DEVICE).transpose(1, 2)
    state = torch.randn(B, H, D, D, device=DEVICE, dtype=kept)
    after = decay.double()[..., None] * state.double() + k.double().mT @ v.double()
    out = retain(q, k, v, decay, state)
    torch.testing.assert_close(out, (q.double() @ after).float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state, after.to(kept))
