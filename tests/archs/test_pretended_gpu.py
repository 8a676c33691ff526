"""What is written for a GPU, on a pretended one: the same numbers as on a CPU, all tensors on one device, and nothing
in a decode or training step that waits for the host."""

import functools
import re
import warnings

import pytest
import torch
from helpers import cached_logits, each_variant, make
from pretend_gpu import OnGPU, Refused, pretended_gpu

from archs.grouped import GroupedAttention
from archs.kernels import triton_attention
from archs.techniques import TECHNIQUES, Quantisation, compressed_cache, technique
from train.module import LanguageModel, Retrofit

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: nothing has to be pretended")

HOPPER, ADA, TURING = (9, 0), (8, 9), (7, 5)
chips = pytest.mark.parametrize("chip", [HOPPER, ADA], ids=["hopper", "ada"])
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.1}  # of the largest


def assert_near(result, expected, dtype, times=1):
    result, expected = (x.data_ if isinstance(x, OnGPU) else x for x in (result, expected))
    assert (result - expected).abs().max() <= times * TOLERANCE[dtype] * expected.abs().max()


@each_variant
@pytest.mark.parametrize(("chip", "dtype"), [(HOPPER, torch.bfloat16), (ADA, torch.float32)], ids=["hopper", "ada"])
def test_a_step_is_captured_and_waits_for_nothing(arch, options, chip, dtype):
    model, tokens = make(arch, options), torch.randint(97, (2, 16))
    expected = cached_logits(model, tokens, [9, 1], model.new_cache(2, 20))
    with pretended_gpu(chip) as gpu:
        model, tokens = model.to("cuda", dtype), tokens.to("cuda")
        cache = model.new_cache(2, 20)
        logits = cached_logits(model, tokens[:, :13], [9, 1], cache)
        gpu.waits.clear()
        logits |= {t: model.decode(tokens[:, t], cache) for t in range(13, 16)}
        assert not gpu.waits
        assert cache.step.backend == "split-kv triton, cuda graph"
    for t, logits_BV in logits.items():
        assert_near(logits_BV, expected[t], dtype)


def test_without_triton_decode_goes_through_pytorch():
    """A GPU older than Ampere."""
    model, tokens = make("gqa", {"kv_heads": 2}), torch.randint(97, (2, 12))
    expected = cached_logits(model, tokens, [9], model.new_cache(2, 12))
    with pretended_gpu(TURING) as gpu:
        model, tokens = model.to("cuda"), tokens.to("cuda")
        cache = model.new_cache(2, 12)
        logits = cached_logits(model, tokens, [9], cache)
        assert cache.step is None
        assert set(gpu.attention) == {"efficient"}
    for t in expected:
        assert_near(logits[t], expected[t], torch.float32)


@pytest.mark.parametrize("wrong", ["loses a token", "is not finite", "does not fit"])
def test_a_kernel_that_is_wrong_on_this_gpu_is_found_at_its_first_use(wrong):
    model, tokens = make("gqa", {"kv_heads": 2}), torch.randint(97, (2, 16))
    expected = cached_logits(model, tokens, [9], model.new_cache(2, 16))

    def broken(q, k, v, scale, position, sinks=None, right=None):
        if wrong == "loses a token":
            return right(q, k, v, scale, (position - 1).clamp(min=0))
        if wrong == "does not fit" and q.shape[1] > 1:
            raise RuntimeError("out of resource: shared memory\nmore lines")
        return right(q, k, v, scale, position) / (0 if wrong == "is not finite" else 1)

    with pretended_gpu() as gpu, pytest.MonkeyPatch.context() as patch:
        right = triton_attention.split_kv_attention
        patch.setattr(triton_attention, "split_kv_attention", functools.partial(broken, right=right))
        model, tokens = model.to("cuda"), tokens.to("cuda")
        cache = model.new_cache(2, 16)
        with pytest.warns(UserWarning, match="on this GPU, which goes without it") as warned:
            logits = cached_logits(model, tokens[:, :13], [9], cache)
        assert len(warned) == 1
        gpu.waits.clear()
        logits |= {t: model.decode(tokens[:, t], cache) for t in range(13, 16)}
        assert not gpu.waits
        assert re.match("sdpa, cuda graph, decode_attention (was wrong by (inf|0)|failed: out)", cache.step.backend)
    for t in expected:
        assert_near(logits[t], expected[t], torch.float32)


@pytest.mark.parametrize("wrong", ["item", "mask", "device"])
def test_what_cuda_would_refuse_is_found(wrong, monkeypatch):
    """In a captured step a number given to Python, an index by a mask, a tensor on the CPU."""
    forward = GroupedAttention.forward

    def broken(self, x, chunk, kv):
        if wrong == "item":
            x = x * x.new_ones(1).item()
        elif wrong == "mask":
            x = x[torch.ones(x.shape, dtype=torch.bool, device=x.device)].view(x.shape)
        else:
            x = x + torch.zeros(x.shape[-1])
        return forward(self, x, chunk, kv)

    model, tokens = make("mha", {}), torch.randint(97, (2, 12))
    monkeypatch.setattr(GroupedAttention, "forward", broken)
    with pretended_gpu() as gpu:
        model, tokens = model.to("cuda"), tokens.to("cuda")
        cache = model.new_cache(2, 12)
        if wrong == "device":
            with pytest.raises(Refused, match="same device"):
                model.prefill(tokens[:, :9], cache)
            return
        with pytest.warns(UserWarning, match="decode goes without a CUDA graph"):
            cached_logits(model, tokens, [9], cache)
        assert cache.step.backend == "split-kv triton"
        assert gpu.waits


