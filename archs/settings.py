"""Settings that a person can write (options of variants and techniques, studies) as pydantic models.

A wrong one raises `SettingsError`, a ValueError of one line: the key, the value, what is allowed, did you mean.
"""

import difflib
import types
from collections.abc import Callable, Iterable
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError

Size = Annotated[int, Field(ge=1, lt=2**31)]


class SettingsError(ValueError):
    """`path` leads from the outermost settings to the wrong key ("train.lr"); `line` makes the message from it."""

    def __init__(self, path: str, line: Callable[[str], str]):
        super().__init__(line(path))
        self.path, self.line = path, line


class Settings(BaseModel):
    """Base of all settings: types are strict, unknown keys are refused, numbers are finite."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    noun: ClassVar[str] = "option"  # what a key is called in messages

    def __init__(self, /, **values: Any):
        try:
            super().__init__(**values)
        except ValidationError as e:
            raise explain(type(self), e) from None

    @staticmethod
    def check(condition: bool, otherwise: str) -> None:
        if not condition:
            raise ValueError(otherwise)


def explain(settings: type[Settings], error: ValidationError) -> SettingsError:
    """The most helpful of pydantic's errors, as one line."""
    first = ("extra_forbidden", "missing")
    details = min(error.errors(), key=lambda e: first.index(e["type"]) if e["type"] in first else len(first))
    kind, value, field, path = details["type"], details["input"], None, []
    for key in details["loc"]:  # names of fields, indices of lists, and pydantic's tags for the types of a union
        if key in settings.model_fields or kind == "extra_forbidden":
            field, path = settings.model_fields.get(key), [*path, str(key)]
    key = ".".join(path)
    if kind == "extra_forbidden":
        known = list(settings.model_fields)
        allowed = f"{', '.join(known)}{did_you_mean(key, known)}"
        return SettingsError(key, lambda path: f"unknown {settings.noun} {path!r}; allowed: {allowed}")
    if kind == "missing":
        return SettingsError(key, lambda path: f"needs the {settings.noun} {path!r}")
    if kind != "value_error":
        allowed = in_words(field.annotation, field.metadata)
        return SettingsError(key, lambda path: f"{path}={value!r}: must be {allowed}")
    cause = details["ctx"]["error"]
    if isinstance(cause, SettingsError):  # of settings within these
        return SettingsError(".".join(filter(None, (key, cause.path))), cause.line)
    return SettingsError(key, lambda path: ": ".join(filter(None, (path, str(cause)))))


def did_you_mean(given: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(given, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def in_words(annotation: Any, metadata: Any = ()) -> str:
    """What a setting of this type may be: "a whole number of at least 1 and below 10"."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return in_words(arguments[0], [m for field in arguments[1:] for m in getattr(field, "metadata", ())])
    if origin in (Union, types.UnionType):
        return " or ".join(in_words(each, metadata) for each in arguments if each is not type(None))
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is list:
        return f"a list, each {in_words(arguments[0])}"
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return f"a mapping with the keys {', '.join(annotation.model_fields)}"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    bounds = {"ge": "of at least", "gt": "above", "le": "up to", "lt": "below"}
    limits = [f"{words} {getattr(m, key)}" for m in metadata for key, words in bounds.items() if hasattr(m, key)]
    return f"{names.get(annotation, 'a mapping of keys to values')} {' and '.join(limits)}".strip()
