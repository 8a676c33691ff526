"""A recorded decode step equals the plain step: of every variant, and of operators of every kind."""

import contextlib
import copy
import gc
import io
import random
import weakref

import pytest
import torch
from helpers import each_variant, make, threads
from torch.utils.flop_counter import FlopCounterMode

from archs import ops
from archs.cache import with_tensors
from archs.kernels.cpu.build import PREPARE, bind, compiler
from archs.kernels.replay import RecordedStep

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
aten = torch.ops.aten
on_cpu = pytest.mark.skipif(not compiler(), reason="no C++ compiler here: nothing is recorded on a CPU")
on_device = pytest.mark.skipif(DEVICE == "cpu" and not compiler(), reason="neither a GPU nor a C++ compiler here")
GQA = "gqa", {"kv_heads": 2}


def plain_step(model, tokens_B, cache):
    return model.prefill(tokens_B[:, None], cache)


def tensors(cache):
    copies = []
    with_tensors(cache.layers, lambda t: copies.append(t.clone()) or t)
    return copies


@on_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@each_variant
def test_replayed_steps_equal_plain_steps(arch, options, dtype):
    """From an empty cache on, and after a prompt in between; the caches are equal, too. What is rounded to fewer bits
    may fall to either side."""
    model = make(arch, options).to(DEVICE)
    tokens = torch.randint(97, (3, 30), device=DEVICE)
    plain, recorded = (model.new_cache(3, 40, dtype) for _ in range(2))
    rounding = 0 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    for t in range(30):
        if t == 11:
            for cache in (plain, recorded):
                model.prefill(tokens[:, :7], cache)
        expected, logits = plain_step(model, tokens[:, t], plain), model.decode(tokens[:, t], recorded)
        assert (logits - expected).abs().max() <= (1e-5 + rounding) * expected.abs().max()
        assert recorded.length == plain.length
    for x, y in zip(tensors(recorded), tensors(plain), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4 + rounding, atol=1e-4 + rounding * y.abs().max().item())
    assert recorded.step.replay
    assert recorded.step.position.item() == recorded.length - (DEVICE == "cpu")


def test_a_step_that_cannot_become_a_cuda_graph_runs_as_it_is(monkeypatch):
    """Without a GPU: a recorder that fails as CUDA does takes its place."""

    @contextlib.contextmanager
    def fails(graph, stream):
        raise RuntimeError("operation not permitted when stream is capturing")
        yield

    streams = []
    for name, fake in (("CUDAGraph", object), ("graph", fails), ("current_stream", lambda: "before")):
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    monkeypatch.setattr("archs.kernels.replay.recording_stream", lambda device: None)
    model, tokens = make("mha", {}), torch.randint(97, (2, 4))
    cache, plain = model.new_cache(2, 5), model.new_cache(2, 5)
    step = RecordedStep(2, torch.device("cpu"))

    def run():
        step.logits_BV = model.append(step.tokens_B[:, None], cache, step.position)

    with torch.inference_mode(), pytest.warns(UserWarning, match="without a CUDA graph, more slowly: operation not"):
        step.replay = step.capture(run)
    assert (streams, step.how) == (["before"], "")
    for t in range(4):
        step.tokens_B.copy_(tokens[:, t])
        step.position.fill_(t)
        with torch.inference_mode():
            step.replay()
        torch.testing.assert_close(step.logits_BV, plain_step(model, tokens[:, t], plain), rtol=1e-5, atol=1e-5)


