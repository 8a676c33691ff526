"""A trained run as a directory that Hugging Face transformers loads: Llama for MHA, GQA and MQA, DeepSeek-V3 for MLA.

AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
"""

from pathlib import Path

import tiktoken
from safetensors.torch import save

from archs import VARIANTS, Decoder, build
from train.checkpoints import newest_whole
from train.errors import InputError
from train.files import read_json, write_atomic, write_json
from train.mqar import RecallTask
from train.progress import console
from train.status import read_plan
from train.study import load_data, parse_study
from train.tokenizer import END_OF_TEXT, as_hf


def export(run: Path, out: Path) -> None:
    """Writes config.json, model.safetensors and, for a corpus of text, its tokenizer. InputError if that can't be."""
    config = read_json(run / "config.json")
    if "options" not in config:
        raise InputError(f"{run} is no run's directory, like runs/quick/runs/mha/seed-0: no config.json")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is there already: give an empty or a new directory")
    if config.get("retrofit", {}).get("budget", 1.0) < 1:
        raise InputError(f"{run} cannot be exported: transformers has no class whose cache merges (DMC)")
    try:
        model = build(config["arch"], **config["options"])
    except (KeyError, TypeError, ValueError) as e:
        raise InputError(f"{run / 'config.json'} is not as a run writes it: {e!r}") from None
    try:
        hf_config = model.hf_config()
    except ValueError as e:
        can = ", ".join(name for name, variant in VARIANTS.items() if variant.hf_class is not Decoder.hf_class)
        raise InputError(f"{config['label']} cannot be exported: {e}; those that can be: {can}") from None
    found = newest_whole(run, console.print)
    if not found:
        raise InputError(f"{run} has no whole checkpoint: train it first")
    if not read_json(run / "record.json").get("train"):
        console.print(f"{run} is not trained to its end: its last checkpoint is exported", soft_wrap=True)
    weights = {name.removeprefix("model."): tensor for name, tensor in found[1]["state_dict"].items()}
    try:
        model.load_state_dict(weights)
    except RuntimeError:
        raise InputError(f"{found[0]} is of another model than {run / 'config.json'}: train the run again") from None
    encoding = _encoding(run, config)
    try:
        _write(out, model, hf_config, encoding, config)
    except OSError as e:
        raise InputError(f"cannot write to {out}: {e.strerror or e}; choose another place") from None


def _write(out: Path, model: Decoder, hf_config: dict, encoding: tiktoken.Encoding | None, config: dict) -> None:
    write_atomic(out / "model.safetensors", save(model.hf_weights(), metadata={"format": "pt"}))
    if encoding:
        write_atomic(out / "tokenizer.json", as_hf(encoding).to_str().encode())
        facts = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT}
        write_json(out / "tokenizer_config.json", facts | {"model_max_length": config["options"]["context"]})
        hf_config["eos_token_id"] = encoding.encode_single_token(END_OF_TEXT)
    write_json(out / "config.json", {"bos_token_id": None, "pad_token_id": None, "eos_token_id": None, **hf_config})


def _encoding(run: Path, config: dict) -> tiktoken.Encoding | None:
    """The tokenizer that the run was trained with, from its study; None for generated ids, which stand for no text."""
    above = [read_plan(folder) for folder in run.resolve().parents[2:4]]  # runs/..., retrofits/...
    plan = next((found for found in above if "settings" in found), {})
    if "settings" not in plan:
        raise InputError(f"{run} does not lie in a study's directory, as runs/<label>/seed-<n> with its plan.json")
    data = load_data(parse_study(plan["settings"]), Path(plan["study_file"]))
    if isinstance(data, RecallTask):
        return None
    if data.facts["fingerprint"] != config["corpus_fingerprint"]:
        raise InputError(
            f"the corpus is another one now ({data.facts['fingerprint']}) than the run was trained on "
            f"({config['corpus_fingerprint']}), and its tokenizer with it: restore the text"
        )
    return data.tokenizer
