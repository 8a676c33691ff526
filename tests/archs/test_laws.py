"""Laws that every variant keeps, over the option sets that the variant names itself.

`pytest tests/archs/test_laws.py --variant my_file.py:MyVariant` runs them over a variant outside the registry."""

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from helpers import CASES, SHAPE, assert_near, cached_logits, each_variant, make
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from archs import VARIANTS, build
from archs.cache import with_tensors
from train.export import hf_config, hf_weights


@each_variant
@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 3),
    layers=st.sampled_from([2, 4]),
    heads=st.sampled_from([4, 8]),
    head_dim=st.sampled_from([8, 10, 16]),
    length=st.integers(1, 70),
)
@example(seed=29654, batch=1, layers=4, heads=8, head_dim=16, length=1)
@example(seed=836157, batch=1, layers=4, heads=8, head_dim=10, length=33)
@example(seed=20224, batch=2, layers=4, heads=8, head_dim=16, length=27)
def test_cached_logits_equal_the_full_forward(arch, options, seed, batch, layers, heads, head_dim, length):
    model = make(arch, options, seed, layers=layers, heads=heads, head_dim=head_dim)
    draw = random.Random(seed)
    tokens = torch.randint(97, (batch, length))
    chunks, left = [], draw.randint(1, length)
    while left:
        chunks.append(draw.randint(1, left))
        left -= chunks[-1]
    room = length + draw.randint(0, 9)
    error = cache_error(model, tokens, chunks, room)
    # Where almost nothing is normed (retention) fp32's rounding is seen. Then fp64 says whether it is that.
    assert error <= 1e-5 or (error <= 1e-3 and cache_error(model.double(), tokens, chunks, room) <= 1e-12)


@torch.inference_mode()
def cache_error(model, tokens, chunks, room) -> float:
    """The largest difference of cached logits to those of the full forward, as a share of the largest logit."""
    full = model(tokens)
    got = cached_logits(model, tokens, chunks, model.new_cache(len(tokens), room))
    return max((logits - full[:, t]).abs().max().item() for t, logits in got.items()) / full.abs().max().item()


@each_variant
def test_no_token_sees_the_future(arch, options):
    model = make(arch, options)
    tokens = torch.randint(97, (1, 40))
    for cut in (1, 7, 8, 30, 39):
        changed = tokens.clone()
        changed[:, cut:] = torch.randint(97, (1, 40 - cut))
        with torch.inference_mode():
            torch.testing.assert_close(model(tokens)[:, :cut], model(changed)[:, :cut])


def own_grads(model, x):
    """The gradients of all parameters; 0 of an index, which only selects."""
    return torch.autograd.grad(x, [*model.parameters()], materialize_grads=True)


@each_variant
def test_every_earlier_token_matters(arch, options):
    """Depth carries even a window's tokens to the last position, when it is long enough for the layers."""
    model = make(arch, options)
    x = model.embed(torch.randint(97, (1, 12))).detach().requires_grad_()
    model.hidden(x)[:, -1].sum().backward()
    assert (x.grad.abs().sum(-1) > 0).all()


@each_variant
@pytest.mark.parametrize("lengths", [[1, 20, 11, 32, 31], [32, 32, 9, 1, 21], [95]], ids=str)
def test_documents_of_a_row_have_the_logits_and_gradients_that_they_have_alone(arch, options, lengths):
    """Some begin or end where chunks of retention do, every 32 tokens. The second row is one document."""
    shorter = [options | {"window": 3}] if "window" in options else []  # than most documents
    tokens = torch.randint(97, (2, 95))
    document = torch.repeat_interleave(torch.arange(7, 7 + len(lengths)), torch.tensor(lengths))
    document_BT = torch.stack((document, torch.full_like(document, 4)))
    for model in (make(arch, options) for options in (options, *shorter)):
        packed, (row, other) = model(tokens, document_BT), tokens.split(1)
        alone = torch.cat((torch.cat([model(part) for part in row.split(lengths, 1)], 1), model(other)))
        assert_near(packed, alone)
        weight = torch.randn(alone.shape)
        of_packed, of_alone = (own_grads(model, (x * weight).sum()) for x in (packed, alone))
        for x, y in zip(of_packed, of_alone, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-4 * y.abs().max())  # NaN is equal to nothing


