"""A recorded decode step equals the step as it is: of every variant, and of operators of every kind."""

import contextlib
import copy
import gc
import io
import weakref

import pytest
import torch
from archs.cpu.building import compiler
from archs.graph import Calls, RecordedStep
from test_laws import each_variant, make
from torch.utils.flop_counter import FlopCounterMode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
on_cpu = pytest.mark.skipif(not compiler(), reason="no C++ compiler here: nothing is recorded on a CPU")
on_device = pytest.mark.skipif(DEVICE == "cpu" and not compiler(), reason="neither a GPU nor a C++ compiler here")


def as_it_is(model, tokens, cache):
    """A step that nothing has recorded."""
    return model.prefill(tokens[:, None], cache)


@on_device
@each_variant
def test_replayed_steps_are_the_steps_as_they_are(arch, options):
    """Also from an empty cache on, and after a prompt in between."""
    model = make(arch, options).to(DEVICE)
    tokens = torch.randint(97, (3, 30), device=DEVICE)
    plain, recorded = (model.new_cache(3, 40) for _ in range(2))
    for t in range(30):
        if t == 11:
            for cache in (plain, recorded):
                model.prefill(tokens[:, :7], cache)
        expected, got = as_it_is(model, tokens[:, t], plain), model.decode(tokens[:, t], recorded)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
        assert recorded.length == plain.length
    assert recorded.step.replay
    assert recorded.step.position.item() == recorded.length - (DEVICE == "cpu")


def test_a_step_that_no_cuda_graph_takes_runs_as_it_is(monkeypatch):
    """Without a GPU: what records is put in its place, and fails as CUDA does."""

    @contextlib.contextmanager
    def fails(graph, stream):
        raise RuntimeError("operation not permitted when stream is capturing")
        yield

    back = []
    for name, pretended in (("CUDAGraph", object), ("graph", fails), ("current_stream", lambda: "before")):
        monkeypatch.setattr(torch.cuda, name, pretended)
    monkeypatch.setattr(torch.cuda, "set_stream", back.append)
    monkeypatch.setattr("archs.graph.recording_stream", lambda device: None)
    model, tokens = make("mha", {}), torch.randint(97, (2, 4))
    cache, plain = model.new_cache(2, 5), model.new_cache(2, 5)
    step = RecordedStep(2, torch.device("cpu"))
    with torch.inference_mode(), pytest.warns(UserWarning, match="without a CUDA graph, more slowly: operation not"):
        step._record_graph(model, cache)
    assert (back, step.backend) == (["before"], "split-kv triton")
    for t in range(4):
        step.tokens_B.copy_(tokens[:, t])
        step.position.fill_(t)
        with torch.inference_mode():
            step.replay()
        torch.testing.assert_close(step.logits_BV, as_it_is(model, tokens[:, t], plain), rtol=1e-5, atol=1e-5)


def test_what_the_kernels_do_not_take_is_not_recorded():
    tokens = torch.randint(97, (1, 9))
    for dtype, cache_dtype in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)):
        model = make("yoco", {"kv_heads": 2, "self_decoder": "gret"}).to(dtype)
        cache = model.new_cache(1, 9, cache_dtype)
        for t in range(9):
            model.decode(tokens[:, t], cache)
        assert cache.step is None


@on_device
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad], ids=["inference mode", "no grad"])
def test_what_changes_between_steps_is_seen(mode):
    model = make("gqa", {"kv_heads": 2}).to(DEVICE)
    tokens = torch.randint(97, (2, 20), device=DEVICE)
    cache, other = model.new_cache(2, 21), model.new_cache(2, 21)
    with mode():
        model.prefill(tokens[:, :9], cache)
        model.decode(tokens[:, 9], cache)
    model.prefill(tokens[:, :9], other)

    def same(model, anew):
        """Whether the step is recorded anew; on a GPU what is has one step as it is before."""
        before = cache.step.replay
        for _ in range(3):
            cache.length = other.length = 9  # cut back
            got, expected = model.decode(tokens[:, 10], cache), as_it_is(model, tokens[:, 10], other)
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        assert (cache.step.replay is not before) == anew

    if DEVICE == "cuda":
        model.decode(tokens[:, 10], cache)  # which records
    same(model, False)
    with torch.no_grad():
        model.unembed.weight.mul_(2)  # in place
    same(model, False)
    down = model.blocks[0].ffn.down
    down.weight.data = down.weight * 3  # moved
    same(model, True)
    down.weight = torch.nn.Parameter(down.weight * 2)  # another
    same(model, True)
    model.blocks[1].ffn = copy.deepcopy(model.blocks[0].ffn)  # a module in another's place
    same(model, True)
    torch.nn.utils.parametrize.register_parametrization(down, "weight", torch.nn.Softsign())
    same(model, True)
    sibling = make("gqa", {"kv_heads": 2}, seed=1).to(DEVICE)
    sibling.embed.weight = model.embed.weight  # another model, which shares a weight
    same(sibling, True)
    same(model, True)
    torch.set_num_threads(torch.get_num_threads() + 1)
    try:
        same(model, True)
    finally:
        torch.set_num_threads(torch.get_num_threads() - 1)
    kept = model.decode(tokens[:, 11], cache)
    before = kept.clone()
    model.decode(tokens[:, 12], cache)
    assert torch.equal(kept, before)  # a step's logits are the caller's