@on_device
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_a_step_is_recorded_again_when_what_it_holds_has_moved(mode):
    model = make(*GQA).to(DEVICE)
    tokens = torch.randint(97, (2, 20), device=DEVICE)
    cache, other = model.new_cache(2, 21), model.new_cache(2, 21)
    with mode():
        model.prefill(tokens[:, :9], cache)
        model.decode(tokens[:, 9], cache)
    model.prefill(tokens[:, :9], other)

    def check(model, recorded_again):
        before = cache.step.replay
        for _ in range(3):  # on a GPU the first step is a plain one
            cache.length = other.length = 9
            logits, expected = model.decode(tokens[:, 10], cache), plain_step(model, tokens[:, 10], other)
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        assert (cache.step.replay is not before) == recorded_again

    if DEVICE == "cuda":
        model.decode(tokens[:, 10], cache)  # which records
    check(model, False)
    with torch.no_grad():
        model.unembed.weight.mul_(2)
    check(model, False)
    down = model.blocks[0].ffn.down
    down.weight.data = down.weight * 3
    check(model, True)
    down.weight = torch.nn.Parameter(down.weight * 2)
    check(model, True)
    model.blocks[1].ffn = copy.deepcopy(model.blocks[0].ffn)
    check(model, True)
    torch.nn.utils.parametrize.register_parametrization(down, "weight", torch.nn.Softsign())
    check(model, True)
    sibling = make(*GQA, seed=1).to(DEVICE)
    sibling.embed.weight = model.embed.weight
    check(sibling, True)
    check(model, True)
    with threads(torch.get_num_threads() + 1):
        check(model, True)
    logits = model.decode(tokens[:, 11], cache)
    before = logits.clone()
    model.decode(tokens[:, 12], cache)
    assert torch.equal(logits, before)  # a step's logits are the caller's


@on_cpu
def test_an_error_in_a_step_leaves_the_cache_as_it_was():
    model, tokens = make("mha", {}), torch.randint(97, (2, 9))
    cache = model.new_cache(2, 9)
    model.prefill(tokens[:, :5], cache)
    for t in (5, 6):  # the first is recorded, the second replayed
        with pytest.raises(IndexError, match="out of range"):
            model.decode(torch.tensor([3, 97]), cache)
        assert cache.length == t
        torch.testing.assert_close(model.decode(tokens[:, t], cache), model(tokens[:, : t + 1])[:, -1])


@on_cpu
@each_variant
def test_a_copied_cache_records_its_own_step(arch, options):
    model, tokens = make(arch, options), torch.randint(97, (2, 9))
    with torch.inference_mode():
        cache = model.new_cache(2, 9)
        model.prefill(tokens[:, :6], cache)
        model.decode(tokens[:, 6], cache)
        copies = [copy.deepcopy(cache)]
    saved = io.BytesIO()
    torch.save(cache, saved)
    saved.seek(0)
    before, copies = tensors(cache), [*copies, torch.load(saved, weights_only=False)]
    logits = [model.decode(tokens[:, 7], other) for other in copies]
    assert all(torch.equal(x, y) for x, y in zip(tensors(cache), before, strict=True))
    assert (cache.length, *(other.length for other in copies)) == (7, 8, 8)
    torch.testing.assert_close(logits, [model.decode(tokens[:, 7], cache)] * 2, rtol=1e-4, atol=1e-5)


@on_cpu
def test_a_cache_without_references_is_freed_with_its_recording():
    model = make("mha", {})
    cache = model.new_cache(1, 9)
    for _ in range(2):
        model.decode(torch.tensor([5]), cache)
    references = [weakref.ref(cache.layers[0].tensors[0]), weakref.ref(cache.step.replay.__self__)]
    gc.disable()
    try:
        del cache
        assert [reference() for reference in references] == [None, None]
    finally:
        gc.enable()


@on_cpu
def test_a_mode_that_counts_operators_sees_every_step():
    model, tokens = make("mha", {}), torch.randint(97, (1, 9))
    cache = model.new_cache(1, 9)
    model.prefill(tokens[:, :6], cache)
    model.decode(tokens[:, 6], cache)
    with FlopCounterMode(display=False) as counter:
        model.decode(tokens[:, 7], cache)
    assert counter.get_total_flops() >= model.decode_flops(8)


def test_a_number_for_python_cannot_be_recorded():
    with pytest.raises(TypeError, match="static = False"):
        ops.record(lambda: torch.ones(3).sum().item())


