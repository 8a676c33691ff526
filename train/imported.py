"""A model of others, a directory as transformers writes it, as the weights of a run (`kvfrontier import`).

A variant that can be one defines `hf_options(config)`: its own options for such a config.json, None if it is another's.
What our models do not compute is refused. Weights are found by what export would do: `hf_weights` of a model whose
parameters are numbered says where each of ours lies in theirs.
"""

import functools
import hashlib
import re
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

from archs import VARIANTS, Decoder, build
from train.errors import InputError
from train.export import hf_weights
from train.files import read_json, write_atomic
from train.hf_tokenizer import read_tokenizer, special_tokens
from train.meta import on_meta
from train.study import check_label
from train.tokenizer import END_OF_TEXT, JSON

MODEL_TYPES = "llama", "mistral", "qwen3", "deepseek_v3", "deepseek_v32"
MOST_CONTEXT = 4096  # of what a model was made for; a study's context is also the length of a sequence of its loss
REQUIRED = {  # the values of these keys with which our models compute the same; left out, each has the last
    "hidden_act": ["silu"],
    "attention_bias": [False],
    "mlp_bias": [False],
    "partial_rotary_factor": [1, None],
    "quantization_config": [None],
    "rope_interleave": [True],
}


def read_options(folder: Path) -> tuple[str, dict[str, Any]]:
    """(architecture, options for `build`) of the model in a directory. InputError if ours cannot compute the same."""
    file, config = folder / "config.json", read_json(folder / "config.json")
    if not config:
        raise InputError(f"{folder} has no config.json of a model: give a directory as transformers writes it")
    kind, rope = config.get("model_type"), config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise InputError(f"{file}: rope_scaling={rope!r}: must be a mapping")
    if kind not in MODEL_TYPES:
        raise InputError(f"{file}: model_type={kind!r} cannot be imported; those that can be: {', '.join(MODEL_TYPES)}")
    facts = {key: config.get(key, values[-1]) for key, values in REQUIRED.items()}
    wrong = {key: value for key, value in facts.items() if value not in REQUIRED[key]}
    if (rope_type := rope.get("rope_type", rope.get("type", "default"))) != "default":
        wrong["rope_scaling"] = rope_type
    if config.get("use_sliding_window", True) and config.get("sliding_window"):
        wrong["sliding_window"] = config["sliding_window"]
    if wrong:
        key, value = next(iter(wrong.items()))
        raise InputError(f"{file}: {key}={value!r}: no architecture here computes that; leave this model out")
    try:
        for arch, variant in VARIANTS.items():
            if hasattr(variant, "hf_options") and (own := variant.hf_options(config)) is not None:
                options = _shared_options(config, rope) | own
                on_meta(arch, options)
                return arch, options
    except KeyError as e:
        raise InputError(f"{file} has no {e.args[0]!r}") from None
    except (TypeError, ZeroDivisionError) as e:
        raise InputError(f"{file} has a value of a wrong type: {e}") from None
    except ValueError as e:
        raise InputError(f"{file}: {e}: no architecture here computes that; leave this model out") from None
    raise InputError(f"{file}: no architecture here is like this {config['model_type']}; leave this model out")


def _shared_options(config: dict, rope: dict) -> dict[str, Any]:
    """The options that every variant has."""
    return {
        "vocab_size": config["vocab_size"],
        "context": min(config["max_position_embeddings"], MOST_CONTEXT),
        "width": config["hidden_size"],
        "layers": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "ffn_width": config["intermediate_size"],
        "rope_base": float(rope.get("rope_theta") or config.get("rope_theta") or 10_000),
        "norm_eps": config.get("rms_norm_eps") or 1e-6,
        "tie_embeddings": bool(config.get("tie_word_embeddings")),
    }


def files_of(folder: Path) -> list[Path]:
    """The files with a model's weights: those of its index, or model.safetensors, or any. InputError if there are
    none."""
    index = read_json(folder / "model.safetensors.index.json").get("weight_map")
    named = sorted({*index.values()}) if isinstance(index, dict) else ["model.safetensors"]
    files = [folder / name for name in named if (folder / str(name)).is_file()]
    if not (files := files or sorted(folder.glob("*.safetensors"))):
        raise InputError(f"{folder} has no weights as .safetensors: save them with save_pretrained of transformers")
    return files


def weights_hash(folder: Path) -> str:
    """The hash of a model's weights."""
    return _hash(tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in files_of(folder)))


@functools.cache
def _hash(files: tuple[tuple[Path, int, int], ...]) -> str:
    whole = hashlib.sha256()
    for path, *_ in files:
        with path.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()[:16]


