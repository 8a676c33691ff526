"""The models of transformers that compute the same as ours: Llama for MHA, GQA and MQA, DeepSeek-V3 for MLA."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from archs import Decoder
from train.export import hf_config


def peer(model: Decoder) -> PreTrainedModel | None:
    """A model of the same shape, device and dtype, freshly initialised; None where transformers has no such class."""
    try:
        config = AutoConfig.for_model(**hf_config(model))
    except ValueError:
        return None
    weight = model.embed.weight
    with torch.device(weight.device):
        made = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=weight.dtype)
    params, expected = sum(p.numel() for p in made.parameters()), model.count_params()
    if params != expected:
        raise RuntimeError(f"{type(made).__name__} has {params:,} parameters, the model {expected:,}")
    return made


def peer_name(model: PreTrainedModel) -> str:
    return f"transformers {type(model).__name__.removesuffix('ForCausalLM')}"