def test_operators_of_every_kind_run_again_on_what_their_inputs_then_hold():
    x, state = torch.randn(4, 6), torch.zeros(4, 6)

    def step():
        a, b = (x * 2).chunk(2, dim=1)  # views
        values, order = a.sort(dim=1)  # several results
        joined = torch.cat((b.T.contiguous().T, values.exp()), 1)
        state.add_(joined)  # in place
        alone = joined.view(-1)[3:].clone().unflatten(0, (3, 7))
        fresh = torch.zeros(3, 7).index_add_(0, torch.tensor([2, 0]), alone[:2])
        powers = torch._foreach_exp([a, b])  # a list of results
        return *powers, joined.to(torch.float64), order, fresh, torch.einsum("ij,kj->ik", joined, joined), state.clone()

    results = []
    replay = ops.record(lambda: results.extend(step()))
    for _ in range(3):
        x.normal_()
        before = state.clone()
        replay()
        after = state.clone()
        state.copy_(before)
        torch.testing.assert_close(results, list(step()))
        assert torch.equal(state, after)


def test_a_result_of_another_shape_is_an_error():
    x = torch.ones(4)
    replay = ops.record(lambda: x[x > 0].view(1, -1).sum())
    x[0] = -1
    with pytest.raises(RuntimeError, match="must match"):
        replay()


def test_a_replay_needs_no_gradient_though_a_weight_does():
    x, weight, results = torch.ones(2, 3), torch.ones(3, 4, requires_grad=True), []
    replay = ops.record(lambda: results.append(x @ weight))
    x.fill_(2.0)
    replay()
    assert torch.equal(results[0], torch.full((2, 4), 6.0))


# What runs in C++ in place of PyTorch's operators: arguments that are supported, by random numbers, and others.
TABLE, CACHE = torch.randn(9, 5), torch.randn(2, 3, 7, 5)
SUBSTITUTIONS = {
    aten.mm.default: (
        lambda r: (torch.randn(r.randint(0, 32), K := r.randint(16, 90)), torch.randn(r.randint(16, 90), K).t()),
        [
            (torch.randn(33, 16), torch.randn(16, 16).t()), (torch.randn(4, 16), torch.randn(15, 16).t()),
            (torch.randn(4, 16), torch.randn(16, 20)), (torch.randn(16, 4).t(), torch.randn(20, 16).t()),
        ],
    ),
    aten.embedding.default: (
        lambda r: (TABLE, torch.randint(9, (r.randint(0, 32), 1))),
        [(TABLE, torch.zeros(33, dtype=torch.long)), (torch.randn(5, 9).t(), torch.tensor([3]))],
    ),
    aten.add.Tensor: (lambda r: (*torch.randn(2, 3, 1, r.randint(0, 99)),), [(TABLE, 1.0), (TABLE, torch.randn(5))]),
    aten.cat.default: (
        lambda r: ([torch.randn(2, 1, 3, 7).transpose(1, 2)[..., : r.randint(1, 6)], torch.randn(2, 3, 1, 5)], -1),
        [([CACHE, CACHE], -1), ([CACHE[:, :, :1]] * 3, -1), ([CACHE[:, :, :1]] * 2, 2)],
    ),
}  # fmt: skip


@on_cpu
@pytest.mark.parametrize("operator", [func for func in PREPARE if func.namespace == "aten"], ids=str)
def test_substitutions_equal_the_operators_of_pytorch_and_decline_what_they_do_not_support(operator):
    supported, declined = SUBSTITUTIONS[operator]
    for seed in range(20):
        arguments = supported(random.Random(seed))
        result, *call = PREPARE[operator](*arguments)
        bind(*call)()
        result = result.clone()
        torch.testing.assert_close(result, operator(*arguments), rtol=1e-5, atol=1e-5)
    assert not any(PREPARE[operator](*arguments) for arguments in declined)
    halves = [[y.bfloat16() for y in x] if isinstance(x, list) else x for x in arguments]
    halves = [x.bfloat16() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in halves]
    assert not PREPARE[operator](*halves)


@on_cpu
def test_numbers_of_no_row_are_an_error():
    for wrong in (9, -1):
        index = torch.tensor([3, wrong])
        _, *call = PREPARE[aten.embedding.default](TABLE, index)
        with pytest.raises(IndexError, match="1 of the numbers are out of range"):
            bind(*call)()
