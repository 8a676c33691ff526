"""Needles in a haystack: key-value pairs at random places in the first half of a text, and the keys again in its second
half, where the model must predict their values.

It asks of a cache what recall asks (mqar.py), at the distances of long text: a needle is one token in a thousand. The
text is from a corpus of its own, in 27 symbols as in text8: the letters without case and one for all else. Keys and
values are symbols that it does not have.
"""

import hashlib
import json
import string
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import BeforeValidator, SerializeAsAny

from train.batches import IGNORED
from train.errors import InputError
from train.sections import Count, TokenizerConfig
from train.sources import Place, Source, parse
from train.sources.mqar import BLANK, RecallTask
from train.tokens import TokenSet

SHORTEST = 64  # tokens in a sequence at the beginning of the curriculum
OTHER = 26  # follows the letters' symbols
LETTERS = np.full(257, OTHER)  # a symbol for each byte and the end of text
LETTERS[list(string.ascii_lowercase.encode())] = LETTERS[list(string.ascii_uppercase.encode())] = range(26)
FORMAT = 2  # to be raised when the same settings give other sequences


class Corpus(Source):
    """`needles`: key-value pairs in a sequence. With a `curriculum` training begins with so many batches of recall in
    SHORTEST tokens. Then sequences are twice as long after each quarter as many, up to the context. On needles alone
    attention does not learn to look back in millions of tokens."""

    key: ClassVar[str] = "name"
    names: ClassVar[tuple[str, ...]] = ("needle",)
    has_documents: ClassVar[bool] = False
    name: Literal["needle"]
    text: Annotated[SerializeAsAny[Source], BeforeValidator(parse)]
    needles: Count = 4
    curriculum: Count | None = None

    def load(self, tokenizer: TokenizerConfig, place: Place) -> "NeedleTask":
        if tokenizer.name != "ids" or not tokenizer.vocab_size:
            raise InputError("corpus needle is generated, as ids: it needs tokenizer: {name: ids, vocab_size: 64}")
        text = self.text.load(TokenizerConfig(name="bytes"), place)
        return NeedleTask(text, self.needles, tokenizer.vocab_size, self.curriculum)


class NeedleTask(RecallTask):
    """TrainingData of text with needles: ids of letters, then those of keys and of values."""

    def __init__(self, text: TokenSet, needles: int, symbols: int, curriculum: int | None = None):
        super().__init__([needles], symbols, curriculum)
        self.text, self.recall = text, RecallTask(range(min(2, needles), needles + 1), symbols)
        self.n_vocab = OTHER + 1 + symbols
        self.token_bytes = np.full(self.n_vocab, 1)

    @property
    def facts(self) -> dict:
        settings = [FORMAT, self.text.facts["fingerprint"], self.pairs, self.symbols, self.curriculum]
        fingerprint = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
        return super().facts | {"name": "needle", "fingerprint": fingerprint, "text": self.text.facts["name"]}

    def check(self, context: int) -> None:
        self.text.check(context)
        if context < SHORTEST or 8 * self.pairs[0] > SHORTEST:
            given = f"model.context={context} and corpus.needles={self.pairs[0]}"
            raise InputError(f"{given}: give {SHORTEST} tokens or more, and at most {SHORTEST // 8} needles")
        if self.curriculum and not self.length(0, context) < 2 * SHORTEST <= context:
            allowed = f"with corpus.curriculum it must be {SHORTEST} doubled once or more, such as {32 * SHORTEST}"
            raise InputError(f"model.context={context}: {allowed}")

    def length(self, batch: int, context: int) -> int:
        """The context, halved down to SHORTEST and doubled by the curriculum."""
        if not self.curriculum:
            return context
        halvings = (context // SHORTEST).bit_length() - 1
        while context % 2**halvings:
            halvings -= 1
        doublings = max(0, 4 * batch // self.curriculum - 3)
        return context >> max(0, halvings - doublings)

    def sequence(self, rng: np.random.Generator, n: int, length: int, split: str) -> tuple[np.ndarray, np.ndarray]:
        text, needles, half, first = getattr(self.text, split), self.pairs[0], self.symbols // 2, OTHER + 1
        if self.curriculum and split == "train" and length < 2 * SHORTEST:
            inputs, targets = self.recall.sequence(rng, n, length, split)
            inputs = np.where(inputs == BLANK, OTHER, first + inputs)
            return inputs, np.where(targets == IGNORED, IGNORED, first + targets)
        start = rng.integers(len(text) - length)
        inputs, targets = LETTERS[text[start : start + length]], np.full(length, IGNORED)
        keys = first + rng.choice(half, needles, replace=False)
        values = first + half + rng.integers(self.symbols - half, size=needles)
        pairs = 2 * rng.choice(length // 4, needles, replace=False)
        asked = length // 2 + rng.choice(length - length // 2, needles, replace=False)
        inputs[pairs], inputs[pairs + 1] = keys, values
        inputs[asked], targets[asked] = keys, values
        return inputs, targets