@each_variant
def test_a_large_prompt_is_prefilled_a_few_sequences_at_a_time(arch, options, monkeypatch):
    model = make(arch, options)
    tokens = torch.randint(97, (5, 20))
    with torch.inference_mode():
        expected = cached_logits(model, tokens, [9, 4], model.new_cache(5, 20))
        monkeypatch.setattr("archs.kernels.fused.TOKENS_AT_ONCE", {"cpu": 2 * 9})
        got = cached_logits(model, tokens, [9, 4], model.new_cache(5, 20))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@each_variant
def test_sequences_of_a_batch_do_not_mix(arch, options):
    model = make(arch, options)
    tokens = torch.randint(97, (3, 20))
    with torch.inference_mode():
        together = cached_logits(model, tokens, [9, 4], model.new_cache(3, 20))
        for row in range(3):
            alone = cached_logits(model, tokens[row : row + 1], [9, 4], model.new_cache(1, 20))
            expected = {t: logits[row : row + 1] for t, logits in together.items()}
            torch.testing.assert_close(alone, expected, rtol=1e-4, atol=1e-5)


@each_variant
def test_measured_bytes_equal_the_formulas(arch, options):
    model = make(arch, options, layers=4)
    for dtype in (torch.float32, torch.bfloat16):
        for batch, tokens in ((1, 3), (1, 64), (2, 65), (1, 300)):
            held = model.new_cache(batch, tokens, dtype).nbytes
            assert held == batch * model.kv_stored_bytes(tokens, dtype)
        per_token, constant = model.kv_bytes_per_token(dtype), model.kv_constant_bytes(dtype)
        assert model.new_cache(1, 300, dtype).nbytes == 300 * per_token + constant
        assert model.kv_read_bytes(300, dtype) > 0


@each_variant
def test_a_cache_is_allocated_once(arch, options):
    """Neither prefill nor decode replaces or adds a storage."""
    model = make(arch, options)
    cache = model.new_cache(1, 40)
    before, after = [], []
    with_tensors(cache.layers, lambda t: before.append(t.data_ptr()) or t)
    cached_logits(model, torch.randint(97, (1, 40)), [11, 9], cache)
    with_tensors(cache.layers, lambda t: after.append(t.data_ptr()) or t)
    assert before == after
    assert cache.length == 40


