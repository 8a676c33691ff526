"""Operators in C++ against definitions and torch."""

import gc
import math
import mmap
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from archs.attention import attend, rope_table, rotate
from archs.cpu import building, layers
from archs.cpu.attention import causal, split_kv, takes_attention, takes_causal
from archs.cpu.building import build, compiler, takes
from archs.cpu.layers import (
    MANY,
    add,
    cross_entropy,
    fade,
    gated,
    head_linear,
    join,
    learning_gated,
    linear,
    product,
    put,
    reader,
    rms_norm,
    swiglu,
    take,
    takes_few,
    takes_heads,
)
from test_attention import by_definition
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from archs.cache import HUGE_PAGE, zeros
from archs.decoder import NORM_EPS, Embedding, Linear, RMSNorm, normed

needs_compiler = pytest.mark.skipif(not compiler(), reason="no C++ compiler here")
# query heads, KV heads, key size, value size (None: the values are the first columns of the keys)
SHAPES = {
    "mha": (4, 4, 64, 64),
    "gqa": (8, 2, 32, 32),
    "mqa": (12, 1, 128, 128),
    "queries of no common divisor": (7, 1, 16, 16),
    "vectors of four": (6, 2, 20, 20),
    "vectors of two": (6, 2, 10, 10),
    "vectors of one": (4, 4, 7, 7),
    "queries that fill vectors": (16, 1, 64, 64),
    "of two lengths": (48, 2, 20, 20),
    "mla": (8, 1, 144, None),
    "mla of many queries": (32, 1, 40, None),
    "mla of odd sizes": (3, 1, 40, None),
}


def inputs(shape, batch: int, held: int, beyond: float = math.nan):
    """A cache of 16 more slots than are held; what stands in them is `beyond`."""
    H, G, D, E = shape
    q, k = torch.randn(batch, H, 1, D), torch.randn(batch, G, held + 16, D)
    v = torch.randn(batch, G, held + 16, E) if E else k[..., : D - D // 9 // 4 * 4 - 4]
    for x in (k, v):
        x[:, :, held:] = beyond
    return q, k[:, :, :held], v[:, :, :held]


@needs_compiler
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("held", [1, 17, 64, 300])
def test_one_token_attends_to_all_that_is_held(shape, held):
    torch.manual_seed(held)
    q, k, v = inputs(shape, 2, held)
    with torch.inference_mode():
        assert takes_attention(q, k, v)
        got = split_kv(q, k, v, 0.2)
        # Of all slots, by a position; also by one beyond them, and with gaps between sequences' queries.
        parts = [torch.as_strided(x, (*x.shape[:2], x.shape[2] + 16, x.shape[3]), x.stride()) for x in (k, v)]
        by_position = split_kv(q, *parts, 0.2, torch.tensor([held - 1]))
        apart = torch.cat((q, q), 1)[:, : q.shape[1]]
        beyond = split_kv(apart, k, v, 0.2, torch.tensor([held + 40]))
    expected = by_definition(q, k, v, scale=0.2)
    for found in (got, by_position, beyond):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)


@needs_compiler
@pytest.mark.parametrize("shape", ["mha", "vectors of four", "vectors of one", "queries that fill vectors"])
@pytest.mark.parametrize(("tokens", "held"), [(1, 1), (5, 5), (16, 16), (33, 33), (100, 100), (2, 40), (37, 101)])
@pytest.mark.parametrize("window", [None, 1, 7, 16, 40, 500])
def test_many_tokens_attend_to_those_before_them(shape, tokens, held, window):
    """Nothing beyond what is held is read; keys and values of two sizes, strides of a projection."""
    H, G, D, E = SHAPES[shape]
    torch.manual_seed(held)
    q, k, v = torch.randn(2, tokens, H, D).transpose(1, 2), *inputs((H, G, D, E + 3), 2, held)[1:]
    with torch.inference_mode():
        assert takes_causal(q, k, v) == (tokens >= 8)  # torch's is as fast for few
        got, _ = causal(q, k, v, 0.2, window)
    torch.testing.assert_close(got, by_definition(q, k, v, window, 0.2), rtol=1e-5, atol=2e-6)


