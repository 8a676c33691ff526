"""Arguments that each kernel supports and some that it does not, and the comparison of its result with the formula.
Shapes as in archs/ops.py."""

import contextlib
import copy
import math
import random
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from helpers import CASES as VARIANTS
from helpers import make
from torch import Tensor, nn, randn

from archs import Cache, ops
from archs.cache import with_tensors
from archs.kernels import fused, replay, triton
from archs.kernels.cpu import attention as cpu_attention
from archs.kernels.cpu import layers as cpu
from archs.kernels.cpu.build import STORED, build, compiler

CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(not compiler(), reason="no C++ compiler here")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS = {kernel: op for op in vars(ops).values() for kernel in getattr(op, "kernels", ())}
del KERNELS[fused.windowed_flash]  # no CPU runs it: tests/archs/test_cuda.py
TRITON = triton.decode_attention, triton.retention_step
# Query heads, KV heads, key size, value size (None: the values are the first columns of the keys). Vectors of 1, 2 and
# 4 numbers, query heads that fill vectors and some that divide into none.
WIDE, MLA = [(4, 4, 64, 64), (8, 2, 32, 32), (12, 1, 128, 128), (16, 1, 64, 64)], [(8, 1, 144, None), (3, 1, 40, None)]
ODD = [(7, 1, 16, 16), (6, 2, 20, 20), (6, 2, 10, 10), (4, 4, 7, 7), (48, 2, 20, 20)]
DECODE_SHAPES = [*WIDE, *ODD, *MLA, (32, 1, 40, None)]
TRITON_SHAPES = [(4, 4, 64, 64), (80, 1, 16, 16), (6, 2, 80, 20), (8, 1, 144, None), (3, 1, 30, None)]
PROMPT_SHAPES = [(4, 4, 64, 67), (8, 2, 32, 32), (6, 2, 20, 23), (4, 4, 7, 10), (16, 1, 64, 64)]
CACHE_DTYPES = tuple(STORED)
SITUATIONS = "fp64 bf16 autocast meta gradient torch.func forward_mode torch.compile no_compiler"


class Case(NamedTuple):
    """`make(r)` returns arguments that a kernel supports, by the random numbers of `r`. Of SITUATIONS it supports those
    in `runs_in`."""

    make: Callable[[random.Random], tuple]
    runs_in: str = ""
    gradients: bool = False
    exact: torch.dtype = torch.float64
    within: float = 2e-5  # of the largest number


def heads_of_projection(r, B, H, T, D):
    """(B, H, T, D) as a projection to more heads lays them out."""
    return randn(B, T, H + r.choice((0, 2)), D).transpose(1, 2)[:, :H]


def norm_inputs(r):
    """Rows with or without gaps between them, or some of the heads of each sequence."""
    *shape, D = r.randint(0, 4), *(r.randint(1, 4) for _ in range(r.randint(0, 2))), r.randint(1, 300)
    x = randn(*shape, D + r.choice((0, 3)))[..., :D].mul_(10)
    heads = randn(r.randint(1, 3), 1, 5, D).transpose(1, 2)[:, r.randint(0, 2) : r.randint(3, 5)]
    return r.choice((x, heads)), r.choice((None, randn(D)))


def swiglu_inputs(r):
    return (randn(r.randint(0, 3), r.randint(1, 50), 2 * r.randint(1, 700)) * 30,)


def head_inputs(r):
    B, H, K, F = r.randint(1, 32), r.randint(1, 5), 16 * r.randint(1, 4), 16 * r.randint(1, 4)
    x = randn(B, H, 3, K + 5)[:, :, :1, :K]
    return x, r.choice((randn(H, K + 2, F)[:, 2:], randn(H, F + 6, K).mT[:, :, :F]))


def unembed_inputs(r):
    B, T, W, V = r.randint(1, 3), r.randint(1, 300), r.randint(1, 40), r.randint(2, 90)
    targets_BT = torch.randint(V, (B, T)).where(torch.rand(B, T) < 0.9, -100)
    return randn(B, T, W) * 10.0 ** r.randint(-1, 1), randn(V, W), targets_BT


def rope_inputs(r):
    return torch.tensor([r.choice((0, 1, 900, 130_000))]), ops.frequencies(2 * r.randint(1, 40), 1e4, CPU)