@on_cpu
def test_a_copied_cache_goes_its_own_way():
    model = make("mha", {})
    tokens, cache = torch.randint(97, (2, 12)), model.new_cache(2, 12)
    model.prefill(tokens[:, :6], cache)
    model.decode(tokens[:, 6], cache)
    saved = io.BytesIO()
    torch.save(cache, saved)
    for other in (copy.deepcopy(cache), torch.load(io.BytesIO(saved.getvalue()), weights_only=False)):
        before = [stream.clone() for part in cache.parts for stream in part.streams]
        torch.testing.assert_close(model.decode(tokens[:, 7], other), model(tokens[:, :8])[:, -1])
        assert other.length == cache.length + 1
        after = [stream for part in cache.parts for stream in part.streams]
        assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


@on_cpu
def test_a_cache_that_nobody_holds_is_freed_with_its_recording():
    model = make("mha", {})
    cache = model.new_cache(1, 9)
    model.decode(torch.tensor([5]), cache)
    model.decode(torch.tensor([5]), cache)
    held = [weakref.ref(cache.parts[0].streams[0]), weakref.ref(cache.step.replay.__self__)]
    gc.disable()
    try:
        del cache
        assert [x() for x in held] == [None, None]
    finally:
        gc.enable()


@on_cpu
@each_variant
def test_a_cache_copied_in_inference_mode_is_decoded(arch, options):
    model = make(arch, options)
    tokens = torch.randint(97, (2, 9))
    with torch.inference_mode():
        cache = model.new_cache(2, 9)
        model.prefill(tokens[:, :6], cache)
        copied = copy.deepcopy(cache)
        for t in range(6, 9):
            torch.testing.assert_close(model.decode(tokens[:, t], copied), model.decode(tokens[:, t], cache))


def test_a_value_that_python_is_given_is_a_clear_error():
    x = torch.ones(3)
    with pytest.raises(TypeError, match="static = False"), Calls():
        x.sum().item()


@on_cpu
def test_what_counts_operators_sees_a_step_that_is_not_replayed():
    model = make("mha", {})
    tokens, cache = torch.randint(97, (1, 9)), model.new_cache(1, 9)
    model.prefill(tokens[:, :6], cache)
    model.decode(tokens[:, 6], cache)
    with FlopCounterMode(display=False) as counter:
        model.decode(tokens[:, 7], cache)
    assert counter.get_total_flops() >= model.decode_flops(8)


def test_operators_of_every_kind_run_again_on_what_their_inputs_then_hold():
    x, state = torch.randn(4, 6), torch.zeros(4, 6)

    def step():
        a, b = (x * 2).chunk(2, dim=1)  # views
        values, order = a.sort(dim=1)  # several results
        joined = torch.cat((b.T.contiguous().T, values.exp()), 1)
        state.add_(joined)  # in place
        alone = joined.view(-1)[3:].clone().unflatten(0, (3, 7))
        fresh = torch.zeros(3, 7).index_add_(0, torch.tensor([2, 0]), alone[:2])
        return joined.to(torch.float64), order, fresh, torch.einsum("ij,kj->ik", joined, joined), state.clone()

    with Calls() as calls:
        found = step()
    for _ in range(3):
        x.normal_()
        before = state.clone()
        calls.replay()
        after = state.clone()
        state.copy_(before)
        for a, b in zip(found, step(), strict=True):
            torch.testing.assert_close(a, b)
        assert torch.equal(state, after)