@needs_compiler
@pytest.mark.parametrize("shape", ["mha", "gqa", "vectors of four", "vectors of one"])
@pytest.mark.parametrize(("tokens", "held"), [(1, 1), (16, 16), (50, 50), (37, 101)])
@pytest.mark.parametrize("window", [None, 1, 16, 23])
def test_gradients_of_many_tokens_are_those_of_the_definition(shape, tokens, held, window):
    """In fp64; keys and values of two sizes, a gradient that is the same for all (strides of 0)."""
    H, G, D, E = SHAPES[shape]
    torch.manual_seed(held)
    q, k, v = torch.randn(2, tokens, H, D).transpose(1, 2), *inputs((H, G, D, E + 3), 2, held)[1:]
    inputs_ = [x.requires_grad_() for x in (q, k, v)]
    exact = [x.detach().double().requires_grad_() for x in inputs_]
    for grad in (torch.randn(2, H, tokens, E + 3), torch.ones(()).expand(2, H, tokens, E + 3)):
        with FlopCounterMode(display=False) as counter:
            got = torch.autograd.grad(causal(*inputs_, 0.2, window)[0], inputs_, grad)
        pairs = 2 * H * tokens * min(held, window or held)
        assert counter.get_total_flops() == 2 * pairs * (4 * D + 3 * (E + 3))  # seven products
        expected = torch.autograd.grad(by_definition(*exact, window, 0.2), exact, grad.double())
        for one, other in zip(got, expected, strict=True):
            assert (one - other).abs().max() <= 2e-6 * other.abs().max() + 1e-5


@needs_compiler
def test_a_gradient_that_is_broken_stays_broken():
    """It is seen by the keys that it reaches, and by no other query or head."""
    H, _, D, E = SHAPES["mha"]
    q, k, v = (torch.randn(1, H, 40, size, requires_grad=True) for size in (D, D, E))
    grad = torch.randn(1, H, 40, E)
    grad[:, 0, 21] = math.nan
    got = torch.autograd.grad(causal(q, k, v, 0.2)[0], (q, k, v), grad)
    assert got[0][:, 0].isnan().all(-1).nonzero()[:, 1].tolist() == [21]
    assert all(x[:, 0, :22].isnan().all() for x in got[1:])
    assert not any(x[:, 1:].isnan().any() for x in got)


@needs_compiler
@pytest.mark.parametrize("rows", [1, 5, 48, 49, 300])
@pytest.mark.parametrize(("K", "F"), [(16, 16), (100, 33), (64, 854), (769, 40), (1600, 16)])
def test_products_of_many_rows_and_their_gradients_are_torchs(rows, K, F):
    """Also through torch.compile, twice, and several gradients at once."""
    x, weight = torch.randn(rows, K, requires_grad=True), torch.randn(F, K, requires_grad=True)
    expected, got = x @ weight.T, product(x, weight, True)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(product(got, weight, False), expected @ weight, rtol=1e-4, atol=1e-1)
    grads = torch.randn(3, rows, F)
    for batched in (False, True):
        given = grads if batched else grads[0]
        found, wanted = (
            torch.autograd.grad(y, (x, weight), given, retain_graph=True, is_grads_batched=batched)
            for y in (got, expected)
        )
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-2)
    with FlopCounterMode(display=False) as flops:
        product(x, weight, True)
    assert flops.get_total_flops() == 2 * rows * K * F


@needs_compiler
def test_products_of_many_rows_have_second_gradients_and_are_compiled():
    x, weight = torch.randn(20, 32, requires_grad=True), torch.randn(40, 32, requires_grad=True)
    for way in (product, torch.compile(product, backend="aot_eager", fullgraph=True)):
        found = []
        for y in (way(x, weight, True), x @ weight.T):
            of = torch.autograd.grad(y.square().sum(), (x, weight), create_graph=way is product)
            if way is product:
                of = torch.autograd.grad(sum(first.square().sum() for first in of), (x, weight))
            found.append(of)
        torch.testing.assert_close(*found, rtol=1e-3, atol=1e-1)


