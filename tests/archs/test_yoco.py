"""YOCO: one shared cache, constant self-decoder memory, early exit; the forms of gated retention agree."""

import pytest
import torch
from helpers import make

from archs import ops
from archs.kv import Uncached
from archs.yoco import retention_chunkwise

SWA = {"kv_heads": 2, "self_decoder": "swa", "window": 9}
GRET = {"kv_heads": 2, "self_decoder": "gret"}
both = pytest.mark.parametrize("options", [SWA, GRET], ids=["swa", "gret"])


def by_definition(q, k, v, log_decay, state):
    """D_nm = product of gamma from m+1 to n; the state decays by all gammas so far. A log may be -inf."""
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
    q, k, v = (torch.randn(2, 3, 21, 8) for _ in range(3))
    log_decay, state = torch.nn.functional.logsigmoid(torch.randn(2, 3, 21)), torch.randn(2, 3, 8, 8)
    out, last = retention_chunkwise(q, k, v, log_decay, state, chunk)
    torch.testing.assert_close(out, by_definition(q, k, v, log_decay, state), rtol=1e-4, atol=1e-4)
    for t in range(21):
        one = slice(t, t + 1)
        step = ops.retention_step(q[:, :, one], k[:, :, one], v[:, :, one], log_decay[:, :, one].exp(), state)
        torch.testing.assert_close(step, out[:, :, one], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state, last, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk", [1, 4, 7, 100])
def test_where_a_document_begins_retention_decays_to_nothing(chunk):
    q, k, v = (torch.randn(2, 3, 21, 8) for _ in range(3))
    log_decay, state = torch.nn.functional.logsigmoid(torch.randn(2, 3, 21)), torch.randn(2, 3, 8, 8)
    begins = torch.zeros(2, 21, dtype=torch.long)
    begins[0, [4, 5, 13, 20]] = begins[1, [1, 8, 14]] = 1
    out, last = retention_chunkwise(q, k, v, log_decay, state, chunk, begins.cumsum(1))
    decay = log_decay.masked_fill(begins[:, None] == 1, -torch.inf)
    torch.testing.assert_close(out, by_definition(q, k, v, decay, state), rtol=1e-4, atol=1e-4)
    for t in range(21):
        one = slice(t, t + 1)
        ops.retention_step(q[:, :, one], k[:, :, one], v[:, :, one], decay[:, :, one].exp(), state)
    torch.testing.assert_close(state, last, rtol=1e-4, atol=1e-4)


def test_chunks_of_retention_do_not_change_the_model(monkeypatch):
    model, tokens = make("yoco", GRET), torch.randint(97, (2, 50))
    with torch.inference_mode():
        whole = model(tokens)
        monkeypatch.setattr("archs.yoco.CHUNK", 7)
        torch.testing.assert_close(model(tokens), whole, rtol=1e-3, atol=1e-4)


@both
def test_prefill_runs_the_cross_decoder_for_the_last_token_alone(options):
    model, lengths = make("yoco", options, layers=6), []
    for block in model.blocks[3:]:
        block.register_forward_hook(lambda module, args, output: lengths.append(output.shape[1]))
    model.prefill(torch.randint(97, (2, 50)), model.new_cache(2, 50))
    assert lengths == [1, 1, 1]


def test_the_shared_cache_is_stored_once_and_read_by_every_cross_layer():
    model = make("yoco", SWA, layers=6)
    per_token = 2 * 2 * 16 * 2  # keys and values, KV heads, head size, bf16
    window = 3 * per_token * 9
    cache = model.new_cache(1, 40, torch.bfloat16)
    assert cache.nbytes == model.kv_stored_bytes(40, torch.bfloat16) == 40 * per_token + window
    assert model.kv_read_bytes(40, torch.bfloat16) == 3 * 40 * per_token + window
    cache.layers += [{"view": [cache.layers[-1].tensors[0][:, :, :3]]}]
    assert cache.nbytes == 40 * per_token + window  # a storage counts once, however it is reached


@both
def test_the_self_decoder_holds_the_same_however_long_the_sequence(options):
    model = make("yoco", options, layers=6)
    for tokens in (9, 5000):
        cache = model.new_cache(1, tokens)
        del cache.layers[3:]
        assert cache.nbytes == model.kv_constant_bytes(torch.float32)


def test_the_ring_holds_exactly_the_window_in_slots_by_position():
    model, tokens, caches = make("yoco", SWA), torch.randint(97, (1, 31)), []
    for chunks in ([31], [5, 9, 1, 10, 6]):
        caches.append(model.new_cache(1, 40))
        for part in tokens.split(chunks, 1):
            model.prefill(part, caches[-1])
    rings = [cache.layers[0].tensors[0] for cache in caches]
    assert rings[0].shape == (1, 2, 9, 16)
    torch.testing.assert_close(*rings, rtol=1e-4, atol=1e-5)
    full = make("yoco", SWA | {"window": 40})
    cache = full.new_cache(1, 40)
    full.prefill(tokens, cache)  # in the first layer keys depend on their own tokens alone
    ring_order = torch.arange(22, 31)[(torch.arange(9) - 22) % 9]
    torch.testing.assert_close(rings[0], cache.layers[0].tensors[0][:, :, ring_order], rtol=1e-4, atol=1e-5)


def test_a_self_decoder_layer_sees_no_token_beyond_the_window():
    model = make("yoco", SWA)
    x = torch.randn(1, 30, 64, requires_grad=True)
    model.blocks[0].attention(x, model.chunk(30, 0), Uncached(window=9))[:, -1].sum().backward()
    assert (x.grad.abs().sum(-1)[0] > 0).tolist() == [False] * 21 + [True] * 9