@each_variant
@chips
def test_a_training_step_equals_a_cpus_and_waits_for_nothing(arch, options, chip):
    shape = {"vocab_size": 97, "width": 64, "layers": 2, "heads": 4, "context": 40}
    options = options | ({"index_topk": 40} if "index_topk" in options else {})  # or rounding selects others
    tokens = torch.randint(97, (2, 41))

    def step(module, tokens):
        optimizer = module.configure_optimizers()["optimizer"]
        module._diverged = torch.zeros((), dtype=torch.bool, device=module.device)
        module._last_values = torch.zeros(2, device=module.device)
        with torch.autocast("cuda", torch.bfloat16, enabled=tokens.is_cuda):
            module._loss = loss = module.mean_nats(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        module.configure_gradient_clipping(optimizer)
        optimizer.step()
        return loss.detach(), {name: p.grad for name, p in module.named_parameters()}

    def make_module():
        return LanguageModel(arch, shape | options, tokens=1000).train()

    expected, gradients = step(make_module(), tokens)
    with pretended_gpu(chip) as gpu:
        module, tokens = make_module().to("cuda"), tokens.to("cuda")
        step(make_module().to("cuda"), tokens)  # compares kernels with their formulas
        gpu.waits.clear()
        loss, found = step(module, tokens)
        assert not gpu.waits
        kernels = {"flash varlen"} if "window" in options else set()
        plain = "nope_dim" not in options and not module.model.attends_itself
        if plain and options.get("self_decoder") != "gret":  # sizes that are no multiples of 8
            kernels |= {"cudnn"} if chip == HOPPER else {"flash"}
            kernels = {"efficient"} if options.get("sinks") else kernels  # the one that takes such masks
            assert kernels <= set(gpu.attention) <= kernels
    assert_near(loss, expected, torch.bfloat16)
    for name, gradient in gradients.items():
        assert_near(found[name], gradient, torch.bfloat16, 5 if ".indexer." in name else 1)  # of a small difference


ACTING = [(name, arch) for name in TECHNIQUES for arch in ("gqa", "mla", "yoco") if name != "dmc" or arch == "gqa"]
ACTING = [(name, arch) for name, arch in ACTING if not (TECHNIQUES[name].observes and arch == "yoco")]
OPTIONS = {"gqa": {"kv_heads": 2}, "mla": {"kv_rank": 32, "rope_dim": 8}, "yoco": {"kv_heads": 2, "window": 7}}


@pytest.mark.parametrize(("name", "arch"), ACTING, ids=lambda x: x)
@pytest.mark.parametrize("bits", [None, 4])
def test_techniques_act_as_on_a_cpu(name, arch, bits):
    model, tokens = make(arch, OPTIONS[arch], layers=4), torch.randint(97, (2, 16))
    if bits and not TECHNIQUES[name].quantisable:
        pytest.skip("not quantisable")
    own = {"snapkv": {"window": 4}, "vatp": {"first": 2}}.get(name, {})
    chosen = technique(name, budget=1.0 if name in ("full", "dmc") else 0.5, **own)
    quantisation = Quantisation(bits=bits, group=4, residual=4) if bits else None

    def run(model, tokens):
        cache = compressed_cache(model, chosen, 2, 16, quantisation=quantisation)
        return cached_logits(model, tokens, [12], cache)

    expected = run(model, tokens)
    with pretended_gpu():
        found = run(model.to("cuda"), tokens.to("cuda"))
    for t in expected:
        assert_near(found[t], expected[t], torch.float32)


def test_the_logits_of_a_batch_do_not_all_exist_at_once(monkeypatch):
    """Of so many that they would fill a GPU, in training and validation; the gradient is the same."""
    shape = {"vocab_size": 900, "width": 32, "layers": 1, "heads": 2, "context": 8}
    inputs, targets = torch.randint(900, (2, 6, 8)).unbind()
    results, largest = [], []
    for limit in (2**30, 2 * 8 * 900):
        monkeypatch.setattr("train.module.LOGITS_AT_ONCE", limit)
        with pretended_gpu() as gpu:
            module = LanguageModel("mha", shape, tokens=1).to("cuda")
            on_gpu = inputs.to("cuda"), targets.to("cuda")
            gpu.largest = 0
            loss = module.mean_nats(*on_gpu)
            loss.backward()
            module._validated = []
            module.validation_step((*on_gpu, 1), 0)
            results.append([loss.data_, module._validated[0][0], *(p.grad.data_ for p in module.parameters())])
            largest.append(gpu.largest)
    torch.testing.assert_close(*results)
    assert largest == [6 * 8 * 900, 900 * 32]  # the latter of the unembedding's weights


@chips
def test_a_model_is_trained_further_for_dmc(chip):
    options = {"vocab_size": 97, "width": 64, "layers": 2, "heads": 4, "context": 24, "kv_heads": 2}
    tokens = torch.randint(97, (2, 25))
    with pretended_gpu(chip):
        chosen = technique("dmc", budget=0.5)
        module = Retrofit(chosen, "gqa", options, tokens=1000).train().to("cuda")
        chosen.before_step(module.model, 0.5)
        tokens = tokens.to("cuda")
        with torch.autocast("cuda", torch.bfloat16):
            loss = module.mean_nats(tokens[:, :-1], tokens[:, 1:]) + chosen.penalty(module.model, 0.5)
        loss.backward()
        assert all(p.grad.data_.isfinite().all() for p in module.parameters())
        module.eval()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            cache = compressed_cache(module.model, chosen, 2, 25)
            logits = cached_logits(module.model, tokens, [20], cache)
        assert all(x.data_.isfinite().all() for x in logits.values())
