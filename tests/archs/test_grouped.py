"""MHA, GQA and MQA against each other and, number by number, against transformers' Llama."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from archs import build

SHAPE = {"vocab_size": 61, "width": 48, "layers": 2, "heads": 4, "context": 32, "ffn_width": 80}


def same_weights(model, reference):
    """Copies transformers' weights of a decoder, attention aside, into ours."""
    with torch.no_grad():
        model.embed.weight.copy_(reference.model.embed_tokens.weight)
        model.norm.weight.copy_(reference.model.norm.weight)
        for ours, theirs in zip(model.blocks, reference.model.layers, strict=True):
            ours.attention_norm.weight.copy_(theirs.input_layernorm.weight)
            ours.ffn_norm.weight.copy_(theirs.post_attention_layernorm.weight)
            ours.ffn.gate_up.weight.copy_(torch.cat((theirs.mlp.gate_proj.weight, theirs.mlp.up_proj.weight)))
            ours.ffn.down.weight.copy_(theirs.mlp.down_proj.weight)
            ours.attention.out.weight.copy_(theirs.self_attn.o_proj.weight)
    return model.eval()


def randomise(module, std=0.3):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=std) if parameter.dim() > 1 else parameter.uniform_(0.5, 1.5)


@pytest.mark.parametrize(("arch", "options", "kv_heads"), [("mha", {}, 4), ("gqa", {"kv_heads": 2}, 2), ("mqa", {}, 1)])
def test_equals_llama_with_the_same_weights(arch, options, kv_heads):
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        intermediate_size=80,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )
    reference = LlamaForCausalLM(config).eval()
    randomise(reference)
    model = same_weights(build(arch, **SHAPE, **options), reference)
    with torch.no_grad():
        for ours, theirs in zip(model.blocks, reference.model.layers, strict=True):
            a = theirs.self_attn
            ours.attention.qkv.weight.copy_(torch.cat((a.q_proj.weight, a.k_proj.weight, a.v_proj.weight)))
        tokens = torch.randint(61, (2, 23))
        expected = reference(tokens).logits
        torch.testing.assert_close(model(tokens), expected, rtol=1e-4, atol=1e-4)
        cache = model.new_cache(2, 23)
        model.prefill(tokens[:, :22], cache)
        torch.testing.assert_close(model.decode(tokens[:, 22], cache), expected[:, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("arch", "kv_heads"), [("mha", 4), ("mqa", 1)])
def test_gqa_at_its_ends_is_mha_and_mqa(arch, kv_heads):
    end, gqa = build(arch, **SHAPE), build("gqa", **SHAPE, kv_heads=kv_heads)
    gqa.load_state_dict(end.state_dict())
    tokens = torch.randint(61, (2, 9))
    assert torch.equal(end(tokens), gqa(tokens))
    assert end.kv_bytes_per_token(torch.bfloat16) == gqa.kv_bytes_per_token(torch.bfloat16)


def test_keys_and_values_are_cached_for_kv_heads_alone():
    cache = build("gqa", **SHAPE, kv_heads=2).new_cache(3, 10)
    assert [tuple(s.shape) for s in cache.parts[0].streams] == [(3, 2, 10, 12)] * 2


def test_kv_heads_must_divide_heads():
    with pytest.raises(ValueError, match="kv_heads=3 must divide heads=4"):
        build("gqa", **SHAPE, kv_heads=3)
