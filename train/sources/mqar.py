"""Multi-query associative recall (Zoology, arXiv 2312.04927, section 4 and its appendix on synthetic data).

A sequence begins with key-value pairs, all keys different: k1 v1 k2 v2 ... Then each key comes once more, in a random
order at places that crowd towards the beginning, and only there the model must predict, namely its value. Blanks stand
between the queries: the paper has random tokens, which with a small vocabulary would be keys.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.utils.data import Dataset

from train.batches import IGNORED
from train.errors import InputError
from train.sections import Count, TokenizerConfig
from train.sources import Place, Source

FORMAT = 3  # to be raised when the same settings give other sequences
SEEDS = {"test": 0, "tune": 1}  # of held-out sequences
BLANK = 0
EASY = 3
CROWDING = 0.01  # exponent of the power law of a query's distance from the pairs


class Corpus(Source):
    """`pairs`: the numbers of key-value pairs in a sequence, equally often. With a `curriculum` training has the least
    EASY of them at first, and after each `curriculum` sequences one more: on many pairs alone attention learns late or
    never to look back."""

    key: ClassVar[str] = "name"
    names: ClassVar[tuple[str, ...]] = ("mqar",)
    has_documents: ClassVar[bool] = False
    name: Literal["mqar"]
    pairs: list[Count] = Field([])
    curriculum: Count | None = None

    def load(self, tokenizer: TokenizerConfig, place: Place) -> "RecallTask":
        if tokenizer.name != "ids" or not tokenizer.vocab_size or not self.pairs:
            needs = "pairs, such as [4, 16], and tokenizer: {name: ids, vocab_size: 256}"
            raise InputError(f"corpus mqar is generated, as token ids: it needs {needs}")
        return RecallTask(self.pairs, tokenizer.vocab_size, self.curriculum)


class RecallTask:
    """TrainingData that is generated; keys are the lower half of the vocabulary, values the upper half."""

    tokenizer = folder = end_of_text = None

    def __init__(self, pairs: Sequence[int], vocab_size: int, curriculum: int | None = None):
        most = (vocab_size - 2) // 2
        if not pairs or len(set(pairs)) < len(pairs) or not all(0 < n <= most for n in pairs):
            allowed = f"different numbers of key-value pairs, each from 1 to {most}"
            half = f"as half of tokenizer.vocab_size={vocab_size} are keys"
            raise InputError(f"corpus.pairs={list(pairs)}: must be {allowed}, {half}")
        self.pairs, self.symbols, self.n_vocab = sorted(pairs), vocab_size, vocab_size
        self.curriculum = curriculum
        self.token_bytes = np.full(vocab_size, ((vocab_size - 1).bit_length() + 7) // 8)

    @property
    def facts(self) -> dict:
        """The "corpus" of results.json: there is no text, and there are as many tokens as are trained on."""
        settings = {"task": "mqar", "format": FORMAT, "pairs": self.pairs, "vocab_size": self.n_vocab}
        settings |= {"curriculum": self.curriculum} if self.curriculum else {}
        fingerprint = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
        counts = {
            "bytes": 0,
            "train_tokens": 0,
            "tune_tokens": 0,
            "val_tokens": 0,
            "bytes_per_token": int(self.token_bytes[0]),
        }
        return {"name": "mqar", "fingerprint": fingerprint, "generated": True, "pairs": self.pairs, **counts}

    def check(self, context: int) -> None:
        if 4 * self.pairs[-1] > context:
            need = f"{self.pairs[-1]} key-value pairs and as many queries take {4 * self.pairs[-1]} tokens"
            raise InputError(f"{need}, more than model.context={context}: lower corpus.pairs or raise model.context")

    def training(self, context: int, batch_size: int, seed: int) -> "RecallBatches":
        return RecallBatches(self, context, batch_size, seed)

    def length(self, batch: int, context: int) -> int:
        """Tokens in each sequence of a training batch, a divisor of `context` that never falls."""
        return context

    def sequence(self, rng: np.random.Generator, n: int, length: int, split: str) -> tuple[np.ndarray, np.ndarray]:
        """(inputs, targets) of sequence n."""
        reached = self.pairs
        if self.curriculum and split == "train":
            reached = reached[: EASY + n // self.curriculum]
        pairs, half = reached[n % len(reached)], self.symbols // 2
        keys = 1 + rng.choice(half - 1, pairs, replace=False)
        values = half + rng.integers(self.symbols - half, size=pairs)
        inputs, targets = np.full(length, BLANK), np.full(length, IGNORED)
        inputs[0 : 2 * pairs : 2], inputs[1 : 2 * pairs : 2] = keys, values
        places = (length - 2 * pairs) // 2
        crowding = np.arange(1, places + 1) ** (CROWDING - 1.0)
        asked = 2 * pairs + 2 * rng.choice(places, pairs, replace=False, p=crowding / crowding.sum())
        inputs[asked], targets[asked] = keys, values
        return inputs, targets

    def held_out(self, split: str, context: int, batch_size: int, limit: int) -> "RecallBatches":
        """Each number of pairs equally often, about `limit` tokens in all, the same for every variant and seed."""
        sequences = -(-max(1, limit // context) // len(self.pairs)) * len(self.pairs)
        return RecallBatches(self, context, batch_size, SEEDS[split], split, sequences)

    def spread(self, sequences: int, available: int) -> range:
        """Numbers of the first held-out sequences: about `sequences`, with each number of pairs equally often."""
        turns = len(self.pairs)
        return range(min(available, -(-sequences // turns) * turns))


class RecallBatches(Dataset):
    """Item k is (inputs, targets), both int64 (batch_size, context) or as many tokens in shorter sequences; targets are
    IGNORED except at the queries.

    With `sequences` these are that many held-out sequences, and an item's third entry is the bytes that its targets
    stand for. Sequence n depends on (seed, n) alone.
    """

    def __init__(
        self, task: RecallTask, context: int, batch_size: int, seed: int, split: str = "train", sequences: int = 0
    ):
        task.check(context)
        self.task, self.context, self.batch_size, self.seed = task, context, batch_size, seed
        self.split, self.sequences = split, sequences

    def __len__(self) -> int:
        return -(-self.sequences // self.batch_size)

    def __getitem__(self, k: int) -> tuple:
        if self.split == "train":
            length = self.task.length(k, self.context)
            first = k * self.batch_size * (self.context // self.task.length(0, self.context))
            return self._sequences(range(first, first + self.batch_size * self.context // length), length)
        numbers = range(k * self.batch_size, min((k + 1) * self.batch_size, self.sequences))
        if not numbers:
            raise IndexError(k)
        inputs, targets = self._sequences(numbers, self.context)
        return inputs, targets, int(self.task.token_bytes[targets[targets != IGNORED]].sum())

    def _sequences(self, numbers: range, length: int) -> tuple[Tensor, Tensor]:
        held_out = self.split != "train"
        rows = (
            self.task.sequence(np.random.default_rng((held_out, self.seed, n)), n, length, self.split) for n in numbers
        )
        inputs, targets = (torch.from_numpy(np.stack(each)) for each in zip(*rows, strict=True))
        return inputs, targets
