"""What only a GPU has: bf16 models and bf16 autocast, caches on the device."""

import pytest
import torch
from helpers import cached_logits, each_variant, make

from archs import ops
from archs.kernels import checked, fused

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU; there is none here")


@each_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cached_logits_equal_the_full_forward_on_a_gpu(arch, options, dtype):
    model = make(arch, options).to("cuda", dtype)
    tokens = torch.randint(97, (3, 70), device="cuda")
    with torch.inference_mode():
        full = model(tokens)
        cache = model.new_cache(3, 75)
        logits = cached_logits(model, tokens, [21, 1, 9], cache)
    assert cache.nbytes == 3 * model.kv_stored_bytes(75, dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    for t in logits:
        torch.testing.assert_close(logits[t], full[:, t], rtol=0, atol=tolerance * full.abs().max().item())


@each_variant
def test_a_bf16_training_step_on_a_gpu_has_finite_gradients(arch, options):
    model = make(arch, options).to("cuda").train()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = model(torch.randint(97, (2, 64), device="cuda")).float().logsumexp(-1).mean()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    "shape", [(4, 4, 64, 64, 32), (8, 2, 64, 300, 256), (4, 1, 16, 40, 7), (4, 4, 100, 70, 32)], ids=str
)
def test_windows_of_flash_attention_equal_the_formula(shape):
    """With its gradient; heads, KV heads, head size, tokens, window. There may be tokens before the first query."""
    H, G, D, T, window = shape
    S = T + min(window - 1, 9)
    q, k, v = (torch.randn(2, n, t, D, device="cuda", dtype=torch.bfloat16) for n, t in ((H, T), (G, S), (G, S)))
    arguments = q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), 0.2, window
    assert fused.windowed_flash.supports(*arguments) == (fused.HAS_WINDOWS and D % 8 == 0)
    if D % 8 == 0 and fused.HAS_WINDOWS:
        errors = list(checked._errors(fused.windowed_flash, ops.attention.formula, arguments, trains=True))
        assert max(errors) <= checked.TOLERANCE[torch.bfloat16]


def test_kernels_are_right_here():
    """None was found to be wrong by the tests before."""
    assert not checked.WRONG
