"""A user's folder for tests of whole commands (texts, a study, a cache), errors as a user sees them, and what two
results files of one study must share however its runs were trained: all of it except times."""

import json
import os
import re
from pathlib import Path

import pytest
import yaml

import kvfrontier
from train.errors import InputError
from train.sections import TokenizerConfig
from train.sources import Place, parse
from train.tokens import TokenSet

MINIATURE = {  # so small a model cannot be matched to half a percent
    "corpus": {"files": ["texts/*.txt"]},
    "tokenizer": {"name": "bytes"},
    "model": {"width": 32, "layers": 2, "heads": 4, "context": 16},
    "match": "none",
}


def write_texts(folder: Path) -> None:
    """Documents in texts/*.txt, enough for some to be held out."""
    (folder / "texts").mkdir()
    for n in range(30):
        (folder / "texts" / f"{n}.txt").write_text(f"Document {n}. The quick brown fox jumps over a dog.\n" * 9)


def user_folder(factory: pytest.TempPathFactory, name: str, study: dict) -> Path:
    """A folder with study.yaml, texts and the cache of tokens."""
    folder = factory.mktemp(name)
    write_texts(folder)
    (folder / "study.yaml").write_text(yaml.safe_dump(study))
    os.environ["KVFRONTIER_CACHE"] = str(folder / "cache")
    return folder


def evaluated_study(factory: pytest.TempPathFactory, name: str, study: dict) -> Path:
    """The directory of a study that is trained and evaluated."""
    folder = user_folder(factory, name, study)
    for command in ("train", "eval"):
        assert kvf(command, folder / "study.yaml", "--out", folder / "out") == 0
    return folder / "out"


def tokens_of(folder: Path, tokenizer: dict | None = None, **texts: list[str]) -> TokenSet:
    """Tokens of texts by split (train, tune, test), each text a file in a folder named after its split."""
    for split, documents in texts.items():
        (folder / split).mkdir(parents=True, exist_ok=True)
        for n, text in enumerate(documents):
            (folder / split / f"{n:04}.txt").write_bytes(text.encode())
    os.environ["KVFRONTIER_CACHE"] = str(folder / "cache")
    source = parse({"files": ["train/*"]} | {split: [f"{split}/*"] for split in ("tune", "test") if split in texts})
    return source.load(TokenizerConfig(**(tokenizer or {"name": "bytes"})), Place([folder]))


def byte_tokens(folder: Path) -> TokenSet:
    """Tokens of a small corpus in which a character may take two bytes, a third of it held out."""
    texts = [f"w\xf6rd {n} of w\xf6rd {n}\n" * 9 for n in range(30)]
    return tokens_of(folder, train=texts[:20], tune=texts[20:25], test=texts[25:])


TIMES = re.compile("created|mfu|tokens_per_s|recompute|memory_bound|roof_.*|.*seconds|.*gb_s|(prefill|token)_ms.*")


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if not TIMES.fullmatch(key)}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def differences(a, b, at: str = "") -> list[str]:
    """The paths at which two results differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [line for key in {**a, **b} for line in differences(a.get(key), b.get(key), f"{at}.{key}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [line for n, pair in enumerate(zip(a, b, strict=True)) for line in differences(*pair, f"{at}[{n}]")]
    return [] if a == b else [f"{at}: {a!r} is not {b!r}"]


def differ(one: Path, other: Path) -> list[str]:
    return differences(*(without_times(json.loads(path.read_text())) for path in (one, other)))


def kvf(*arguments) -> int:
    """The status of a kvfrontier command."""
    return kvfrontier.main([str(argument) for argument in arguments])


def refused(capsys, *arguments) -> str:
    """The line that a kvfrontier command says when it ends with status 2."""
    capsys.readouterr()
    try:
        status = kvf(*arguments)
    except SystemExit as end:  # of the parser
        status = end.code
    line = capsys.readouterr().err.strip()
    assert (status, line.count("\n"), line.startswith("kvfrontier: ")) == (2, 0, True), line
    return line


def refusal(action, *arguments, **named) -> str:
    """The text, one line, of the InputError that an action raises."""
    with pytest.raises(InputError) as caught:
        action(*arguments, **named)
    assert "\n" not in str(caught.value)
    return str(caught.value)
