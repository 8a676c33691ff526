"""A trained run read from its directory alone: its model and its tokenizer, without its corpus.

run = load("runs/quick/runs/mla/seed-0")
ids = run.tokenizer.encode_ordinary("def ")
run.model.generate(torch.tensor([ids]), max_new_tokens=64)
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from archs import Decoder, build
from archs.techniques import Technique, technique
from train.checkpoints import newest_whole
from train.errors import InputError
from train.files import read_json
from train.progress import console
from train.sections import TokenizerConfig
from train.store import read_plan
from train.tokenizer import Encoding, file_of, load_tokenizer, vocabulary


@dataclass(frozen=True)
class TrainedRun:
    """`config` is what its config.json has; `tokenizer` is None for generated ids, which stand for no text; `technique`
    is the one that the model was trained further for."""

    config: dict[str, Any]
    model: Decoder
    tokenizer: Encoding | None
    technique: Technique | None

    @property
    def prefix(self) -> list[int]:
        """The tokens that a text begins with, such as <s>: those of a tokenizer.json."""
        return getattr(self.tokenizer, "prefix", [])


def load(directory: str | Path) -> TrainedRun:
    """The run in a directory like runs/quick/runs/mha/seed-0, its model on the CPU in evaluation mode, with the weights
    of its last checkpoint. InputError says what is missing."""
    run = Path(directory)
    config = read_config(run)
    trained_for = None
    try:
        if settings := config.get("retrofit"):
            ours = {name: value for name, value in settings.items() if name not in ("technique", "of", "is_full")}
            trained_for = technique(settings.get("technique", "dmc"), **ours)  # once the only one that trains
        model = untrained(config["arch"], config["options"], trained_for)
    except (KeyError, TypeError, ValueError) as e:
        raise InputError(f"{run / 'config.json'} is not as a run writes it: {e!r}") from None
    if not (checkpoint := newest_whole(run, console.print)):
        raise InputError(f"{run} has no whole checkpoint: train it first")
    if not read_json(run / "record.json").get("train"):
        console.print(f"{run} is not trained to its end: these are its last checkpoint's weights", soft_wrap=True)
    try:
        restore(model, checkpoint[1]["state_dict"])
    except RuntimeError:
        raise InputError(f"{checkpoint[0]} is not of the model in {run}/config.json: train the run again") from None
    return TrainedRun(config, model, tokenizer_of(run, config), trained_for)


def untrained(arch: str, options: dict[str, Any], trained_for: Technique | None) -> Decoder:
    """The model whose weights a run has, with others. ValueError if it cannot have these options."""
    model = build(arch, **options)
    return trained_for.retrofit(model) if trained_for else model


def restore(model: Decoder, state_dict: dict[str, Tensor]) -> Decoder:
    """The model with the weights of a LanguageModel, in evaluation mode. RuntimeError if they are another's."""
    model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in state_dict.items()})
    return model.eval()


def read_config(run: Path) -> dict[str, Any]:
    """The content of a run's config.json. InputError if the directory is not a run's."""
    config = read_json(run / "config.json")
    if not {"arch", "options", "label", "tokenizer"} <= config.keys():
        raise InputError(f"{run} is no run's directory, like runs/quick/runs/mha/seed-0: no config.json of a run")
    return config


def tokenizer_of(run: Path, config: dict[str, Any]) -> Encoding | None:
    """The tokenizer that a run was trained with; a vocabulary that was trained, too, lies in the study's directory."""
    about = config["tokenizer"]
    if about["name"] == "ids":
        return None
    settings = TokenizerConfig(**{key: value for key, value in about.items() if key in TokenizerConfig.model_fields})
    file = file_of(settings)
    if not file:
        return load_tokenizer(settings, run)
    studies = [*run.resolve().parents[2:4]]  # above runs/ and above retrofits/
    tokens = (read_plan(study).get("tokens") for study in studies)  # where earlier versions have it alone
    for folder in (*studies, *(Path(folder) for folder in tokens if folder)):
        if (folder / file).is_file():
            encoding = load_tokenizer(settings, folder)
            if vocabulary(encoding) == about.get("vocabulary", vocabulary(encoding)):
                return encoding
    raise InputError(f"{run} does not lie in a study's directory with the {file} that it was trained with")
