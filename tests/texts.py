"""A user's folder for tests of whole commands: texts, a study, a cache; and errors as a user sees them."""

import os
from pathlib import Path

import pytest
import yaml

from train.errors import InputError


def user_folder(factory: pytest.TempPathFactory, name: str, study: dict) -> Path:
    """A folder with study.yaml, enough documents in texts/*.txt for some to be held out, and the cache of tokens."""
    folder = factory.mktemp(name)
    (folder / "texts").mkdir()
    for n in range(30):
        (folder / "texts" / f"{n}.txt").write_text(f"Document {n}. The quick brown fox jumps over a dog.\n" * 9)
    (folder / "study.yaml").write_text(yaml.safe_dump(study))
    os.environ["KVFRONTIER_CACHE"] = str(folder / "cache")
    return folder


def refusal(action, *arguments, **named) -> str:
    """The text, one line, of the InputError that an action raises."""
    with pytest.raises(InputError) as caught:
        action(*arguments, **named)
    assert "\n" not in str(caught.value)
    return str(caught.value)