def goes_through_product(layer, x) -> bool:
    with FlopCounterMode(display=False) as flops:
        layer(x)
    return product.overloadpacket in flops.get_flop_counts()["Global"]


@pytest.fixture
def products_pay(monkeypatch):
    """From 256 rows on, on every processor."""
    monkeypatch.setattr(layers, "rows_that_pay", lambda: 256)
    monkeypatch.setattr(layers, "MUCH", 0)


@needs_compiler
def test_models_of_many_tokens_go_through_products_of_ours_where_these_pay(products_pay):
    layer, x = Linear(32, 48), torch.randn(2, 128, 32)
    assert goes_through_product(layer, x)
    assert not goes_through_product(layer, x[:, 1:])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        layer(torch.randn(1000, 16))
    assert layers.takes_product(x, layer.weight)
    assert not layers.takes_product(x, layer.weight.to("meta"))
    assert not goes_through_product(layer.double(), x.double())


@needs_compiler
@pytest.mark.parametrize("tokens", ["contiguous", "transposed", "expanded"])
@pytest.mark.parametrize("weight", ["contiguous", "transposed"])
def test_products_of_what_is_not_contiguous_are_torchs(products_pay, tokens, weight):
    """Also of gradients that are one number, and through torch.func."""
    layer, x = Linear(32, 48), torch.randn(2, 300, 32)
    x = {"contiguous": x, "transposed": x.mT.contiguous().mT, "expanded": x[:1].expand(2, -1, -1)}[tokens]
    if weight == "transposed":
        layer.weight = nn.Parameter(layer.weight.detach().T.contiguous().T)
    assert goes_through_product(layer, x) == (weight == "contiguous")
    for sums in (torch.sum, lambda y: y.square().sum()):
        x = x.detach().requires_grad_()
        exact = x.detach().double().requires_grad_(), layer.weight.detach().double().requires_grad_()
        loss, expected = sums(layer(x)), sums(F.linear(*exact))
        torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-3)
        wanted = torch.autograd.grad(expected, exact)
        for one, other in zip(torch.autograd.grad(loss, (x, layer.weight)), wanted, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)
        found = torch.func.grad(lambda x, sums=sums: sums(layer(x)))(x.detach())
        torch.testing.assert_close(found.double(), wanted[0], rtol=1e-4, atol=1e-4)


@needs_compiler
def test_products_of_ours_are_for_processors_that_gain(monkeypatch):
    assert layers.rows_that_pay() >= MANY
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    said = iter(["vendor_id : AuthenticAMD", "vendor_id : GenuineIntel", OSError()])

    def read_text(path, **_):
        if isinstance(text := next(said), OSError):
            raise text
        return text

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr(layers, "build", object)
    pays = []
    for _ in range(3):
        layers._is_amd.cache_clear()
        pays.append(layers.rows_that_pay() < math.inf)
    layers._is_amd.cache_clear()
    assert pays == [True, False, False]
    monkeypatch.undo()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert layers.rows_that_pay() == math.inf


