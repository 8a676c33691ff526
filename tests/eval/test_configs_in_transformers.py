"""Cache bytes from a config.json equal those of the cache that Hugging Face transformers fills, for small models."""

import pytest
import torch

from eval.kv_bytes.models import model_cache

transformers = pytest.importorskip("transformers")
from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: E402

TOKENS = 9  # fewer than any window: transformers drops a token as soon as the next one no longer attends to it
BASE = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 64}
BASE |= {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1}
MLA = {"kv_lora_rank": 24, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
MLA |= {"num_key_value_heads": 4, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, **EXPERTS}
INDEX = {"index_head_dim": 16, "index_n_heads": 2, "index_topk": 4}
DELTA = {"linear_key_head_dim": 8, "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
KIMI = {"head_dim": 16, "num_heads": 4, "short_conv_kernel_size": 4, "full_attn_layers": [4], "kda_layers": [1, 2, 3]}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}
NEMOTRON = {"mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 2, "head_dim": 16}
ZAMBA = {"num_key_value_heads": 4, "layers_block_type": ["mamba", "hybrid"] * 2}
GEMMA = {"head_dim": 16, "sliding_window": 32, "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 16}
M3 = {"index_head_dim": 16, "index_n_heads": 2, "index_block_size": 4, "index_topk_blocks": 2, "num_local_experts": 4}
M3 |= {"dense_intermediate_size": 32, "shared_intermediate_size": 16, "num_experts_per_tok": 2, "head_dim": 16}
BART = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}

MODELS = {
    "gpt_bigcode": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 64},
    "falcon": BASE | {"multi_query": True},
    "gemma3_text": BASE | {"head_dim": 16, "sliding_window": 32},
    "gemma3n_text": BASE | GEMMA | {"num_hidden_layers": 10, "num_kv_shared_layers": 5, "laurel_rank": 8},
    "gemma4_text": BASE
    | GEMMA
    | {"num_hidden_layers": 6, "global_head_dim": 32, "attention_k_eq_v": True, "num_global_key_value_heads": 1},
    "qwen3_next": BASE | DELTA | {"head_dim": 16, "num_experts": 4, "shared_expert_intermediate_size": 16, **EXPERTS},
    "kimi_linear": BASE | MLA | {"num_experts": 4, "linear_attn_config": KIMI},
    "bamba": BASE | MAMBA2 | {"attn_layer_indices": [1]},
    "falcon_h1": BASE | MAMBA2 | {"head_dim": 16, "mamba_d_ssm": 128},
    "jamba": BASE | {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "num_experts_per_tok": 1},
    "nemotron_h": BASE | NEMOTRON | {"hybrid_override_pattern": "M*-M"},
    "zamba2": BASE | ZAMBA | {"n_mamba_heads": 8, "mamba_d_state": 16, "mamba_headdim": 16},
    "lfm2": BASE | {"full_attn_idxs": [1, 3]},
    "minimax": BASE | {"head_dim": 16, "num_local_experts": 2},
    "deepseek_v3": BASE | MLA,
    "deepseek_v32": BASE | MLA | INDEX,
    "glm_moe_dsa": BASE | MLA | INDEX | {"indexer_types": ["full", "shared"] * 2},
    "minimax_m3_vl_text": BASE | M3 | {"layer_types": ["full_attention", "minimax_m3_sparse"] * 2},
    "mimo_v2_flash": BASE | {"head_dim": 16, "v_head_dim": 8, "sliding_window": 32, "n_routed_experts": 4, **EXPERTS},
    "llama4_text": BASE | {"head_dim": 16, "attention_chunk_size": 32, "intermediate_size_mlp": 32},
    "jetmoe": {"hidden_size": 64, "intermediate_size": 32, "num_key_value_heads": 2, "kv_channels": 16}
    | {"num_hidden_layers": 2, "vocab_size": 64},
    "t5": {"d_model": 64, "d_kv": 16, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4, "d_ff": 32}
    | {"vocab_size": 64, "n_positions": TOKENS},
    "bart": BART
    | {"d_model": 64, "encoder_layers": 2, "decoder_layers": 3, "vocab_size": 64, "max_position_embeddings": TOKENS},
}


@pytest.mark.parametrize("model_type", MODELS)
def test_the_filled_cache_holds_as_many_bytes(model_type):
    if model_type not in CONFIG_MAPPING:
        pytest.skip("not in this version of transformers")
    fields = MODELS[model_type]
    config = CONFIG_MAPPING[model_type](**fields)
    has_encoder = bool(config.is_encoder_decoder)
    made_by = transformers.AutoModelForSeq2SeqLM if has_encoder else transformers.AutoModelForCausalLM
    tokens = torch.arange(3, 3 + TOKENS)[None]
    with torch.no_grad():
        inputs = {"input_ids": tokens} | ({"decoder_input_ids": tokens} if has_encoder else {})
        filled = made_by.from_config(config).float().eval()(**inputs, use_cache=True)
    real = sum(nbytes for nbytes in storages(filled.past_key_values).values())
    assert model_cache({"model_type": model_type, **fields}, dtype="fp32").stored_bytes(TOKENS) == real


def storages(thing, seen=None):
    """Bytes of each floating-point tensor that a cache reaches, by storage."""
    seen = set() if seen is None else seen
    if id(thing) in seen:
        return {}
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        numbers = thing.numel() * thing.element_size() if thing.is_floating_point() else 0
        return {thing.untyped_storage()._cdata: numbers}
    is_cache = type(thing).__module__.startswith("transformers") and "Config" not in type(thing).__name__
    inner = thing.values() if isinstance(thing, dict) else thing if isinstance(thing, list | tuple) else ()
    inner = vars(thing).values() if is_cache and hasattr(thing, "__dict__") and not inner else inner
    return {key: nbytes for each in inner for key, nbytes in storages(each, seen).items()}