@torch.no_grad()
def read_weights(model: Decoder, arch: str, folder: Path) -> None:
    """Gives the model the weights in a directory. InputError unless these are all that it needs, and no others."""
    numbered = build(arch, **model.options.model_dump()).double()  # whole numbers up to 2^53 are exact
    ends = torch.tensor([p.numel() for p in numbered.parameters()]).cumsum(0).tolist()
    for parameter, end in zip(numbered.parameters(), ends, strict=True):
        torch.arange(end - parameter.numel(), end, out=parameter.view(-1))
    flat, found = torch.zeros(ends[-1]), torch.zeros(ends[-1], dtype=torch.bool)
    theirs = read_tensors(folder)
    for name, place in hf_weights(numbered).items():
        if name == "lm_head.weight" and model.options.tie_embeddings:
            theirs.pop(name, None)
            continue
        if name not in theirs or theirs[name].shape != place.shape:
            has = f"of shape {[*theirs[name].shape]}, not {[*place.shape]}" if name in theirs else "missing"
            raise InputError(f"{folder}: the weight {name} is {has}")
        place = place.long().flatten()
        flat[place], found[place] = theirs.pop(name).float().flatten(), True
    if theirs:
        raise InputError(f"{folder}: no architecture here has the weight {next(iter(theirs))}; leave this model out")
    assert found.all()
    for parameter, part in zip(model.parameters(), flat.tensor_split(ends[:-1]), strict=True):
        parameter.copy_(part.view_as(parameter))


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every weight by name, without rotary frequencies, which old versions of transformers wrote too."""
    tensors = {}
    for path in files_of(folder):
        try:
            with safe_open(path, "pt") as file:
                tensors |= {name: file.get_tensor(name) for name in file.keys() if not name.endswith("inv_freq")}  # noqa: SIM118
        except (SafetensorError, OSError) as e:
            raise InputError(f"{path} cannot be read: {e}") from None
    return tensors


def import_model(folder: Path, out: Path) -> Path:
    """Writes a study of the model in `folder` to the new directory `out`; returns its YAML file, which `kvfrontier
    train` and `eval` take. InputError if the model cannot be imported."""
    arch, options = read_options(folder)
    vocab_size, context = options.pop("vocab_size"), options.pop("context")
    try:
        content = (folder / JSON).read_bytes()
    except OSError:
        how = "AutoTokenizer's save_pretrained writes one where it can"
        raise InputError(f"{folder} has no {JSON}, which says what its ids stand for: {how}") from None
    end = end_of_text(folder, content)
    files_of(folder)
    label = re.sub("[^A-Za-z0-9._+=-]", "-", folder.resolve().name).lstrip("._+=-")[:64] or arch
    check_label(label)
    study = {
        "corpus": {"name": "stdlib"},
        "tokenizer": {"name": JSON, "vocab_size": vocab_size, "end_of_text": end},
        "model": {"context": context},
        "match": "none",
        "variants": [{"label": label, "arch": arch, "weights": str(folder.resolve()), **options}],
        "seeds": [0],
        "train": {"tokens": context, "batch_tokens": context, "lr": 1e-3, "warmup_tokens": 0},
    }
    note = f"# {label}, imported: evaluate it on text of your own by another corpus (docs/write-a-study.md).\n"
    text, file = (note + yaml.safe_dump(study, sort_keys=False)).encode(), out / "study.yaml"
    again = file.is_file() and file.read_bytes() == text  # the command was stopped, or failed
    if out.exists() and not again and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is there already: give an empty or a new directory")
    if not again:
        write_atomic(out / JSON, content)
        write_atomic(file, text)
    return file


def end_of_text(folder: Path, content: bytes) -> str:
    """The special token that ends a text, as the files beside the tokenizer name it."""
    files = [read_json(folder / name) for name in ("tokenizer_config.json", "special_tokens_map.json")]
    named = [file.get("eos_token") for file in files]
    named = [entry.get("content") if isinstance(entry, dict) else entry for entry in named]
    ids = [read_json(folder / name).get("eos_token_id") for name in ("generation_config.json", "config.json")]
    ids = [each[0] if isinstance(each, list) and each else each for each in ids]
    special = special_tokens(read_tokenizer(content)[1])
    known = [*named, *({number: token for token, number in special.items()}.get(each) for each in ids), END_OF_TEXT]
    if not (found := [token for token in known if token in special]):
        raise InputError(
            f"{folder / 'tokenizer_config.json'} names no eos_token; its special tokens: {', '.join(special)}"
        )
    return found[0]
