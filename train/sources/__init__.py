"""Where a study's data comes from: the section `corpus`.

Each module of this package with a class `Corpus`, a `Source`, is one kind of source; a study chooses it by the key that
the others do not have (`files`, `hf`, `tokens`), or by its `name` (stdlib, mqar). A further kind is one more file.
"""

import functools
import importlib
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from archs.settings import Settings, SettingsError, did_you_mean
from train.batches import TrainingData
from train.errors import InputError
from train.sections import Section, TokenizerConfig


@dataclass(frozen=True)
class Place:
    """Where a study's files are looked for: in `folders`, in turn, but not in `output`, which the study writes."""

    folders: Sequence[Path]
    output: Path | None = None

    def find(self, name: str, key: str) -> Path:
        """The file that a study's `key` names. InputError if there is none."""
        paths = [folder / Path(name).expanduser() for folder in self.folders]
        if not (found := [path for path in paths if path.is_file()]):
            raise InputError(f"{key}: there is no file {name} in {' or '.join(map(str, dict.fromkeys(self.folders)))}")
        return found[0]


class Source(Section):
    """Base of all sources. `key` is the field that tells this kind from the others; where it is "name", the class has
    the `names` that it goes by."""

    key: ClassVar[str]
    names: ClassVar[Sequence[str]] = ()
    has_documents: ClassVar[bool] = True

    def load(self, tokenizer: TokenizerConfig, place: Place) -> TrainingData:
        """The data in tokens. InputError says what to change."""
        raise NotImplementedError


@functools.cache
def kinds() -> list[type[Source]]:
    modules = (importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__))
    return [module.Corpus for module in modules if hasattr(module, "Corpus")]


def parse(given: Any) -> Source:
    """The source that a study's section `corpus` describes. ValueError if it describes none."""
    if isinstance(given, Source):
        return given
    names = {name: kind for kind in kinds() for name in kind.names}
    keys = {kind.key: kind for kind in kinds() if kind.key != "name"}
    allowed = f"give a name ({', '.join(names)}), or one of {', '.join(keys)}"
    Settings.check(isinstance(given, dict), f"must be a mapping of keys to values, not {given!r}; {allowed}")
    given = {key: value for key, value in given.items() if value not in (None, [])}
    chosen = [key for key in ("name", *keys) if key in given]
    known = {field for kind in kinds() for field in kind.model_fields}
    if first := next((key for key in given if not chosen and key not in known), None):
        raise SettingsError(
            first, lambda path: f"unknown key {path!r}: {allowed}{did_you_mean(first, ['name', *keys])}"
        )
    Settings.check(len(chosen) == 1, f"has {' and '.join(chosen) or 'no source'}: {allowed}")
    name = str(given.get("name"))
    kind = names.get(name) if chosen == ["name"] else keys[chosen[0]]
    Settings.check(kind is not None, f"unknown name {name!r}: {allowed}{did_you_mean(name, names)}")
    return kind(**given)
