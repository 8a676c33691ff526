"""Types of settings that a study and the sources of its data have."""

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, model_serializer, model_validator

from archs.settings import Settings


def whole(value: Any) -> Any:
    """1e6, which YAML reads as a float, as 1_000_000; any other value as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def distinct(values: list) -> list:
    """The list; ValueError if it is empty or has a value twice."""
    Settings.check(bool(values), "at least one is needed")
    repeated = next((value for value in values if values.count(value) > 1), None)
    Settings.check(repeated is None, f"{repeated!r} stands twice in the study")
    return values


Whole = BeforeValidator(whole)
Count = Annotated[int, Whole, Field(ge=1)]
Amount = Annotated[int, Whole, Field(ge=0)]
Seed = Annotated[int, Whole, Field(ge=0, lt=2**32)]
VocabSize = Annotated[int, Whole, Field(ge=1, lt=2**31)]
Positive = Annotated[float, Field(gt=0)]
Counts = Annotated[list[Count], AfterValidator(distinct)]


class Section(Settings):
    """Base of the study and its sections. A key without a value (null) counts as left out."""

    model_config = ConfigDict(frozen=True)
    noun = "key"

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, values: Any) -> Any:
        is_dict = isinstance(values, dict)
        return {key: value for key, value in values.items() if value is not None} if is_dict else values


class TokenizerConfig(Section):
    name: str  # or the path of a tokenizer.json, relative to the study's file or to the current folder
    vocab_size: VocabSize | None = None
    end_of_text: str | None = None  # of a tokenizer.json: the special token between documents

    @model_serializer(mode="wrap")
    def _without_end_of_text(self, dump: Any) -> dict[str, Any]:
        """A key that came later: left out where it is not given, so that hashes of earlier settings stay."""
        return {key: value for key, value in dump(self).items() if key != "end_of_text" or value is not None}
