"""Batches of a tokenised corpus: batch k of seed s is a pure function of (s, k).

Every variant of a seed therefore sees the same tokens in the same order, a run is resumed by counting, and seeds can be
compared in pairs. Each epoch cuts the training tokens into sequences at a random offset and goes through them in a
random order, both drawn from (seed, epoch).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from train.tokenizer import Encoding

IGNORED = -100  # a target where nothing is to be predicted


class TrainingData(Protocol):
    """A corpus in tokens (train/tokens.py) or a task that generates its sequences (train/sources/mqar.py)."""

    tokenizer: Encoding | None  # None: the ids stand for no text
    end_of_text: int | None  # the token that ends a document
    folder: Path | None  # from which the data can be opened again without its source
    n_vocab: int
    token_bytes: np.ndarray  # int64 (n_vocab,): bytes of text that each token stands for
    facts: dict[str, Any]  # the "corpus" of results.json; its `fingerprint` differs where the text or the task does

    def check(self, context: int) -> None:
        """InputError if sequences of `context` tokens cannot be made."""

    def training(self, context: int, batch_size: int, seed: int) -> Dataset:
        """Item k is batch k of `seed`: (inputs, targets), int64 (batch_size, context). It has no end."""

    def held_out(self, split: str, context: int, batch_size: int, limit: int) -> Dataset:
        """Batches of a split with about `limit` targets in all: (inputs, targets, bytes that the targets stand for).
        By "tune" learning rates are chosen and curves are drawn; "test" is for the record alone."""

    def spread(self, sequences: int, available: int) -> Sequence[int]:
        """Numbers of about `sequences` of the first `available` held-out sequences that stand for all of them."""


def documents(tokens_BT: Tensor, end: int | None) -> Tensor | None:
    """The number of each token's document, to which its `end` belongs, (B, T); None without an `end`."""
    if end is None:
        return None
    ends_BT = (tokens_BT == end).long()
    return ends_BT.cumsum(1) - ends_BT


class TrainingBatches(Dataset):
    """Item k is batch k of `seed`: inputs and the next tokens as targets, both int64 (batch_size, context)."""

    def __init__(self, tokens: np.ndarray, context: int, batch_size: int, seed: int):
        if len(tokens) <= context:
            raise ValueError(f"{len(tokens)} training tokens are too few for context={context}")
        self.tokens, self.context, self.batch_size, self.seed = tokens, context, batch_size, seed
        self.per_epoch = (len(tokens) - 1) // context
        self._epoch = -1

    def __getitem__(self, k: int) -> tuple[Tensor, Tensor]:
        places = range(k * self.batch_size, (k + 1) * self.batch_size)
        starts = [self._start(*divmod(place, self.per_epoch)) for place in places]
        return _inputs_and_targets([self.tokens[start : start + self.context + 1] for start in starts])

    def _start(self, epoch: int, place: int) -> int:
        if epoch != self._epoch:
            rng = np.random.default_rng((self.seed, epoch))
            self._offset = rng.integers(len(self.tokens) - self.per_epoch * self.context)
            self._order = rng.permutation(np.arange(self.per_epoch, dtype=np.uint32))
            self._epoch = epoch
        return int(self._offset + self._order[place] * self.context)


class HeldOutBatches(Dataset):
    """Held-out tokens, each predicted once: item k is (inputs, targets, bytes of text that the targets stand for).
    There are about `limit` targets, in whole sequences that are spread evenly over the held-out text."""

    def __init__(self, tokens: np.ndarray, token_bytes: np.ndarray, context: int, batch_size: int, limit: int):
        if len(tokens) <= context:
            raise ValueError(f"{len(tokens)} held-out tokens are too few for context={context}")
        self.available = (len(tokens) - 1) // context
        self.sequences = min(self.available, max(1, limit // context))
        self.tokens, self.token_bytes, self.context, self.batch_size = tokens, token_bytes, context, batch_size

    def __len__(self) -> int:
        return -(-self.sequences // self.batch_size)

    def __getitem__(self, k: int) -> tuple[Tensor, Tensor, int]:
        if not 0 <= k < len(self):
            raise IndexError(k)
        numbers = range(k * self.batch_size, min((k + 1) * self.batch_size, self.sequences))
        rows = [n * self.available // self.sequences * self.context for n in numbers]
        inputs, targets = _inputs_and_targets([self.tokens[row : row + self.context + 1] for row in rows])
        return inputs, targets, int(self.token_bytes[targets].sum())


def _inputs_and_targets(rows: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    tokens = torch.from_numpy(np.stack(rows).astype(np.int64))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
