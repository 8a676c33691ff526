"""A recorded decode step equals the step as it is: of every variant, and of operators of every kind."""

import copy
import gc
import io
import weakref

import pytest
import torch
from test_laws import each_variant, make
from torch.utils.flop_counter import FlopCounterMode

from archs.cpu_kernel import compiler
from archs.graph import Calls

pytestmark = pytest.mark.skipif(not compiler(), reason="no C++ compiler here: nothing is recorded")


def as_it_is(model, tokens, cache):
    """A step that nothing has recorded."""
    return model.prefill(tokens[:, None], cache)


@each_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_replayed_steps_are_the_steps_as_they_are(arch, options, dtype):
    """Also from an empty cache on, and after a prompt in between."""
    model = make(arch, options)
    tokens = torch.randint(97, (3, 30))
    plain, recorded = (model.new_cache(3, 40, dtype) for _ in range(2))
    for t in range(30):
        if t == 11:
            for cache in (plain, recorded):
                model.prefill(tokens[:, :7], cache)
        expected, got = as_it_is(model, tokens[:, t], plain), model.decode(tokens[:, t], recorded)
        # A cache in bf16 is read by other kernels, as what is held or as all with a mask.
        close = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(got, expected, rtol=0, atol=close * expected.abs().max().item())
        assert recorded.length == plain.length
    assert recorded.step.replay
    assert recorded.step.position.item() == recorded.length - 1


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad], ids=["inference mode", "no grad"])
def test_what_changes_between_steps_is_seen(mode):
    model = make("gqa", {"kv_heads": 2})
    tokens = torch.randint(97, (2, 20))
    cache, other = model.new_cache(2, 21), model.new_cache(2, 21)
    with mode():
        model.prefill(tokens[:, :9], cache)
        model.decode(tokens[:, 9], cache)
    model.prefill(tokens[:, :9], other)

    def same():
        cache.length = other.length = 9  # cut back
        torch.testing.assert_close(model.decode(tokens[:, 10], cache), as_it_is(model, tokens[:, 10], other))

    same()
    with torch.no_grad():
        model.unembed.weight.mul_(2)  # in place
    same()
    model.embed.weight.data = model.embed.weight * 3  # moved
    same()
    torch.set_num_threads(torch.get_num_threads() + 1)
    try:
        same()
    finally:
        torch.set_num_threads(torch.get_num_threads() - 1)
    kept = model.decode(tokens[:, 11], cache)
    before = kept.clone()
    model.decode(tokens[:, 12], cache)
    assert torch.equal(kept, before)  # a step's logits are the caller's


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


def test_a_cache_that_nobody_holds_is_freed_with_its_recording():
    model = make("mha", {})
    cache = model.new_cache(1, 9)
    model.decode(torch.tensor([5]), cache)
    stream = weakref.ref(cache.parts[0].streams[0])
    gc.disable()
    try:
        del cache
        assert stream() is None
    finally:
        gc.enable()


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