@needs_compiler
@pytest.mark.parametrize("size", [1, 7, 64, 300])
def test_cross_entropy_is_torchs(size):
    logits = torch.randn(70, size) * torch.logspace(-1, 3, 70)[:, None]
    targets = torch.randint(size, (70,))
    exact = logits.double().requires_grad_()
    nats = F.cross_entropy(exact, targets, reduction="none")
    nats.sum().backward()
    got = cross_entropy(logits, targets)
    torch.testing.assert_close(got, nats.detach().float(), rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(logits, exact.grad.float(), rtol=1e-5, atol=1e-6)


@needs_compiler
@pytest.mark.parametrize("top", [1.0, 100.0, 1000.0])
def test_a_small_loss_of_large_logits_keeps_its_digits(top):
    logits = torch.tensor([[top, top - 10, *[top - 50] * 20]])
    expected = F.cross_entropy(logits.double(), torch.tensor([0]), reduction="none")
    torch.testing.assert_close(cross_entropy(logits, torch.tensor([0])).double(), expected, rtol=5e-3, atol=0)


@needs_compiler
def test_what_has_no_gradient_says_so():
    x, table = torch.randn(1, 2, 16, 8, requires_grad=True), rope_table(0, 16, 8, 10_000.0, "cpu")
    (first,) = torch.autograd.grad(causal(x, x, x, 0.2)[0].square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second gradients"):
        first.sum().backward()
    cosine = table[0].clone().requires_grad_()
    rotate(x, (cosine, table[1])).sum().backward()  # torch's, then
    assert cosine.grad.abs().sum() > 0


@needs_compiler
def test_cross_entropy_hides_nothing():
    logits = torch.randn(4, 30)
    logits[1, 3], logits[2, 29] = math.nan, math.inf
    assert cross_entropy(logits, torch.tensor([0, 1, 2, 3])).isnan().tolist() == [False, True, True, False]
    with pytest.raises(IndexError, match="2 of the numbers"):
        cross_entropy(torch.randn(3, 30), torch.tensor([30, 0, -100]))


@needs_compiler
@pytest.mark.parametrize("shape", ["mha", "queries that fill vectors"])
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_what_is_broken_stays_broken(shape, broken):
    """A score that is not finite is seen in the result, and in no token's before it."""
    H, _, D, _ = SHAPES[shape]
    q, k, v = torch.randn(1, H, 40, D), *inputs(SHAPES[shape], 1, 40)[1:]
    expected = by_definition(q, k, v, scale=0.2)
    k[:, :, 21] = torch.randn(D).abs() * broken
    got, _ = causal(q.abs(), k, v, 0.2)
    assert got[:, :, 21:].isnan().all()
    assert split_kv(q[:, :, -1:].abs(), k, v, 0.2).isnan().all()
    torch.testing.assert_close(causal(q, k, v, 0.2)[0][:, :, :21], expected[:, :, :21], rtol=1e-5, atol=2e-6)


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_long_sequences_are_split_among_threads(threads):
    q, k, v = inputs(SHAPES["mqa"], 1, 2100)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = split_kv(q, k, v, 0.3)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(got, by_definition(q, k, v, scale=0.3), rtol=1e-5, atol=2e-6)


@needs_compiler
@pytest.mark.parametrize("shape", ["gqa", "queries that fill vectors", "mla"])
@pytest.mark.parametrize("lengths", [(1, 33, 48), (1500, 40, 900)], ids=["short", "split"])
def test_sequences_of_their_own_lengths_in_blocks(shape, lengths):
    """Blocks in any order, NaN in those of no sequence and behind a sequence's last token."""
    H, G, D, E = SHAPES[shape]
    size, most = 16, -(-max(lengths) // 16)
    q = torch.randn(3, H, 1, D)
    k = torch.full((3 * most + 4, G, size, D), math.nan)
    v = torch.full((3 * most + 4, G, size, E), math.nan) if E else k[..., :100]
    table = torch.randperm(3 * most + 4)[: 3 * most].view(3, most)
    expected = []
    for b, length in enumerate(lengths):
        held = [torch.randn(1, G, length, x.shape[3]) for x in ((k, v) if E else (k,))]
        for t in range(length):
            for pool, x in zip((k, v), held, strict=False):
                pool[table[b, t // size], :, t % size] = x[0, :, t]
        keys, values = held if E else (held[0], held[0][..., :100])
        expected.append(by_definition(q[b : b + 1], keys, values, scale=0.2))
    got = split_kv(q, k, v, 0.2, torch.tensor(lengths) - 1, table)
    torch.testing.assert_close(got, torch.cat(expected), rtol=1e-5, atol=2e-6)


@needs_compiler
@pytest.mark.parametrize("scale", [1e-9, 1.0, 100.0])
def test_weights_of_any_size(scale):
    """Scores of hundreds: a weight of e^-300 is 0 and nothing overflows; a scale of nearly 0 gives the mean."""
    q, k, v = inputs(SHAPES["gqa"], 2, 77)
    expected = by_definition(q.double(), k.double(), v.double(), scale=scale).float()
    torch.testing.assert_close(split_kv(q, k, v, scale), expected, rtol=1e-4, atol=1e-4 if scale > 1 else 1e-6)


@needs_compiler
@pytest.mark.parametrize("shape", ["mha", "gqa", "queries that fill vectors", "mla"])
def test_scores_that_grow_all_the_way(shape):
    """What was summed fades with each tile, also where its values are added later."""
    q, k, v = inputs(SHAPES[shape], 2, 77)
    k.mul_(torch.linspace(1, 30, 77)[:, None]).abs_()  # values that are columns of the keys, too
    q.abs_()
    torch.testing.assert_close(split_kv(q, k, v, 0.1), by_definition(q, k, v, scale=0.1), rtol=1e-4, atol=1e-4)
    if v.data_ptr() != k.data_ptr():
        prompt = torch.rand(2, SHAPES[shape][0], 40, q.shape[3])
        got, _ = causal(prompt, k, v, 0.1)
        torch.testing.assert_close(got, by_definition(prompt, k, v, scale=0.1), rtol=1e-4, atol=1e-4)


@needs_compiler
@pytest.mark.parametrize("shape", [(3, 7, 50), (1, 1, 1), (40, 16, 256)])
def test_rms_norm_is_torchs(shape):
    x, weight = torch.randn(shape).transpose(0, 1), torch.randn(shape[-1])
    expected = torch.nn.functional.rms_norm(x, shape[-1:], weight, eps=1e-6)
    norm = RMSNorm(shape[-1]).requires_grad_(False)
    norm.weight.copy_(weight)
    with torch.no_grad():
        assert takes(x, weight)
        torch.testing.assert_close(norm(x), expected, rtol=1e-5, atol=1e-6)
        for strided in (torch.randn(shape[-1], 4).T, torch.randn(4, 1).expand(4, shape[-1])):
            expected = torch.nn.functional.rms_norm(strided, shape[-1:], weight, eps=1e-6)
            torch.testing.assert_close(norm(strided), expected, rtol=1e-5, atol=1e-6)
    x, weight = x[:, 0, :20], weight[:20]  # rows with gaps between them
    expected = torch.nn.functional.rms_norm(x, weight.shape, weight, 1e-6)
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rms_norm(x, None, 1e-6), torch.nn.functional.rms_norm(x, weight.shape, eps=1e-6))
    assert not takes(x, weight.requires_grad_())


@needs_compiler
@pytest.mark.parametrize("rows", [1, 2, 5, 16, 31])
@pytest.mark.parametrize(("width", "hidden"), [(16, 48), (256, 704), (17, 16), (40, 31), (128, 427)])
def test_products_of_few_rows_are_torchs(rows, width, hidden):
    """Against fp64; also gates of -100 and 100, at which silu is 0 and its argument."""
    x, gate_up, down = torch.randn(rows, 1, width), torch.randn(2 * hidden, width), torch.randn(width, hidden)
    x[0], gate_up[0], gate_up[1] = 1, -100 / width, 100 / width
    with torch.inference_mode():
        assert takes_few(x, gate_up, down)
        gate, up = F.linear(x.double(), gate_up.double()).chunk(2, dim=-1)
        expected = F.linear(F.silu(gate) * up, down.double()).float()
        torch.testing.assert_close(swiglu(x, gate_up, down), expected, rtol=1e-5, atol=1e-6 * expected.abs().max())
        expected = F.linear(x.double(), gate_up.double()).float()
        torch.testing.assert_close(linear(x, gate_up), expected, rtol=1e-5, atol=1e-6 * expected.abs().max())
        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            Linear(width, hidden)(x[..., 1:])


@needs_compiler
def test_no_rows_have_no_products():
    x = torch.empty(0, 64)
    assert linear(x, torch.randn(48, 64)).shape == (0, 48)
    assert swiglu(x, torch.randn(96, 64), torch.randn(64, 48)).shape == (0, 64)
    assert head_linear(torch.empty(0, 4, 1, 16), torch.randn(4, 32, 16).mT).shape == (0, 4, 1, 32)


@needs_compiler
@pytest.mark.parametrize("batch", [1, 3, 8, 17])
@pytest.mark.parametrize("transposed", [False, True])
def test_each_head_has_a_matrix_of_its_own(batch, transposed):
    x = torch.randn(batch, 5, 3, 48)[:, :, :1, :32]
    weight = torch.randn(5, 70, 32).mT[:, :, :64] if transposed else torch.randn(5, 40, 64)[:, 3:35]
    with torch.inference_mode():
        assert takes_heads(x, weight)
        expected = torch.einsum("bhtk,hkf->bhtf", x.double(), weight.double()).float()
        torch.testing.assert_close(head_linear(x, weight), expected, rtol=1e-5, atol=1e-5)
        assert not takes_heads(x[..., :30], weight[:, :30])
        assert not takes_heads(x.expand(-1, -1, 2, -1), weight)


@needs_compiler
def test_a_token_is_put_where_it_belongs_and_nowhere_else():
    stream, new = torch.randn(2, 3, 7, 5), torch.randn(2, 1, 4, 5)[:, :, :3].transpose(1, 2)
    expected = stream.clone()
    expected[:, :, 4] = new[:, :, 0]
    put(stream, new, torch.tensor([4]))
    assert torch.equal(stream, expected)


@needs_compiler
def test_rows_are_taken_by_their_numbers():
    table = torch.randn(9, 5)
    index = torch.tensor([[8], [0], [3]])
    assert torch.equal(take(table, index), F.embedding(index, table))
    embedding = Embedding(9, 5, _weight=table, _freeze=True)
    assert torch.equal(embedding(index), embedding(index.int()))
    transposed = Embedding(5, 9, _weight=table.T, _freeze=True)
    assert torch.equal(transposed(index % 5), F.embedding(index % 5, table.T))
    for missing in (9, -1):
        with pytest.raises(IndexError, match="1 of the numbers"):
            take(table, torch.tensor([3, missing]))


@needs_compiler
@pytest.mark.parametrize("position", [0, 1, 900, 130_000])
def test_one_position_has_the_tables_of_many(position):
    """Whatever the kernel: keys of a prompt are turned by torch's tables, a step's by ours."""
    for made, expected in zip(
        rope_table(torch.tensor([position]), 1, 24, 10_000.0, "cpu"),
        rope_table(position, 1, 24, 10_000.0, "cpu"),
        strict=True,
    ):
        assert made.shape == expected.shape
        torch.testing.assert_close(made, expected, rtol=0, atol=3e-7)


@needs_compiler
def test_vectors_are_joined_as_torch_does():
    a, b = torch.randn(2, 1, 3, 7).transpose(1, 2)[..., :4], torch.randn(2, 3, 1, 5)
    assert torch.equal(join(a, b), torch.cat((a, b), dim=-1))


@needs_compiler
def test_sums_are_torchs():
    x, y = torch.randn(2, 3, 1, 37)
    assert torch.equal(add(x, y), x + y)


@needs_compiler
def test_other_products_are_left_to_torch():
    x, w = torch.randn(4, 1, 32), torch.randn(48, 32)
    assert takes_few(x, w)
    assert not takes_few(x.expand(-1, 9, -1), w)  # 36 rows
    assert not takes_few(x, w[:15])
    assert not takes_few(x, w.T)
    assert not takes_few(x.bfloat16(), w.bfloat16())
    assert not takes_few(x, w.clone().requires_grad_())
    with torch.autocast("cpu", torch.bfloat16):
        assert not takes_few(x, w)


@needs_compiler
@pytest.mark.parametrize("positions", [7, torch.tensor([[[3]], [[0]], [[900]]])], ids=["one", "one a sequence"])
def test_one_token_is_turned_as_many_are(positions):
    x = torch.randn(3, 1, 5, 24).transpose(1, 2)
    rope = rope_table(positions, 1, 24, 10_000.0, "cpu")
    with torch.inference_mode():
        assert takes(x, *rope)
        got = rotate(x, rope)
    torch.testing.assert_close(got, rotate(x.double(), rope).float(), rtol=1e-5, atol=1e-6)  # torch's


@needs_compiler
@pytest.mark.parametrize("size", [2, 6, 64])
def test_many_tokens_are_turned_as_torch_does(size):
    x, rope = torch.randn(3, 40, 5, 2 * size).transpose(1, 2)[..., size:], rope_table(11, 40, size, 10_000.0, "cpu")
    got = rotate(x, rope)
    torch.testing.assert_close(got, rotate(x.double(), rope).float(), rtol=1e-5, atol=1e-6)  # torch's


@needs_compiler
@pytest.mark.parametrize("shape", [(3, 7, 50), (1, 1, 1), (40, 16, 256), (5, 2, 1366)])
@pytest.mark.parametrize("layer", ["norm", "norm without weight", "gate", "rotary"])
def test_gradients_of_a_layers_parts_are_torchs(shape, layer):
    """Of inputs with gaps, and of weights; in fp64, but for rotary positions, whose tables have gaps, too."""
    x = torch.randn(shape).transpose(0, 1)
    x = torch.cat((x, x), -1).mul_(10).requires_grad_()
    size = shape[-1]
    if layer.startswith("norm"):
        x = x.detach()[..., :size].requires_grad_()
        weights = [] if "without" in layer else [torch.randn(size, requires_grad=True)]
        ours, torchs = normed, lambda *given: F.rms_norm(given[0], (size,), *given[1:], eps=NORM_EPS)
    elif layer == "gate":
        weights, ours = [], learning_gated
        torchs = lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1]  # noqa: E731
    else:
        table = torch.cat(rope_table(3, shape[0], 2 * size, 10_000.0, "cpu"), -1).chunk(2, -1)
        x, weights = x.detach().transpose(0, 1)[None].transpose(1, 2).requires_grad_(), []
        ours = torchs = lambda x: rotate(x, table)
    given = [x, *weights]
    exact = [x.detach().double().requires_grad_() for x in given]
    assert takes(*given, learns=True)
    expected = torchs(*exact)
    grad = torch.randn(expected.shape[::-1]).permute(*range(expected.dim())[::-1])
    got = torch.autograd.grad(ours(*given), given, grad)
    for one, other in zip(got, torch.autograd.grad(expected, exact, grad.double()), strict=True):
        torch.testing.assert_close(one, other.float(), rtol=1e-4, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("shape", [(1, 1, 2), (3, 50, 46), (200, 1366)])
def test_a_gate_is_torchs(shape):
    x = torch.randn(shape) * 30
    gate, up = x.double().chunk(2, dim=-1)
    torch.testing.assert_close(gated(x), (F.silu(gate) * up).float(), rtol=1e-5, atol=1e-6)


@needs_compiler
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_scores_fade_with_distance(chunk):
    """Down to e^-1000, and a token's own product of large numbers that cancel."""
    q, k = torch.randn(3, 5, chunk, 9), torch.randn(3, 5, chunk, 9)
    q[..., 0], q[..., 1], k[..., 0], k[..., 1] = 1e3, 1e3, 1e3, -1e3
    log_decay = -torch.rand(3, 5, chunk).cumsum(-1) * torch.tensor([1e-3, 1.0, 30.0])[:, None, None]
    scores = torch.randn(3, 5, chunk, chunk)
    expected = (scores * (log_decay[..., :, None] - log_decay[..., None, :]).exp()).tril(-1)
    expected += (q.double() * k.double()).sum(-1).float().diag_embed()
    fade(scores, q, k, log_decay)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_cache_is_zero_and_holds_its_own_bytes_alone(dtype):
    """Whatever pages it stands in; with what it was made from out of reach."""
    made = zeros(3, 5, 70_001, 4, dtype=dtype, device="cpu")
    gc.collect()
    assert made.untyped_storage().nbytes() == made.nbytes == 3 * 5 * 70_001 * 4 * dtype.itemsize
    assert made.is_contiguous()
    assert not made.any()
    made[2, 4, 70_000] = torch.arange(4)
    assert made.float().sum() == 6
    if hasattr(mmap, "MADV_HUGEPAGE"):
        assert made.data_ptr() % HUGE_PAGE == 0


@needs_compiler
def test_the_roof_reads_everything_once():
    x = torch.zeros(2**18)
    x[::3] = 1
    assert reader(x)() == x.sum()


@needs_compiler
def test_other_cases_are_left_to_torch():
    q, k, v = inputs(SHAPES["gqa"], 2, 9)
    with torch.inference_mode():
        assert takes_attention(q, k, v)
        assert not takes_attention(q.expand(-1, -1, 3, -1), k, v)  # several tokens
        assert not takes_attention(q.bfloat16(), k.bfloat16(), v.bfloat16())
        assert not takes_attention(q[..., :16], k[..., :16], v[..., :16])  # gaps between tokens
        other = torch.randn(*v.shape[:3], v.shape[3] + 4)[..., : v.shape[3] - 4]
        assert not takes_attention(q, k, other)  # of another size, and no columns of the keys
    assert not takes_attention(q.requires_grad_(), k, v)


def test_without_a_working_compiler_attention_is_torchs(monkeypatch, tmp_path):
    q, k, v = inputs(SHAPES["gqa"], 2, 9)
    for place, warns in (("/nowhere", False), (tmp_path / "c++", True)):
        (tmp_path / "c++").write_text("#!/bin/sh\necho 'no such flag' >&2\nexit 1\n")
        (tmp_path / "c++").chmod(0o755)
        monkeypatch.setenv("CXX", str(place))
        build.cache_clear()
        if warns:
            with pytest.warns(UserWarning, match="no such flag"):
                got = attend(q, k, v)
        else:
            got = attend(q, k, v)
        torch.testing.assert_close(got, by_definition(q, k, v), rtol=1e-5, atol=1e-6)
    build.cache_clear()


@needs_compiler
def test_a_library_is_built_once_for_all_processes(monkeypatch, tmp_path):
    """Anew for other flags; in a folder that cannot be made, for this process."""
    said = tmp_path / "said"
    wrapped = tmp_path / "c++"
    wrapped.write_text(f'#!/bin/sh\ncase "$*" in *-dM*) ;; *) echo built >> {said};; esac\nexec {compiler()} "$@"\n')
    wrapped.chmod(0o755)
    monkeypatch.setenv("CXX", str(wrapped))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def builds() -> int:
        build.cache_clear()
        q, k, v = inputs(SHAPES["gqa"], 1, 9)
        torch.testing.assert_close(split_kv(q, k, v, 0.2), by_definition(q, k, v, scale=0.2), rtol=1e-5, atol=2e-6)
        return said.read_text().count("built")

    assert [builds(), builds()] == [1, 1]
    monkeypatch.setattr(building, "FLAGS", [*building.FLAGS, "-DOTHER"])
    assert [builds(), builds()] == [2, 2]
    assert len(list((tmp_path / "cache").rglob("*"))) == 4  # two folders, two libraries
    monkeypatch.setenv("XDG_CACHE_HOME", str(said / "below a file"))
    assert builds() == 3
    build.cache_clear()


SANITIZED = ["-fsanitize=undefined", "-fno-sanitize-recover", "-Werror"]


@needs_compiler
@pytest.mark.parametrize("flags", [["-mno-avx512f"], ["-march=x86-64"], SANITIZED])
def test_narrower_vectors_give_the_same(flags, monkeypatch):
    if "86" not in subprocess.run([compiler(), "-dumpmachine"], capture_output=True, text=True).stdout:
        pytest.skip("flags of x86 processors")
    monkeypatch.setattr(building, "FLAGS", building.FLAGS + flags)
    build.cache_clear()
    for shape in ("mha", "queries that fill vectors"):
        q, k, v = inputs(SHAPES[shape], 2, 100)
        got = split_kv(q, k, v, 0.2)
        torch.testing.assert_close(got, by_definition(q, k, v, scale=0.2), rtol=1e-5, atol=2e-6)
    prompt = torch.randn(2, len(q[0]), 50, q.shape[3])
    given = [x.requires_grad_() for x in (prompt, k, v)]
    expected = by_definition(*(x.double() for x in given), 20, 0.2).float()
    got, _ = causal(prompt, k, v, 0.2, 20)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-6)
    for grads in zip(*(torch.autograd.grad(x.square().sum(), given) for x in (got, expected)), strict=True):
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-4)
    x, w = torch.randn(5, 64), torch.randn(48, 64)
    torch.testing.assert_close(linear(x, w), F.linear(x, w), rtol=1e-5, atol=1e-5)
    build.cache_clear()