def rotate_inputs(r):
    """Tables for all sequences, or of one position for each."""
    B, T, half = r.randint(0, 3), r.randint(1, 40), r.randint(1, 40)
    positions = r.choice((torch.arange(11, 11 + T), torch.randint(900, (B, 1, 1))))
    T = positions.shape[-1]
    x = randn(B, T, r.randint(1, 5), 3 * half).transpose(1, 2)[..., half:]
    table = ops.rope_table(positions, ops.frequencies(2 * half, 1e4, CPU))
    return x, *(t[..., -T:, :] for t in (torch.cat(table, -1).chunk(2, -1) if r.random() < 0.5 else table))


def keys_and_values(B, G, S, D, E, dtype=torch.float32):
    """S slots of a cache of S + 16, whose further slots hold NaN."""
    k = randn(B, G, S + 16, D).to(dtype)
    v = randn(B, G, S + 16, E).to(dtype) if E else k[..., : D - D // 9 // 4 * 4 - 4]
    for x in (k, v):
        x[:, :, S:] = math.nan
    return k[:, :, :S], v[:, :, :S]


def some_sinks(r, H):
    """None, or logits, of which one may leave nothing to the keys; with gaps between them, or one for all."""
    sinks = randn(1, H, 1, 1).clamp(max=2)
    sinks[:, 1:2] = r.choice((-200.0, 0.0, 200.0))
    return r.choice((None, sinks, torch.stack((sinks, sinks), -1)[..., 0], sinks[:, :1].expand(1, H, 1, 1)))


def decode_inputs(r, shapes=DECODE_SHAPES, positions=(0, 1, 2), longest=2100, dtypes=(torch.float32,)):
    """One token without a position (0), with one for all sequences (1) or one for each (2), also beyond the slots."""
    (H, G, D, E), B, S = r.choice(shapes), r.randint(1, 3), r.choice((1, 17, 64, 300, longest))
    q, (k, v) = heads_of_projection(r, B, H, 1, D), keys_and_values(B, G, S, D, E, r.choice(dtypes))
    kind, scale = r.choice(positions), r.choice((1e-9, 0.2, 1.0))
    if r.random() < 0.2:  # scores that grow along the sequence
        k.mul_(torch.linspace(1, 8, S)[:, None].to(k.dtype)).abs_()
        scale = 0.1
    if kind == 0:
        return q, k, v, scale, 0, None, some_sinks(r, H)
    position = torch.randint(S + 9, (1 if kind == 1 else B,))
    k[:, :, min(S, position.max() + 1) :] = 1e3  # old tokens
    return q, k, v, scale, 0, position, some_sinks(r, H)


def triton_inputs(r):
    """Also of half precision: the interpreter's products are wrong in bf16."""
    dtype = r.choice((torch.float32, torch.bfloat16 if DEVICE == "cuda" else torch.float16))
    inputs = converted(decode_inputs(r, TRITON_SHAPES, positions=(1,), longest=40), lambda x: x.to(dtype))
    return [x.to(DEVICE) if isinstance(x, Tensor) else x for x in inputs]


def prompt_inputs(r, shapes=PROMPT_SHAPES, batches=(0, 1, 2), fewest=8, longest=100, dtypes=(torch.float32,)):
    """Windows shorter and longer than the keys; more keys than queries."""
    (H, G, D, E), B, T = r.choice(shapes), r.choice(batches), r.randint(fewest, longest)
    S, dtype = T + r.choice((0, 0, 1, 64)), r.choice(dtypes)
    q, (k, v) = heads_of_projection(r, B, H, T, D), keys_and_values(B, G, S, D, E, dtype)
    return q, k, v, 0.2, r.choice((0, 0, 1, 7, 16, 40, 500)), None, some_sinks(r, H)


def any_inputs(r):
    """One token or many, at least one sequence."""
    if r.random() < 0.5:
        return decode_inputs(r, longest=40, dtypes=CACHE_DTYPES)
    shapes = (4, 4, 8, 6), (4, 1, 8, 8), (6, 2, 8, 11), (4, 1, 40, None)
    return prompt_inputs(r, shapes, (1, 2), fewest=1, longest=40, dtypes=CACHE_DTYPES)


def masked_inputs(r):
    """Masks to be added, some of them infinite, or boolean ones, for each head or for all; every query sees a key."""
    q, k, v, scale, *_ = prompt_inputs(r, PROMPT_SHAPES[1:], (1, 2), fewest=1, longest=20, dtypes=CACHE_DTYPES)
    B, H, T, _ = q.shape
    mask = randn(B, r.choice((1, H)), T, k.shape[2])
    mask[..., 1:] = mask[..., 1:].masked_fill(torch.rand(mask[..., 1:].shape) < 0.3, -math.inf)
    return q, k, v, scale, r.choice((mask, mask > -math.inf, mask[..., :1])), some_sinks(r, H)


def paged_inputs(r):
    """Blocks in any order; NaN in those of no sequence, old tokens behind the last of a sequence."""
    H, G, D, E = r.choice([*WIDE[1::2], MLA[0]])
    position = torch.tensor([r.choice((0, 32, 47, 1499)) for _ in range(3)])
    N = position.max() // 16 + 1
    dtype = r.choice(CACHE_DTYPES)
    k = randn(3 * N + 4, G, 16, D).to(dtype)
    v = randn(3 * N + 4, G, 16, E).to(dtype) if E else k[..., :100]
    table = torch.randperm(3 * N + 4)[: 3 * N].view(3, N)
    unused = torch.ones(3 * N + 4, dtype=torch.bool)
    unused[table] = False
    k[unused] = v[unused] = math.nan
    return randn(3, H, 1, D), k, v, 0.2, position, table, some_sinks(r, H)


def put_inputs(r):
    B, G, D, S = r.randint(0, 3), r.randint(1, 3), r.choice((1, 16, 20, 64, 130)), r.randint(1, 9)
    cache = randn(B, G + 1, S, D)[:, 1:].to(r.choice(CACHE_DTYPES))
    return cache, torch.tensor([r.randrange(S)]), heads_of_projection(r, B, G, 1, D)


def retention_inputs(r, states=CACHE_DTYPES, device=CPU):
    """Products of a token with itself that cancel; D of several vectors and of parts of one."""
    B, H, D = r.randint(1, 3), r.randint(1, 4), r.choice((2, 16, 20, 64, 130))
    q, k, v = randn(B, 1, 3 * H, D, device=device).transpose(1, 2).split(H, 1)
    q[..., :2] = k[..., :1] = 1e3
    k[..., 1] = -1e3
    state = randn(B, H, D, D, device=device).to(r.choice(states))
    return q, k, v, torch.rand(B, 1, H, device=device).transpose(1, 2), state


def draw_inputs(r):
    """Places in the middle of what belongs to a token, since rounding decides between two at their border."""
    B, V, temperature = r.randint(1, 3), r.randint(1, 300), r.choice((0.0, 0.5, 1.0, 3.0))
    logits = randn(B, V).mul_(3).masked_fill_(torch.rand(B, V) < r.choice((0.0, 0.5)), -math.inf)
    logits[:, r.randrange(V)] = 9.0
    p = (logits.double() / (temperature or 1)).softmax(-1)
    token = p.masked_fill(p < 1e-5, 0).multinomial(1)
    return logits, (p.cumsum(-1) - p / 2).gather(1, token).float(), temperature


def step_inputs(r):
    model = make(*r.choice(VARIANTS), seed=r.randrange(100))
    cache = model.new_cache(2, 24)
    if prompt := r.choice((0, 20)):
        model.prefill(torch.randint(97, (2, prompt)), cache)
    return model, torch.randint(97, (2,)), cache


def one_step(dtype=torch.float32, static=True):
    model = make("mha", {})
    cache = model.new_cache(1, 4, dtype)
    cache.static = static
    return model, torch.tensor([1]), cache


def qkv(T=9, S=9, D=16, E=16):
    return randn(2, 4, T, D), randn(2, 4, S, D), randn(2, 4, S, E), 0.2


def one_head(*D):
    return randn(2, 3, 1, *(D or (8,)))


def retention_layouts(q=None, state=None):
    state = randn(2, 3, 8, 8) if state is None else state
    return one_head() if q is None else q, one_head(), one_head(), torch.rand(2, 3, 1), state


CASES = {
    cpu.rms_norm: Case(norm_inputs),
    cpu.swiglu: Case(swiglu_inputs),
    cpu.head_linear: Case(head_inputs),
    cpu.unembed_cross_entropy: Case(unembed_inputs, "bf16 autocast gradient no_compiler", gradients=True),
    # Angles are products in fp32, or a prompt's keys would be turned further than a step's.
    cpu.rope: Case(rope_inputs, exact=torch.float32),
    cpu.rotate: Case(rotate_inputs),
    cpu_attention.decode: Case(lambda r: decode_inputs(r, dtypes=CACHE_DTYPES), "bf16 autocast"),
    cpu_attention.causal: Case(
        lambda r: prompt_inputs(r, dtypes=CACHE_DTYPES), "autocast gradient torch.compile", gradients=True
    ),
    fused.attention: Case(any_inputs, SITUATIONS, gradients=True),
    fused.masked_attention: Case(masked_inputs, SITUATIONS, gradients=True),
    cpu_attention.paged_decode: Case(paged_inputs, "bf16 autocast"),
    cpu.put: Case(put_inputs),
    cpu.retention_step: Case(retention_inputs),
    triton.decode_attention: Case(triton_inputs, "bf16 autocast no_compiler"),
    triton.retention_step: Case(lambda r: retention_inputs(r, (torch.float32, torch.bfloat16), DEVICE), "no_compiler"),
    cpu.huge_pages: Case(
        lambda r: ((r.randint(1, 3), 10_001, r.randint(60, 70)), r.choice((torch.float32, torch.int64)), CPU),
        SITUATIONS.replace(" meta", ""),
    ),
    cpu.read_all: Case(lambda r: (torch.randint(-3, 4, (r.randint(1, 3), 2**17)).float(),)),
    cpu.draw: Case(draw_inputs),
    replay.decode_step: Case(step_inputs, within=1e-4),  # a whole model, whose retention is hardly normed
}
R = random.Random(0)
COS, SIN = randn(2, 9, 4).unbind()
ONE = torch.tensor([1])
DECLINED = {  # kernel: arguments whose shape or layout it does not support
    cpu.rms_norm: lambda: [
        (randn(9),), (randn(9, 4).T,), (randn(4, 3, 2, 9).transpose(0, 2),), (randn(3, 9), randn(9).double()),
    ],
    cpu.swiglu: lambda: [(randn(3, 10)[:, :8],), (randn(8, 3).T,)],
    cpu.head_linear: lambda: [
        (randn(2, 3, 1, 30), randn(3, 30, 16)), (randn(2, 3, 1, 32), randn(3, 32, 30)),
        (randn(2, 3, 2, 32), randn(3, 32, 16)), (randn(33, 3, 1, 32), randn(3, 32, 16)),
        (randn(0, 3, 1, 32), randn(3, 32, 16)), (randn(2, 3, 1, 32), randn(3, 32, 16, 2)[..., 0]),
    ],
    cpu.rope: lambda: [
        (torch.tensor([3, 4]), randn(4)), (torch.tensor([[[3]]]), randn(4)),
        (torch.tensor([3], dtype=torch.int32), randn(4)),
    ],
    cpu.rotate: lambda: [
        (randn(3, 9, 8), COS, SIN), (randn(2, 3, 8, 9).mT, COS, SIN),
        *((randn(2, 3, 9, 8), cos, SIN.T.contiguous().T) for cos in (COS, COS.T.contiguous().T)),
    ],
    cpu_attention.decode: lambda: [
        qkv(T=3), (*qkv(T=1), 4), qkv(T=1, E=12), (*(x[:0] for x in qkv(T=1)[:3]), 0.2),
        (*(x[..., :8] for x in qkv(T=1)[:3]), 0.2),
        (qkv(T=1)[0], *(x.transpose(1, 2) for x in qkv(S=4, T=4)[1:3]), 0.2),
    ],
    cpu_attention.causal: lambda: [
        qkv(T=7), (qkv()[0].mT.contiguous().mT, *qkv()[1:]), (*qkv(T=1), 0, torch.tensor([3])),
    ],
    fused.attention: lambda: [(*randn(3, 0, 4, 9, 8), 0.2, 4)],
    fused.masked_attention: lambda: [(*randn(3, 0, 4, 9, 8), 0.2, randn(0, 4, 9, 9))],
    cpu_attention.paged_decode: lambda: [
        (*paged_inputs(R)[:5], paged_inputs(R)[5].T.contiguous().T),
        (*(x[..., :8] for x in qkv(T=1)[:3]), 0.2, torch.tensor([3, 4]), torch.tensor([[0], [1]])),
        (*qkv(T=1, S=8), torch.tensor([3, 12]), torch.tensor([[0, 1], [1, 0]])),
    ],
    cpu.retention_step: lambda: [
        retention_layouts(q=one_head(9)[..., :8]), retention_layouts(state=randn(2, 3, 8, 8).mT),
    ],
    triton.decode_attention: lambda: [
        qkv(T=1), (*qkv(T=1), 4, torch.tensor([3])), (*qkv(T=1), 0, torch.tensor([3, 4])),
        (qkv(T=1)[0], qkv()[1].mT.contiguous().mT, *qkv()[2:], 0, torch.tensor([3])),
    ],
    triton.retention_step: lambda: [
        retention_layouts(q=one_head(8, 2)[..., 0]), retention_layouts(state=randn(2, 3, 8, 8).mT),
    ],
    cpu.huge_pages: lambda: [((2, 3), torch.float32, CPU)],
    cpu.read_all: lambda: [(torch.ones(2**17 + 1),), (torch.ones(2, 2**17 + 1)[:, 1:],)],
    cpu.put: lambda: [
        (randn(2, 3, 9, 8), torch.tensor([1, 4]), randn(2, 3, 2, 8)),
        (randn(2, 3, 9, 8), ONE, randn(2, 3, 1, 16)[..., ::2]),
        (randn(2, 3, 8, 9).mT, ONE, randn(2, 3, 1, 8)), (randn(2, 3, 9, 8).half(), ONE, randn(2, 3, 1, 8).half()),
    ],
    cpu.draw: lambda: [(randn(9, 3).T, torch.rand(3, 1), 1.0), (randn(9, 3).T, torch.rand(3, 1), 0.0)],
    replay.decode_step: lambda: [one_step(torch.float64), one_step(static=False)],
}  # fmt: skip


def each_kernel(kernels=KERNELS):
    def name(kernel):
        return f"{kernel.__module__.removeprefix('archs.kernels.')} {kernel.__name__}".removeprefix("torch._ops.")

    marks = {kernel: [] if "no_compiler" in CASES[kernel].runs_in else [needs_compiler] for kernel in kernels}
    return pytest.mark.parametrize("kernel", [pytest.param(k, id=name(k), marks=marks[k]) for k in kernels])


class OnGPU(Tensor):
    is_cuda = True


def supports(kernel, arguments):
    if kernel in TRITON:
        pytest.importorskip("triton", reason="Triton comes with PyTorch's CUDA build; it is not here")
        arguments = [x.as_subclass(OnGPU) if isinstance(x, Tensor) and not x.is_meta else x for x in arguments]
    return kernel.supports(*arguments)


def converted(arguments, function):
    """A copy with function(x) in place of each tensor of floating numbers, those of models and caches included."""

    def of_floats(x):
        return function(x) if x.is_floating_point() else x.clone()

    copies = {Tensor: of_floats, Cache: lambda x: with_tensors(x, of_floats)}
    copies[nn.Module] = lambda x: copy.deepcopy(x)._apply(of_floats)
    return [next((f(x) for kind, f in copies.items() if isinstance(x, kind)), x) for x in arguments]


def tensors(x):
    if isinstance(x, Cache):
        x = [getattr(layer, "tensors", None) or layer.state for layer in x.layers]
    if isinstance(x, tuple | list):
        return [tensor for each in x for tensor in tensors(each)]
    return [torch.as_tensor(x)] if isinstance(x, Tensor | float) else []


def floats(arguments):
    return [x for x in arguments if isinstance(x, Tensor) and x.is_floating_point()]


def assert_close(results, expected, rtol=2e-5):
    """To `rtol` of the largest number."""
    for x, y in zip(tensors(results), tensors(expected), strict=True):
        y = y.double()
        largest = y[y.isfinite()].abs().max().item() if y.isfinite().any() else 0
        near = max(rtol, torch.finfo(x.dtype).eps if x.dtype.is_floating_point else 0)
        torch.testing.assert_close(x.double(), y, rtol=0, atol=near * largest + 1e-6 * near, equal_nan=True)


def assert_equals_formula(kernel, arguments):
    case, formula = CASES[kernel], KERNELS[kernel].formula
    exact = converted(arguments, lambda x: x.detach().to(case.exact))
    of, of_exact = floats(arguments), floats(exact)
    apart = len({x.untyped_storage().data_ptr() for x in of if len(x)}) == len(of)  # no values that are columns of keys
    for x in of + of_exact:
        x.requires_grad_(case.gradients and apart)
    with torch.set_grad_enabled(case.gradients):
        result, expected = kernel(*arguments), formula(*exact)
    assert_close((result, arguments), (expected, exact), case.within)  # also what is changed in place
    if case.gradients and apart:
        grad = random.choice((randn(expected.shape), torch.ones(()).expand(expected.shape)))
        results = torch.autograd.grad(result, of, grad), torch.autograd.grad(expected, of_exact, grad.double())
        joined = (torch.cat([x.flatten() for x in gradients]) for gradients in results)
        assert_close(*joined, max(2e-5, *(torch.finfo(x.dtype).eps for x in of)))


@contextlib.contextmanager
def without_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere")
    build.cache_clear()
    yield
    build.cache_clear()
