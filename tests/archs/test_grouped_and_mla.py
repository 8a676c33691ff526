"""GQA at its ends is MHA and MQA; both forms of MLA agree. test_laws.py compares them with transformers' models."""

import pytest
import torch
from helpers import SHAPE, make

from archs import build
from archs.kv import KV, View
from train.export import hf_config

LATENT = {"kv_rank": 24, "rope_dim": 6}


@pytest.mark.parametrize(("arch", "kv_heads"), [("mha", 4), ("gqa", 2), ("mqa", 1)])
def test_gqa_at_its_ends_is_mha_and_mqa_and_kv_heads_alone_are_cached(arch, kv_heads):
    one, gqa = make(arch, {"kv_heads": 2} if arch == "gqa" else {}), make("gqa", {"kv_heads": kv_heads})
    gqa.load_state_dict(one.state_dict())
    tokens = torch.randint(97, (2, 9))
    assert torch.equal(one(tokens), gqa(tokens))
    for layer in one.new_cache(3, 10).layers:
        assert [tuple(t.shape) for t in layer.tensors] == [(3, kv_heads, 10, SHAPE["width"] // SHAPE["heads"])] * 2


def test_a_subclass_with_other_layers_is_not_exported_as_its_parent(tmp_path):
    source = "from archs.grouped import MHA\n\n\nclass Windows(MHA):\n    def new_layers(self, make):\n"
    (tmp_path / "windows.py").write_text(f"{source}        return [make.ring(8, 4, 16)] * self.options.layers\n")
    with pytest.raises(ValueError, match="no class that computes Windows"):
        hf_config(build(f"{tmp_path}/windows.py:Windows", **SHAPE))


class Filled(KV):
    """A latent that was appended before."""

    def __init__(self, latent_B1SX):
        self.view = View(latent_B1SX, latent_B1SX[..., : LATENT["kv_rank"]])


@pytest.mark.parametrize(("T", "S"), [(1, 1), (1, 17), (6, 6), (4, 17)])
def test_absorbed_equals_materialised(T, S):
    attention = make("mla", LATENT | {"nope_dim": 10, "v_dim": 14}).blocks[0].attention
    q_nope, q_rope, cached = torch.randn(2, 4, T, 10), torch.randn(2, 4, T, 6), torch.randn(2, 1, S, 30)
    with torch.no_grad():
        kv = Filled(cached)
        absorbed = attention.absorbed(q_nope, q_rope, kv)
        torch.testing.assert_close(absorbed, attention.materialised(q_nope, q_rope, kv.view), rtol=1e-4, atol=1e-4)


def test_decode_is_absorbed_and_a_long_prompt_is_materialised(monkeypatch):
    model = make("mla", LATENT)
    attention, used = type(model.blocks[0].attention), []
    for form in ("absorbed", "materialised"):
        original = getattr(attention, form)
        monkeypatch.setattr(attention, form, lambda *a, form=form, original=original: used.append(form) or original(*a))
    cache = model.new_cache(1, 40)
    model.prefill(torch.randint(97, (1, 39)), cache)
    model.decode(torch.randint(97, (1,)), cache)
    assert used == ["materialised", "absorbed", "absorbed", "absorbed"]  # one token alone leaves the last layer


def test_the_normed_latent_and_the_rotary_key_that_is_not_normed_are_cached():
    model, tokens = make("mla", LATENT), torch.randint(97, (1, 5))
    caches = [model.new_cache(1, 5) for _ in range(2)]
    for cache in caches:
        model.prefill(tokens, cache)
        with torch.no_grad():
            model.blocks[0].attention.kv_down.weight[24:] *= 2
    (cached,), (doubled,) = (cache.layers[0].tensors for cache in caches)
    assert cached.shape == (1, 1, 5, 30)
    torch.testing.assert_close(cached[..., :24].square().mean(-1), torch.ones(1, 1, 5), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(doubled[..., 24:], 2 * cached[..., 24:])
    torch.testing.assert_close(doubled[..., :24], cached[..., :24])


def test_the_cache_of_deepseek_v2():
    """DeepSeek-V2 technical report, Table 9: 60 layers of 576 elements are 34.6K elements a token."""
    with torch.device("meta"):
        model = build("mla", **SHAPE | {"layers": 60}, kv_rank=512, rope_dim=64)
    assert model.kv_bytes_per_token(torch.bfloat16) == 2 * 34_560
