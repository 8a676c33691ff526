"""Export of a trained run to a directory for AutoModelForCausalLM and AutoTokenizer of Hugging Face transformers.

A variant that has such a class defines `hf_class()`: (model type, class, config entries of its own), and
`hf_attention(attention)`: the weights of a layer's attention, except the output projection, under the class's names.
"""

from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from archs import VARIANTS, Decoder
from train.errors import InputError
from train.files import write_atomic, write_json
from train.hf_tokenizer import HFTokenizer, as_hf
from train.tokenizer import Encoding
from train.trained import load, read_config

COMPUTES = "layer_attention", "new_layers", "hidden", "chunk", "append"  # a subclass changes none of these


def export(run: Path, out: Path) -> None:
    """Writes config.json, model.safetensors and, for a corpus of text, its tokenizer. InputError if that cannot be."""
    config = read_config(run)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is there already: give an empty or a new directory")
    if not config.get("retrofit", {"is_full": True}).get("is_full"):
        raise InputError(f"{run} cannot be exported: transformers has no class with the cache that it was trained for")
    trained = load(run)
    try:
        hf = hf_config(trained.model)
    except ValueError as e:
        can = ", ".join(name for name, variant in VARIANTS.items() if has_class(variant))
        raise InputError(f"{config['label']} cannot be exported: {e}; those that can be: {can}") from None
    try:
        write(out, trained.model, hf, trained.tokenizer)
    except OSError as e:
        raise InputError(f"cannot write to {out}: {e.strerror or e}; choose another place") from None


def write(out: Path, model: Decoder, hf: dict, encoding: Encoding | None) -> None:
    """The files of an export; `hf` is what `hf_config` gives. OSError if they cannot be written."""
    write_atomic(out / "model.safetensors", save(hf_weights(model), metadata={"format": "pt"}))
    begin = next(iter(getattr(encoding, "prefix", [])), None)
    if encoding:
        content = encoding.content if isinstance(encoding, HFTokenizer) else as_hf(encoding).to_str().encode()
        write_atomic(out / "tokenizer.json", content)
        facts = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": encoding.decode([encoding.eot_token])}
        facts |= {"bos_token": encoding.decode([begin])} if begin is not None else {}
        write_json(out / "tokenizer_config.json", facts | {"model_max_length": model.options.context})
    end = encoding.eot_token if encoding else None
    ids = {"bos_token_id": begin, "pad_token_id": None, "eos_token_id": end}
    write_json(out / "generation_config.json", ids)
    write_json(out / "config.json", hf | ids)


def has_class(variant: type[Decoder]) -> bool:
    """True if a class of transformers computes what the variant does, with some of its options at least."""
    parent = next((cls for cls in variant.__mro__ if "hf_class" in vars(cls)), None)
    return parent is not None and all(getattr(variant, name) is getattr(parent, name) for name in COMPUTES)


def hf_config(model: Decoder) -> dict[str, Any]:
    """config.json of the class in transformers that computes the same as the model; ValueError without one."""
    o, variant = model.options, type(model)
    if not has_class(variant):
        raise ValueError(f"transformers has no class that computes {variant.__name__}")
    if o.gate:
        raise ValueError("transformers has no class with a gate for each head")
    model_type, architecture, special = model.hf_class()
    sizes = {"vocab_size": o.vocab_size, "hidden_size": o.width, "intermediate_size": o.ffn_width}
    sizes |= {"num_hidden_layers": o.layers, "num_attention_heads": o.heads, "max_position_embeddings": o.context}
    return sizes | {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm.eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": o.rope_base},
        "rope_theta": o.rope_base,  # where versions of transformers before 5 look
        "attention_bias": False,
        "tie_word_embeddings": o.tie_embeddings,
        "dtype": str(model.embed.weight.dtype).removeprefix("torch."),
        **special,
    }


def hf_weights(model: Decoder) -> dict[str, Tensor]:
    """The weights of the model under the names that the class of `hf_config` has for them."""
    weights = {"model.embed_tokens.weight": model.embed.weight, "model.norm.weight": model.norm.weight}
    weights["lm_head.weight"] = model.unembed.weight.clone()  # tied, too: not every engine ties
    for layer, block in enumerate(model.blocks):
        gate, up = block.ffn.gate_up.weight.chunk(2)
        named = {
            "input_layernorm": block.attention_norm.weight,
            "post_attention_layernorm": block.ffn_norm.weight,
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": block.ffn.down.weight,
            "self_attn.o_proj": block.attention.out.weight,
            **{f"self_attn.{name}": weight for name, weight in model.hf_attention(block.attention).items()},
        }
        full = {name if name.endswith("bias") else f"{name}.weight": weight for name, weight in named.items()}
        weights |= {f"model.layers.{layer}.{name}": weight for name, weight in full.items()}
    return {name: weight.detach().contiguous() for name, weight in weights.items()}
