"""What only a GPU has: bf16 models and bf16 autocast, caches on the device."""

import pytest
import torch
from helpers import cached_logits, each_variant, make

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
