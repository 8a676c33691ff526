"""A trained run read from its directory alone: its model and its tokenizer, without its corpus.

run = load("runs/quick/runs/mla/seed-0")
ids = run.tokenizer.encode_ordinary("def ")
run.model.generate(torch.tensor([ids]), max_new_tokens=64)
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiktoken

from archs import Decoder, build
from archs.techniques import Technique, technique
from train.checkpoints import newest_whole
from train.errors import InputError
from train.files import read_json
from train.progress import console
from train.sections import TokenizerConfig
from train.store import read_plan
from train.tokenizer import RANKS, load_tokenizer, vocabulary


@dataclass(frozen=True)
class TrainedRun:
    """`config` is what its config.json has; `tokenizer` is None for generated ids, which stand for no text; `technique`
    is the one that the model was trained further for."""

    config: dict[str, Any]
    model: Decoder
    tokenizer: tiktoken.Encoding | None
    technique: Technique | None


def load(directory: str | Path) -> TrainedRun:
    """The run in a directory like runs/quick/runs/mha/seed-0, its model on the CPU in evaluation mode, with the weights
    of its last checkpoint. InputError says what is missing."""
    run = Path(directory)
    config = read_config(run)
    try:
        model, trained_for = build(config["arch"], **config["options"]), None
        if settings := config.get("retrofit"):
            ours = {name: value for name, value in settings.items() if name not in ("technique", "of", "is_full")}
            trained_for = technique(settings.get("technique", "dmc"), **ours)  # once the only one that trains
            model = trained_for.retrofit(model)
    except (KeyError, TypeError, ValueError) as e:
        raise InputError(f"{run / 'config.json'} is not as a run writes it: {e!r}") from None
    if not (checkpoint := newest_whole(run, console.print)):
        raise InputError(f"{run} has no whole checkpoint: train it first")
    if not read_json(run / "record.json").get("train"):
        console.print(f"{run} is not trained to its end: these are its last checkpoint's weights", soft_wrap=True)
    weights = {name.removeprefix("model."): tensor for name, tensor in checkpoint[1]["state_dict"].items()}
    try:
        model.load_state_dict(weights)
    except RuntimeError:
        raise InputError(f"{checkpoint[0]} is not of the model in {run}/config.json: train the run again") from None
    return TrainedRun(config, model.eval(), tokenizer_of(run, config), trained_for)


def read_config(run: Path) -> dict[str, Any]:
    """The content of a run's config.json. InputError if the directory is not a run's."""
    config = read_json(run / "config.json")
    if not {"arch", "options", "label", "tokenizer"} <= config.keys():
        raise InputError(f"{run} is no run's directory, like runs/quick/runs/mha/seed-0: no config.json of a run")
    return config


def tokenizer_of(run: Path, config: dict[str, Any]) -> tiktoken.Encoding | None:
    """The tokenizer that a run was trained with; a vocabulary that was trained, too, lies in the study's directory."""
    about = config["tokenizer"]
    if about["name"] == "ids":
        return None
    settings = TokenizerConfig(name=about["name"], vocab_size=about.get("vocab_size"))
    if settings.name != "bpe":
        return load_tokenizer(settings, run)
    studies = [*run.resolve().parents[2:4]]  # above runs/ and above retrofits/
    tokens = (read_plan(study).get("tokens") for study in studies)  # where earlier versions have it alone
    for folder in (*studies, *(Path(folder) for folder in tokens if folder)):
        if (folder / RANKS).is_file():
            encoding = load_tokenizer(settings, folder)
            if vocabulary(encoding) == about.get("vocabulary", vocabulary(encoding)):
                return encoding
    raise InputError(f"{run} does not lie in a study's directory with the {RANKS} that it was trained with")
