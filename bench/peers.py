"""transformers' models of the same shapes as ours: Llama for MHA, GQA and MQA, DeepSeek-V3 without experts for MLA."""

import warnings

import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from archs import Decoder


def peer(model: Decoder) -> PreTrainedModel | None:
    """Of the same shape and number of parameters as `model`, on its device and in its dtype, freshly initialised.

    None where transformers has no such architecture.
    """
    o = model.options
    if not hasattr(o, "kv_rank") and not hasattr(model, "kv_heads"):
        return None
    shape = {
        "vocab_size": o.vocab_size,
        "hidden_size": o.width,
        "intermediate_size": o.ffn_width,
        "num_hidden_layers": o.layers,
        "num_attention_heads": o.heads,
        "max_position_embeddings": 2**17,
        "tie_word_embeddings": o.tie_embeddings,
        "attn_implementation": "sdpa",
        "dtype": model.embed.weight.dtype,
    }
    with warnings.catch_warnings(), torch.device(model.embed.weight.device):
        warnings.simplefilter("ignore")
        if hasattr(o, "kv_rank"):
            latent = {
                "kv_lora_rank": o.kv_rank,
                "q_lora_rank": o.q_rank or None,
                "qk_rope_head_dim": o.rope_dim,
                "qk_nope_head_dim": o.nope_dim,
                "v_head_dim": o.v_dim,
                "num_key_value_heads": o.heads,
                "first_k_dense_replace": o.layers,
            }
            made = DeepseekV3ForCausalLM(DeepseekV3Config(**shape, **latent))
        else:
            made = LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=model.kv_heads, head_dim=o.head_dim))
    made = made.to(model.embed.weight.dtype)
    ours, theirs = model.count_params(), sum(p.numel() for p in made.parameters())
    if ours != theirs:
        raise AssertionError(f"not the same shape: {ours:,} parameters against {theirs:,}")
    return made
