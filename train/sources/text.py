"""What all sources of text have: the share that is held out, limits, and the pass that makes tokens of them."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from train.corpus import Part
from train.sections import Count, TokenizerConfig
from train.shards import tokenise
from train.sources import Place, Source
from train.tokens import TokenSet, open_or_build


class TextSource(Source):
    """`held_out`: the share of documents in each of `tune` and `test`. With a limit, reading ends with the document
    that reaches it: `limit_bytes` of text, `limit_tokens` of training text."""

    held_out: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    limit_bytes: Count | None = None
    limit_tokens: Count | None = None

    def parts(self, place: Place) -> list[Part]:
        """All parts, in an order that does not depend on the machine. InputError says what to change."""
        raise NotImplementedError

    def identity(self, place: Place) -> list[list]:
        """[name, size, modified, split] of each part: what tells without reading it whether the text has changed."""
        return [part.identity for part in self.parts(place)]

    def title(self) -> str:
        """The name of the corpus in results."""
        return self.key

    def load(self, tokenizer: TokenizerConfig, place: Place) -> TokenSet:
        """InputError says what is wrong with the text; the shards before it are kept."""

        def build(folder: Path, *last: Any) -> dict:
            limits = self.limit_bytes, self.limit_tokens
            return tokenise(self.title(), self.parts(place), self.held_out, tokenizer, folder, *last, *limits)

        return open_or_build(self, tokenizer, self.identity(place), place, build)
