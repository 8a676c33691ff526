"""The law of operators: each kernel equals its operator's formula in fp64, with gradients where it has them, on all
that it supports, and it declines everything else. Without a GPU, Triton's kernels run in its interpreter."""

import contextlib
import gc
import math
import mmap
import random

import pytest
import torch
from helpers import threads
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from operators import (
    CACHE_DTYPES,
    CASES,
    CPU,
    DECLINED,
    KERNELS,
    SITUATIONS,
    assert_close,
    assert_equals_formula,
    converted,
    each_kernel,
    floats,
    needs_compiler,
    qkv,
    supports,
    without_compiler,
)
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from archs import ops
from archs.kernels import triton
from archs.kernels.cpu import attention as cpu_attention
from archs.kernels.cpu import layers as cpu


@pytest.fixture(autouse=True, scope="module")
def triton_for_any_device():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton, "runs_on", lambda device: True)
        yield


def test_every_kernel_of_every_operator_is_under_the_law():
    assert set(CASES) == set(KERNELS)


@each_kernel()
@settings(max_examples=15, deadline=None, phases=(Phase.reuse, Phase.generate))  # a seed cannot be made simpler
@given(seed=st.integers(0, 2**32 - 1))
def test_kernels_equal_their_formulas(kernel, seed):
    torch.manual_seed(seed)
    random.seed(seed)
    arguments = CASES[kernel].make(random.Random(seed))
    with torch.set_grad_enabled(CASES[kernel].gradients):
        assert supports(kernel, arguments)
    with threads(1 + seed % 3):
        assert_equals_formula(kernel, arguments)


@each_kernel(DECLINED)
@torch.no_grad()
def test_shapes_and_layouts_that_a_kernel_declines_are_computed_all_the_same(kernel):
    for arguments in DECLINED[kernel]():
        assert not supports(kernel, arguments)
        expected = KERNELS[kernel].formula(*converted(arguments, torch.clone))
        assert_close(KERNELS[kernel](*arguments), expected, 1e-5)


@pytest.mark.parametrize("situation", SITUATIONS.split())
@each_kernel()
def test_kernels_decline_situations_that_they_do_not_know(kernel, situation, monkeypatch):
    arguments, answers = CASES[kernel].make(random.Random(0)), []
    changed = {"fp64": torch.float64, "bf16": torch.bfloat16, "autocast": torch.bfloat16, "meta": torch.device("meta")}
    contexts = {
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
        "forward_mode": forward_ad.dual_level,
        "torch.compile": lambda: monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True),
        "no_compiler": lambda: without_compiler(monkeypatch),
    }

    def ask(x=None):
        answers.append(supports(kernel, arguments))
        return x

    with torch.no_grad():
        ask()
        if situation in changed:
            arguments = converted(arguments, lambda x: x.to(changed[situation]))
            arguments = [changed["meta"] if x == CPU and situation == "meta" else x for x in arguments]
        with contexts.get(situation, contextlib.nullcontext)() or contextlib.nullcontext():
            if situation == "torch.func":
                torch.func.vmap(ask)(torch.zeros(1))
            elif situation == "gradient":
                with torch.enable_grad():
                    for x in floats(arguments) or [torch.ones(1)]:
                        x.requires_grad_()
                        ask()
                        x.requires_grad_(False)
            else:
                ask()
    assert answers[0]
    assert set(answers[1:]) == {situation in CASES[kernel].runs_in}


COUNTED = cpu_attention.decode, cpu_attention.paged_decode, cpu_attention.causal, cpu.head_linear, cpu.retention_step


@each_kernel(COUNTED)
@torch.no_grad()
def test_flops_of_a_kernel_are_those_of_its_formula(kernel):
    arguments = CASES[kernel].make(random.Random(3))
    if kernel is cpu_attention.causal:
        arguments = *arguments[:4], 0  # those outside of a window are not counted
    counts = []
    for function in (kernel, KERNELS[kernel].formula):
        with FlopCounterMode(display=False) as counter:
            function(*converted(arguments, Tensor.double if function is not kernel else Tensor.clone))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@needs_compiler
def test_flops_of_attention_backward_are_five_products():
    q, k, v, scale = qkv()
    with FlopCounterMode(display=False) as counter:
        forward = cpu_attention.causal(q.requires_grad_(), k, v, scale)
        two_products = counter.get_total_flops()
        forward.sum().backward()
    assert counter.get_total_flops() == two_products * 7 / 2


@needs_compiler
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_score_that_is_not_finite_is_seen_by_the_queries_that_see_it(broken):
    q, k, v, scale = (x.abs() if isinstance(x, Tensor) else x for x in qkv(T=40, S=40))
    expected = ops.attention.formula(q, k, v, scale)
    k[:, :, 21] *= broken
    result = cpu_attention.causal(q, k, v, scale)
    assert result[:, :, 21:].isnan().all()
    torch.testing.assert_close(result[:, :, :21], expected[:, :, :21])
    assert cpu_attention.decode(q[:, :, -1:].contiguous(), k, v, scale).isnan().all()


