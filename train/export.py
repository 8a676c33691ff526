"""Export of a trained run to a directory for AutoModelForCausalLM and AutoTokenizer of Hugging Face transformers.

A variant that has such a class defines `hf_class()`: (model type, class, config entries of its own), and
`hf_attention(attention)`: the weights of a layer's attention, except the output projection, under the class's names.
"""

from pathlib import Path
from typing import Any

import tiktoken
from safetensors.torch import save
from torch import Tensor

from archs import VARIANTS, Decoder, build
from train.checkpoints import newest_whole
from train.errors import InputError
from train.files import read_json, write_atomic, write_json
from train.progress import console
from train.store import read_plan
from train.study import load_data, parse_study
from train.tokenizer import END_OF_TEXT, as_hf, vocabulary

COMPUTES = "layer_attention", "new_layers", "hidden", "chunk", "append"  # a subclass changes none of these


def export(run: Path, out: Path) -> None:
    """Writes config.json, model.safetensors and, for a corpus of text, its tokenizer. InputError if that cannot be."""
    config = read_json(run / "config.json")
    if "options" not in config:
        raise InputError(f"{run} is no run's directory, like runs/quick/runs/mha/seed-0: no config.json")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is there already: give an empty or a new directory")
    if not config.get("retrofit", {"is_full": True}).get("is_full"):
        raise InputError(f"{run} cannot be exported: transformers has no class with the cache that it was trained for")
    try:
        model = build(config["arch"], **config["options"])
    except (KeyError, TypeError, ValueError) as e:
        raise InputError(f"{run / 'config.json'} is not as a run writes it: {e!r}") from None
    try:
        hf = hf_config(model)
    except ValueError as e:
        can = ", ".join(name for name, variant in VARIANTS.items() if hasattr(variant, "hf_class"))
        raise InputError(f"{config['label']} cannot be exported: {e}; those that can be: {can}") from None
    checkpoint = newest_whole(run, console.print)
    if not checkpoint:
        raise InputError(f"{run} has no whole checkpoint: train it first")
    if not read_json(run / "record.json").get("train"):
        console.print(f"{run} is not trained to its end: its last checkpoint is exported", soft_wrap=True)
    weights = {name.removeprefix("model."): tensor for name, tensor in checkpoint[1]["state_dict"].items()}
    try:
        model.load_state_dict(weights)
    except RuntimeError:
        raise InputError(f"{checkpoint[0]} is not of the model in {run}/config.json: train the run again") from None
    encoding = _encoding(run, config)
    try:
        _write(out, model, hf, encoding)
    except OSError as e:
        raise InputError(f"cannot write to {out}: {e.strerror or e}; choose another place") from None


def _write(out: Path, model: Decoder, hf: dict, encoding: tiktoken.Encoding | None) -> None:
    write_atomic(out / "model.safetensors", save(hf_weights(model), metadata={"format": "pt"}))
    if encoding:
        write_atomic(out / "tokenizer.json", as_hf(encoding).to_str().encode())
        facts = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT}
        write_json(out / "tokenizer_config.json", facts | {"model_max_length": model.options.context})
        hf["eos_token_id"] = encoding.encode_single_token(END_OF_TEXT)
    write_json(out / "config.json", {"bos_token_id": None, "pad_token_id": None, "eos_token_id": None, **hf})


def _encoding(run: Path, config: dict) -> tiktoken.Encoding | None:
    """The tokenizer that the run was trained with, from its study; None for generated ids, which stand for no text."""
    plans = {folder: read_plan(folder) for folder in run.resolve().parents[2:4]}  # above runs/ and above retrofits/
    study, plan = next(((folder, plan) for folder, plan in plans.items() if "settings" in plan), (None, None))
    if not plan:
        raise InputError(f"{run} does not lie in a study's directory, as runs/<label>/seed-<n> with its plan.json")
    data = load_data(parse_study(plan["settings"]), Path(plan["study_file"]), study, plan.get("tokens"))
    if data.tokenizer and data.facts["fingerprint"] != config["corpus_fingerprint"]:
        prints = f"{data.facts['fingerprint']}, it was {config['corpus_fingerprint']}"
        raise InputError(f"the corpus has changed since the run was trained ({prints}): restore the text")
    trained_with = config["tokenizer"].get("vocabulary")
    if trained_with and trained_with != vocabulary(data.tokenizer):
        raise InputError("the vocabulary has changed since the run was trained: restore the text")
    return data.tokenizer


def hf_config(model: Decoder) -> dict[str, Any]:
    """config.json of the class in transformers that computes the same as the model; ValueError without one."""
    o, variant = model.options, type(model)
    parent = next((cls for cls in variant.__mro__ if "hf_class" in vars(cls)), None)
    if parent is None or any(getattr(variant, name) is not getattr(parent, name) for name in COMPUTES):
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
    if not model.options.tie_embeddings:
        weights["lm_head.weight"] = model.unembed.weight
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
        weights |= {f"model.layers.{layer}.{name}.weight": weight for name, weight in named.items()}
    return {name: weight.detach().contiguous() for name, weight in weights.items()}
