"""YOCO: one shared cache, constant self-decoder memory, early exit; the forms of gated retention agree."""

import pytest
import torch

from archs import build
from archs.yoco import retention_chunkwise, retention_recurrent

SHAPE = {"vocab_size": 61, "width": 64, "layers": 6, "heads": 4, "context": 64}
SWA = {"kv_heads": 2, "self_decoder": "swa", "window": 9}
GRET = {"kv_heads": 2, "self_decoder": "gret"}


def inputs(T):
    q, k, v = (torch.randn(2, 3, T, 8) for _ in range(3))
    return q, k, v, torch.nn.functional.logsigmoid(torch.randn(2, 3, T)), torch.randn(2, 3, 8, 8)


def by_definition(q, k, v, log_decay, state):
    """D_nm = product of gamma from m+1 to n; the state decays by all gammas so far."""
    outputs = []
    for n in range(q.shape[2]):
        total = log_decay[:, :, : n + 1].sum(-1).exp()[..., None, None] * (q[:, :, n : n + 1] @ state)
        for m in range(n + 1):
            decay = log_decay[:, :, m + 1 : n + 1].sum(-1).exp()[..., None, None]
            total = total + decay * (q[:, :, n : n + 1] @ k[:, :, m : m + 1].mT) @ v[:, :, m : m + 1]
        outputs.append(total)
    return torch.cat(outputs, 2)


@pytest.mark.parametrize("chunk", [1, 4, 7, 100])
def test_parallel_chunkwise_and_recurrent_retention_agree(chunk):
    q, k, v, log_decay, state = inputs(21)
    out, last = retention_chunkwise(q, k, v, log_decay, state, chunk)
    torch.testing.assert_close(out, by_definition(q, k, v, log_decay, state), rtol=1e-4, atol=1e-4)
    in_torch, _ = retention_chunkwise(q.clone().requires_grad_(), k, v, log_decay, state, chunk)
    torch.testing.assert_close(out, in_torch.detach(), rtol=1e-5, atol=1e-5)
    for t in range(21):
        one = slice(t, t + 1)
        part = q[:, :, one], k[:, :, one], v[:, :, one], log_decay[:, :, one]
        in_torch = state.clone()
        step = retention_recurrent(*(x.clone().requires_grad_() for x in part), in_torch)
        ours = retention_recurrent(*part, state)
        torch.testing.assert_close(ours, step.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(state, in_torch.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(step, out[:, :, one], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state, last, rtol=1e-4, atol=1e-4)


def test_chunks_of_retention_do_not_change_the_model(monkeypatch):
    model = build("yoco", **SHAPE, **GRET).eval()
    tokens = torch.randint(61, (2, 50))
    with torch.inference_mode():
        whole = model(tokens)
        monkeypatch.setattr("archs.yoco.CHUNK", 7)
        torch.testing.assert_close(model(tokens), whole, rtol=1e-4, atol=1e-5)
        cache = model.new_cache(2, 50)
        model.prefill(tokens[:, :31], cache)
        torch.testing.assert_close(model.prefill(tokens[:, 31:], cache), whole[:, -1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [SWA, GRET], ids=["swa", "gret"])
def test_early_exit_prefill_equals_the_full_forward_and_runs_the_cross_decoder_once(options):
    model = build("yoco", **SHAPE, **options).eval()
    tokens = torch.randint(61, (2, 50))
    lengths = []
    for block in model.blocks[3:]:
        block.register_forward_hook(lambda module, args, output: lengths.append(output.shape[1]))
    with torch.inference_mode():
        exit_early = model.prefill(tokens, model.new_cache(2, 50))
        assert lengths == [1, 1, 1]
        torch.testing.assert_close(exit_early, model(tokens)[:, -1], rtol=1e-4, atol=1e-5)


def test_the_shared_cache_is_stored_once_and_read_by_every_cross_layer():
    model = build("yoco", **SHAPE, **SWA)
    per_token = 2 * 2 * 16 * 2  # keys and values, KV heads, head size, bf16
    window = 3 * per_token * 9
    assert model.new_cache(1, 40, torch.bfloat16).nbytes == 40 * per_token + window
    assert model.kv_stored_bytes(40, torch.bfloat16) == 40 * per_token + window
    assert model.kv_read_bytes(40, torch.bfloat16) == 3 * 40 * per_token + window


def test_a_storage_that_two_parts_share_is_counted_once():
    cache = build("yoco", **SHAPE, **SWA).new_cache(1, 40)
    held = cache.nbytes
    cache.parts += [cache.parts[-1], {"view": [cache.parts[-1].streams[0][:, :, :3]]}]
    assert cache.nbytes == held


@pytest.mark.parametrize("options", [SWA, GRET], ids=["swa", "gret"])
def test_the_self_decoder_holds_the_same_however_long_the_sequence(options):
    model = build("yoco", **SHAPE, **options)
    short, long = (sum(t.numel() for p in model.new_cache(1, n).parts[:3] for t in tensors(p)) for n in (9, 5000))
    assert short == long == model.kv_constant_bytes(torch.float32) // 4


def tensors(part):
    return [part.state] if hasattr(part, "state") else part.streams


def test_the_ring_holds_exactly_the_window_in_slots_by_position():
    model = build("yoco", **SHAPE, **SWA)
    tokens, caches = torch.randint(61, (1, 31)), []
    for chunks in ([31], [5, 9, 1, 10, 6]):
        cache, at = model.new_cache(1, 40), 0
        for chunk in chunks:
            model.prefill(tokens[:, at : at + chunk], cache)
            at += chunk
        caches.append(cache)
    for part, other in zip(caches[0].parts[:3], caches[1].parts[:3], strict=True):
        assert part.streams[0].shape == (1, 2, 9, 16)
        torch.testing.assert_close(part.streams[0], other.streams[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(part.recent(31, 4)[0], part.streams[0][:, :, [27 % 9, 28 % 9, 29 % 9, 30 % 9]])


def test_a_token_beyond_the_window_reaches_a_self_decoder_layer_no_more():
    attention = build("yoco", **SHAPE, **SWA).blocks[0].attention
    x = torch.randn(1, 30, 64, requires_grad=True)
    from archs.attention import rope_table

    attention(x, rope_table(0, 30, 16, 1e4, "cpu"))[:, -1].sum().backward()
    seen = x.grad.abs().sum(-1)[0] > 0
    assert seen.tolist() == [False] * 21 + [True] * 9


def test_half_the_layers_need_an_even_number():
    with pytest.raises(ValueError, match="layers=5: must be even"):
        build("yoco", **SHAPE | {"layers": 5}, **SWA)
    with pytest.raises(ValueError, match="self_decoder='full': must be one of swa, gret"):
        build("yoco", **SHAPE, **SWA | {"self_decoder": "full"})