@needs_compiler
def test_a_gradient_that_is_not_finite_is_seen_by_the_keys_that_it_reaches_alone():
    inputs = [x.requires_grad_() for x in qkv(T=40, S=40)[:3]]
    grad = torch.randn(2, 4, 40, 16)
    grad[:, 0, 21] = math.nan
    of_q, *of_kv = torch.autograd.grad(cpu_attention.causal(*inputs, 0.2), inputs, grad)
    assert of_q[0].isnan().any(-1).nonzero().tolist() == [[0, 21]]
    assert all(x[:, 0, :22].isnan().all() and not x[:, 1:].isnan().any() for x in of_kv)


@needs_compiler
@pytest.mark.parametrize("dtype", CACHE_DTYPES)
def test_numbers_are_stored_as_pytorch_rounds_them_and_read_as_they_are_stored(dtype):
    """Of all sizes, ties between two numbers of the dtype among them, infinite ones and NaN."""
    new = torch.randint(-(2**31), 2**31, (1, 2000, 1, 67)).int()
    new[:, ::2] = (new[:, ::2] & -0x1000) % 0x08000000 + 0x33000000  # of fp16's sizes, with few digits
    new[..., :3] = torch.tensor([math.inf, -math.inf, math.nan]).view(torch.int32)
    caches = [torch.zeros(1, 2000, 1, 67, dtype=dtype) for _ in range(2)]
    cpu.put(caches[0], torch.tensor([0]), new.view(torch.float32))
    ops.put.formula(caches[1], torch.tensor([0]), new.view(torch.float32))
    torch.testing.assert_close(*caches, rtol=0, atol=0, equal_nan=True)
    values = torch.arange(2**16).to(torch.int16).view(torch.float16 if dtype == torch.float32 else dtype).to(dtype)
    values, keys = values.view(1, 1024, 1, 64), torch.zeros(1, 1024, 1, 64)
    read = cpu_attention.decode(keys, keys.to(dtype), values, 1.0)
    torch.testing.assert_close(read, values.float(), rtol=1e-6, atol=1e-42, equal_nan=True)


@pytest.mark.parametrize("top", [1.0, 100.0, 1000.0])
def test_a_small_loss_of_large_logits_keeps_its_digits(top):
    logits = torch.tensor([[top], [top - 10], *[[top - 50]] * 20])
    arguments = torch.ones(1, 1, 1), logits, torch.zeros(1, 1, dtype=torch.long)
    expected = ops.unembed_cross_entropy.formula(*converted(arguments, Tensor.double))
    torch.testing.assert_close(cpu.unembed_cross_entropy(*arguments).double(), expected, rtol=5e-3, atol=0)


@needs_compiler
def test_cross_entropy_hides_no_wrong_logit_and_no_wrong_target():
    logits = torch.randn(4, 30)
    logits[1, 3], logits[2, 29] = math.nan, math.inf
    assert cpu.cross_entropy(logits, torch.tensor([0, 1, 2, 3])).isnan().tolist() == [False, True, True, False]
    with pytest.raises(IndexError, match="1 of the numbers are out of range"):
        ops.unembed_cross_entropy(torch.randn(1, 2, 8), torch.randn(30, 8), torch.tensor([[30, 0]]))


@needs_compiler
def test_second_gradients_are_refused():
    x = torch.randn(1, 2, 16, 8, requires_grad=True)
    (first,) = torch.autograd.grad(ops.attention(x, x, x, 0.2).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second gradients"):
        first.sum().backward()
    loss = ops.unembed_cross_entropy(x[0], torch.randn(9, 8, requires_grad=True), torch.zeros(2, 16, dtype=torch.long))
    (first,) = torch.autograd.grad(loss.square(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_rotary_scores_depend_on_distance_alone():
    q, k, turns = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16), ops.frequencies(16, 1e4, CPU)

    def score(*positions):
        tables = [ops.rope_table(torch.tensor([position]), turns) for position in positions]
        q_, k_ = (ops.rotate(x, *table) for x, table in zip((q, k), tables, strict=True))
        return q_ @ k_.mT

    torch.testing.assert_close(score(7, 3), score(104, 100), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(score(7, 3), q @ k.mT)


def test_a_large_cache_starts_on_a_huge_page_and_reports_no_more_bytes_than_it_has():
    cache = ops.zeros((3, 70_001, 9), torch.bfloat16, CPU)
    gc.collect()  # of what it was made from
    assert cache.untyped_storage().nbytes() == cache.nbytes == 3 * 70_001 * 9 * 2
    assert cache.data_ptr() % cpu.HUGE_PAGE == 0 or not hasattr(mmap, "MADV_HUGEPAGE")
    cache[2, 70_000] = 1
    assert cache.float().sum() == 9


def test_a_compiled_operator_has_the_same_kernels_and_the_same_result():
    compiled = ops.compiled(ops.swiglu, backend="aot_eager")
    x = torch.randn(3, 8, requires_grad=True)
    assert compiled.kernels == ops.swiglu.kernels
    torch.testing.assert_close(compiled(x), ops.swiglu(x))
