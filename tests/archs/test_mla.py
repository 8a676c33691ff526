"""MLA: both forms agree, and equal transformers' DeepSeek-V3 with the same weights."""

import pytest
import torch
from test_grouped import randomise, same_weights
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from archs import build

SHAPE = {"vocab_size": 61, "width": 48, "layers": 2, "heads": 4, "context": 32, "ffn_width": 80}


@pytest.mark.parametrize("q_rank", [0, 20])
def test_equals_deepseek_v3_with_the_same_weights(q_rank):
    config = DeepseekV3Config(
        vocab_size=61,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        first_k_dense_replace=2,  # no mixture of experts
        kv_lora_rank=24,
        q_lora_rank=q_rank or None,
        qk_rope_head_dim=6,
        qk_nope_head_dim=10,
        v_head_dim=14,
        rms_norm_eps=1e-6,
        rope_interleave=False,  # the same rotation with the pairs laid out as halves
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )
    reference = DeepseekV3ForCausalLM(config).eval()
    randomise(reference)
    options = {"kv_rank": 24, "q_rank": q_rank, "rope_dim": 6, "nope_dim": 10, "v_dim": 14}
    model = same_weights(build("mla", **SHAPE, **options), reference)
    with torch.no_grad():
        for ours, theirs in zip(model.blocks, reference.model.layers, strict=True):
            a = theirs.self_attn
            ours.attention.kv_down.weight.copy_(a.kv_a_proj_with_mqa.weight)
            ours.attention.kv_norm.weight.copy_(a.kv_a_layernorm.weight)
            ours.attention.kv_up.weight.copy_(a.kv_b_proj.weight)
            if q_rank:
                ours.attention.q_down.weight.copy_(a.q_a_proj.weight)
                ours.attention.q_norm.weight.copy_(a.q_a_layernorm.weight)
            ours.attention.q_up.weight.copy_((a.q_b_proj if q_rank else a.q_proj).weight)
        tokens = torch.randint(61, (2, 23))
        expected = reference(tokens).logits
        torch.testing.assert_close(model(tokens), expected, rtol=1e-4, atol=1e-4)
        cache = model.new_cache(2, 23)
        model.prefill(tokens[:, :22], cache)
        torch.testing.assert_close(model.decode(tokens[:, 22], cache), expected[:, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("T", "S"), [(1, 1), (1, 17), (6, 6), (4, 17)])
def test_absorbed_equals_materialised(T, S):
    attention = build("mla", **SHAPE, kv_rank=24, rope_dim=6, nope_dim=10, v_dim=14).blocks[0].attention
    randomise(attention)
    q_nope, q_rope, kept = torch.randn(2, 4, T, 10), torch.randn(2, 4, T, 6), torch.randn(2, 1, S, 30)
    with torch.no_grad():
        absorbed, materialised = (form(q_nope, q_rope, kept) for form in (attention.absorbed, attention.materialised))
    torch.testing.assert_close(absorbed, materialised, rtol=1e-4, atol=1e-4)


def test_decode_is_absorbed_and_a_long_prompt_is_materialised(monkeypatch):
    model = build("mla", **SHAPE, kv_rank=24, rope_dim=6)
    attention, used = type(model.blocks[0].attention), []
    for form in ("absorbed", "materialised"):
        original = getattr(attention, form)
        monkeypatch.setattr(attention, form, lambda *a, form=form, original=original: used.append(form) or original(*a))
    cache = model.new_cache(1, 40)
    model.prefill(torch.randint(61, (1, 39)), cache)
    model.decode(torch.randint(61, (1,)), cache)
    assert used == ["materialised", "absorbed", "absorbed", "absorbed"]  # one token alone leaves the last layer


def test_only_the_normed_latent_and_the_rotary_key_are_cached():
    model = build("mla", **SHAPE, kv_rank=24, rope_dim=6)
    cache = model.new_cache(1, 5)
    model.prefill(torch.randint(61, (1, 5)), cache)
    (kept,) = cache.parts[0].streams
    assert kept.shape == (1, 1, 5, 30)
    torch.testing.assert_close(kept[..., :24].square().mean(-1), torch.ones(1, 1, 5), rtol=1e-3, atol=1e-3)


def test_heads_share_no_norm_of_the_rotary_key():
    """DeepSeek norms the latent, never the rotary key: doubling its projection doubles what is cached of it."""
    model = build("mla", **SHAPE, kv_rank=24, rope_dim=6)
    tokens, kept = torch.randint(61, (1, 5)), []
    for _ in range(2):
        cache = model.new_cache(1, 5)
        model.prefill(tokens, cache)
        kept.append(cache.parts[0].streams[0].clone())
        with torch.no_grad():
            model.blocks[0].attention.kv_down.weight[24:] *= 2
    torch.testing.assert_close(kept[1][..., 24:], 2 * kept[0][..., 24:])
    torch.testing.assert_close(kept[1][..., :24], kept[0][..., :24])


def test_deepseek_v2s_cache():
    """DeepSeek-V2 technical report, Table 9: 60 layers of 576 elements are 34.6K elements a token."""
    with torch.device("meta"):
        model = build(
            "mla", vocab_size=8, width=64, layers=60, heads=4, context=8, head_dim=16, kv_rank=512, rope_dim=64
        )
    assert model.kv_bytes_per_token(torch.bfloat16) == 2 * 34_560


def test_an_odd_rope_size_is_refused_by_name():
    with pytest.raises(ValueError, match="rope_dim=7: must be even"):
        build("mla", **SHAPE, kv_rank=24, rope_dim=7)