@each_variant
def test_more_than_max_tokens_is_a_clear_error_and_changes_nothing(arch, options):
    model = make(arch, options)
    tokens = torch.randint(97, (1, 12))
    cache = model.new_cache(1, 10)
    with pytest.raises(ValueError, match="max_tokens=12"):
        model.prefill(tokens, cache)
    model.prefill(tokens[:, :9], cache)
    with pytest.raises(ValueError, match="10 tokens"):
        model.prefill(tokens[:, 9:], cache)
    expected = model(tokens[:, :10])[:, -1]
    torch.testing.assert_close(model.decode(tokens[:, 9], cache), expected.detach(), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="10 of at most 10"):
        model.decode(tokens[:, 10], cache)
    with pytest.raises(ValueError, match="made for 1"):
        model.prefill(tokens.expand(2, -1), model.new_cache(1, 20))
    for wrong in ({"batch_size": 0, "max_tokens": 4}, {"batch_size": 1, "max_tokens": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            model.new_cache(**wrong)


@each_variant
def test_a_reset_cache_is_as_good_as_new(arch, options):
    model = make(arch, options)
    cache = model.new_cache(2, 30)
    cached_logits(model, torch.randint(97, (2, 30)), [20], cache)
    cache.reset()
    tokens = torch.randint(97, (2, 30))
    fresh = cached_logits(model, tokens, [13], model.new_cache(2, 30))
    torch.testing.assert_close(cached_logits(model, tokens, [13], cache), fresh, rtol=0, atol=0)


@each_variant
def test_a_cache_works_in_and_out_of_inference_mode(arch, options):
    model = make(arch, options)
    tokens = torch.randint(97, (1, 9))
    with torch.inference_mode():
        cache = model.new_cache(1, 9)
        model.prefill(tokens[:, :4], cache)
    model.prefill(tokens[:, 4:7], cache)
    with torch.inference_mode():
        model.decode(tokens[:, 7], cache)
    assert not model.decode(tokens[:, 8], cache).requires_grad


@pytest.mark.parametrize(("dtype", "near"), [(torch.bfloat16, 0.1), (torch.float16, 0.0125)], ids=str)
@each_variant
def test_a_cache_of_16_bits_of_an_fp32_model_is_near(arch, options, dtype, near):
    """As near as the dtype is fine; a decode step is recorded where that of an fp32 cache is."""
    model = make(arch, options)
    tokens = torch.randint(97, (2, 40))
    cache, exact = (model.new_cache(2, 40, each) for each in (dtype, torch.float32))
    with torch.inference_mode():
        full = model(tokens)
        got = cached_logits(model, tokens, [15, 10], cache)
        cached_logits(model, tokens, [15, 10], exact)
    assert cache.nbytes == exact.nbytes / 2
    assert (cache.step is None) == (exact.step is None)
    for t, logits in got.items():
        assert logits.dtype == torch.float32
        assert (logits - full[:, t]).abs().max() < near * full.abs().max()


@each_variant
def test_flops_equal_what_torch_counts(arch, options):
    """Weights: the whole forward without attention. Decode: everything, one token at a time, nothing being masked."""
    model = make(arch, options, layers=4)
    tokens = torch.randint(97, (1, 24))
    cache = model.new_cache(1, 25)
    with torch.inference_mode():
        model.prefill(tokens, cache)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model.decode(tokens[:, 0], cache)
    attended = model.decode_flops(25)
    # What the kernels do beyond what is needed: value columns of the rotary part (absorbed MLA).
    assert attended <= counter.get_total_flops() <= 1.15 * attended
    with FlopCounterMode(display=False) as counter:  # with gradients the products run in PyTorch, module by module
        model(tokens)
    linear = {f"{type(model).__name__}.{name}" for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    linear = {name for name in linear if name.rpartition(".")[0] not in linear}  # a gate is a part of its projection
    counted = sum(sum(per_op.values()) for name, per_op in counter.get_flop_counts().items() if name in linear)
    assert counted == 24 * model.matmul_flops()
    assert model.flops_per_token(24) > model.flops_per_token(1) >= model.matmul_flops()


@each_variant
def test_parameters_are_counted_once(arch, options):
    tied, untied = (make(arch, options, tie_embeddings=tie) for tie in (True, False))
    assert tied.count_params() == sum(p.numel() for p in tied.parameters())
    assert untied.count_params() - tied.count_params() == 97 * 64
    assert tied.count_params(embedding=False) == untied.count_params(embedding=False) == tied.count_params() - 97 * 64
    assert tied.matmul_flops() == untied.matmul_flops()


@each_variant
def test_gradients_reach_every_parameter_with_dropout_and_any_shape_has_logits(arch, options):
    model = make(arch, options, dropout=0.1).train()
    loss, own = model(torch.randint(97, (2, 33))).square().mean(), model.own_loss()
    (loss if own is None else loss + own).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    for shape in ((2, 1), (0, 5)):
        assert model(torch.zeros(shape, dtype=torch.long)).shape == (*shape, 97)


@each_variant
def test_in_fp64_gradients_are_those_of_differences(arch, options):
    model = make(arch, options, width=16, head_dim=4).double()
    x_BTW = torch.randn(1, 9, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: model.norm(model.hidden(x))[:, -1], x_BTW, fast_mode=True)


@each_variant
def test_gradients_in_batches_are_those_one_after_the_other(arch, options):
    model, x_BTW = make(arch, options), torch.randn(1, 12, 64)
    each, batched = (
        torch.autograd.functional.jacobian(lambda x: model.hidden(x)[:, -1, :5], x_BTW, vectorize=vectorize)
        for vectorize in (False, True)
    )
    torch.testing.assert_close(batched, each)


@each_variant
def test_weights_that_are_assigned_stay_tied(arch, options):
    model = make(arch, options)
    with torch.device("meta"):
        loaded = build(arch, **SHAPE, **options)
    loaded.load_state_dict(model.state_dict(), assign=True)
    assert loaded.unembed.weight is loaded.embed.weight
    assert loaded.count_params() == model.count_params()
    tokens = torch.randint(97, (2, 9))
    assert torch.equal(copy.deepcopy(loaded)(tokens), model(tokens))


@each_variant
def test_initialisation_scales_residual_projections_and_what_makes_latents(arch, options):
    torch.manual_seed(0)
    model = build(arch, **SHAPE | {"width": 128, "layers": 8}, **options)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            expected = 0.02 / 4 if name.endswith(("attention.out.weight", "ffn.down.weight")) else 0.02
            if name.endswith(("kv_down.weight", "q_down.weight")):
                parameter, expected = parameter[: options.get("kv_rank")], options.get("latent_std", 0.02)
            if name.endswith(("q_heads.weight", "kv_heads.weight")):
                expected = 128**-0.5
            if name.endswith((".of_offset", ".long.weight")):
                expected = options["offset_dim"] ** -0.5
            assert parameter.std().item() == pytest.approx(expected, rel=0.15), name


@each_variant
def test_in_mixed_precision_every_projection_is_computed_in_bf16(arch, options):
    """One that is computed in fp32 would be a handicap of this program's, not of the architecture."""
    model, dtypes = make(arch, options), {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _, __, out, name=name: dtypes.update({name: out.dtype}))
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randint(97, (2, 9)))
    assert {name for name, dtype in dtypes.items() if dtype != torch.bfloat16} == set()


WRONG = [
    ("mha", {"heads": 3}, "heads=3 must divide width=64, or give head_dim"),
    ("mha", {"vocab_size": 10**30}, "and below 2147483648"),
    ("mha", {"width": -8}, "width=-8: must be a whole number of at least 1"),
    ("mha", {"layers": 2.0}, "layers=2.0: must be a whole number"),
    ("mha", {"head_dim": 5}, "head_dim=5: must be even"),
    ("mha", {"context": None}, "context=None"),
    ("mha", {"dropout": 1.0}, "dropout=1.0: must be a number of at least 0 and below 1"),
    ("mha", {"rope_base": float("nan")}, "rope_base=nan"),
    ("mha", {"rope_base": "1e4"}, "rope_base='1e4'"),
    ("mha", {"tie_embeddings": 1}, "tie_embeddings=1: must be true or false"),
    ("gqa", {}, "gqa: needs the option 'kv_heads'"),
    ("gqa", {"kv_heads": 3}, "gqa: kv_heads=3 must divide heads=4"),
    ("gqa", {"kv_haeds": 2}, "unknown option 'kv_haeds'; allowed: vocab_size, .*; did you mean 'kv_heads'?"),
    ("mla", {"kv_rank": 24, "rope_dim": 7}, "rope_dim=7: must be even"),
    ("yoco", {"kv_heads": 2, "layers": 5}, "layers=5: must be even"),
    ("yoco", {"kv_heads": 2, "self_decoder": "full"}, "self_decoder='full': must be one of swa, gret"),
    ("mla2", {}, f"'mla2'; there are {', '.join(VARIANTS)}, or give file.py:Class"),
    ("nowhere.py:Mine", {}, "'nowhere.py:Mine': cannot load nowhere.py: .*No such file"),
    ("archs.nothing:Mine", {}, "cannot load archs.nothing: ModuleNotFoundError: No module named"),
    ("archs.grouped:Chunk", {}, "archs.grouped has no subclass of archs.Decoder named 'Chunk'"),
]


@pytest.mark.parametrize(("arch", "options", "message"), WRONG, ids=[message for *_, message in WRONG])
def test_wrong_options_and_architectures_are_refused_in_one_line(arch, options, message):
    with pytest.raises(ValueError, match=message) as error:
        build(arch, **SHAPE | options)
    assert "\n" not in str(error.value)


def test_a_variant_may_be_named_by_its_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("from archs.grouped import MHA\n\nclass Mine(MHA):\n    pass\n")
    tokens = torch.randint(97, (2, 9))
    assert torch.equal(make(f"{file}:Mine", {})(tokens), make("mha", {})(tokens))
    with pytest.raises(ValueError, match=r"mine.py has no subclass of archs.Decoder named 'Yours'"):
        build(f"{file}:Yours", **SHAPE)
    file.write_text("class Mine(")
    with pytest.raises(ValueError, match=r"cannot load .*mine.py"):
        build(f"{file}:Mine", **SHAPE)


def test_a_variant_whose_forward_pass_knows_no_documents_runs_without_them(tmp_path):
    own = "    def hidden(self, x, cache=None, start=0):\n        return super().hidden(x, cache, start)\n"
    (tmp_path / "mine.py").write_text(f"from archs.grouped import MHA\n\nclass Mine(MHA):\n{own}")
    model, tokens = make(f"{tmp_path}/mine.py:Mine", {}), torch.randint(97, (2, 9))
    assert torch.equal(model(tokens), make("mha", {})(tokens))
    with pytest.raises(TypeError, match=r"Mine.hidden.* 'document_BT'"):
        model(tokens, torch.zeros_like(tokens))


def test_defaults_are_filled_in():
    options = build("mha", **SHAPE).options
    assert (options.head_dim, options.ffn_width, options.rope_base) == (16, 192, 10_000.0)
    assert build("mha", **SHAPE | {"width": 60}, head_dim=6).options.ffn_width == 192


@each_variant
def test_transforms_of_functions_are_those_of_what_torch_computes(arch, options):
    """torch.func's gradients, of each sequence too, are autograd's; so are derivatives in forward mode, either way."""
    model, tokens = make(arch, options), torch.randint(97, (3, 20))
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    ways = {name: torch.randn_like(weight) for name, weight in weights.items()}

    def mean(weights, tokens):
        return torch.func.functional_call(model, weights, (tokens,)).logsumexp(-1).mean()

    each = [own_grads(model, mean({}, row[None])) for row in tokens]
    expected = {name: torch.stack(grads) for name, grads in zip(weights, zip(*each, strict=True), strict=True)}
    change = sum((expected[name].mean(0) * way).sum() for name, way in ways.items())
    with sdpa_kernel(SDPBackend.MATH):  # which alone has all of them
        of_each = torch.func.vmap(torch.func.grad(lambda weights, row: mean(weights, row[None])), (None, 0))
        got = of_each(weights, tokens)
        _, along = torch.func.jvp(lambda weights: mean(weights, tokens), (weights,), (ways,))
        with forward_ad.dual_level():
            dual = mean({name: forward_ad.make_dual(weight, ways[name]) for name, weight in weights.items()}, tokens)
            same = forward_ad.unpack_dual(dual).tangent
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close((along, same), (change, change), rtol=1e-3, atol=1e-4)


WITH_CLASSES = [("gqa", {"kv_heads": 2, "qk_norm": True})]
WITH_CLASSES += [("windowed", {"kv_heads": 2, "window": 6, "global_every": 2, "qk_norm": True})]


@pytest.mark.parametrize(("arch", "options"), [*CASES, *WITH_CLASSES])
def test_transformers_computes_the_same_from_exported_weights(arch, options):
    """Number by number, where the variant names a class of transformers: Llama, Qwen3, SmolLM3, DeepSeek-V3 and V3.2.
    Trained from there on, both have the same losses."""
    model = make(arch, options, tie_embeddings=False)
    normed = options.get("qk_norm")
    classes = {"mha": True, "mqa": True, "gqa": not options.get("tied_kv"), "mla": not normed}
    classes |= {
        "dsa": "q_rank" in options,
        "windowed": not options.get("sinks") and not (normed and options.get("nope")),
    }
    if ":" in arch:  # a user's own may have one
        try:
            hf_config(model)
        except ValueError:
            return
    elif options.get("gate") or not classes.get(arch):
        with pytest.raises(ValueError, match="transformers has no class "):
            hf_config(model)
        return
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
    reference = AutoModelForCausalLM.from_config(AutoConfig.for_model(**hf_config(model))).eval()
    reference.load_state_dict(hf_weights(model))
    tokens = torch.randint(97, (2, 23))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), reference(tokens).logits, rtol=1e-4, atol=1e-4)
    if options.get("latent_scale"):  # is in the weights of the norm there, and moves them faster
        return
    losses = []
    for trained, logits in ((model, model), (reference, lambda tokens: reference(tokens).logits)):
        optimizer, curve = torch.optim.SGD(trained.parameters(), lr=0.1), []
        for _ in range(8):
            loss = F.cross_entropy(logits(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        losses.append(curve)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3 if arch == "dsa" else 1e-4)  # rounding selects others
    assert losses[0][-1] < losses[0][0]


def test_transforms_are_seen_by_the_compiler():
    model, tokens = make("mha", {}), torch.randint(97, (3, 20))
    weights = {name: weight.detach() for name, weight in model.named_parameters()}

    def mean(weights):
        return torch.func.functional_call(model, weights, (tokens,)).logsumexp(-1).mean()

    def change(weights):
        return torch.func.jvp(mean, (weights,), ({name: weight.sin() for name, weight in weights.items()},))[1]

    with sdpa_kernel(SDPBackend.MATH):
        compiled = torch.compile(change, backend="aot_eager")(weights)
        torch.testing.assert_close(compiled, change(weights), rtol=1e-4, atol=1e-5)
