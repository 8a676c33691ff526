"""Batches of a tokenised corpus: batch k of seed s is a pure function of (s, k).

Every variant of a seed therefore sees the same tokens in the same order, a run is resumed by counting, and seeds can be
compared in pairs. Each epoch cuts the training tokens into sequences at an offset of its own and goes through them in
an order of its own, both drawn from (seed, epoch).
"""

import itertools
from collections.abc import Iterator

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from train.tokens import TokenSet


class TrainingBatches(Dataset):
    """Item k is batch k of `seed`: (batch_size, context + 1) int64, inputs and, one further on, targets. Endless."""

    def __init__(self, tokens: np.ndarray, context: int, batch_size: int, seed: int):
        if len(tokens) <= context:
            raise ValueError(f"{len(tokens)} training tokens are too few for context={context}")
        self.tokens, self.context, self.batch_size, self.seed = tokens, context, batch_size, seed
        self.per_epoch = (len(tokens) - 1) // context
        self._epoch = -1

    def __getitem__(self, k: int) -> Tensor:
        places = range(k * self.batch_size, (k + 1) * self.batch_size)
        starts = [self._start(*divmod(place, self.per_epoch)) for place in places]
        rows = np.stack([self.tokens[start : start + self.context + 1] for start in starts])
        return torch.from_numpy(rows.astype(np.int64))

    def _start(self, epoch: int, place: int) -> int:
        if epoch != self._epoch:
            rng = np.random.default_rng((self.seed, epoch))
            self._offset = rng.integers(len(self.tokens) - self.per_epoch * self.context)
            self._order = rng.permutation(self.per_epoch)
            self._epoch = epoch
        return int(self._offset + self._order[place] * self.context)


class ValidationBatches(Dataset):
    """Held-out tokens, each predicted once: item k is (tokens (b, context + 1), bytes of text that they predict).

    `limit` is the number of tokens predicted, rounded to whole sequences; at least one sequence, at most all there are.
    They are spread evenly over the held-out text, so that a small sample stands for all of it.
    """

    def __init__(self, data: TokenSet, context: int, batch_size: int, limit: int):
        if len(data.val) <= context:
            raise ValueError(f"{len(data.val)} validation tokens are too few for context={context}")
        self.available = (len(data.val) - 1) // context
        self.sequences = min(self.available, max(1, limit // context))
        self.data, self.context, self.batch_size = data, context, batch_size

    def __len__(self) -> int:
        return -(-self.sequences // self.batch_size)

    def __getitem__(self, k: int) -> tuple[Tensor, int]:
        if not 0 <= k < len(self):
            raise IndexError(k)
        numbers = range(k * self.batch_size, min((k + 1) * self.batch_size, self.sequences))
        rows = [n * self.available // self.sequences for n in numbers]
        tokens = np.stack([self.data.val[r * self.context : (r + 1) * self.context + 1] for r in rows]).astype(np.int64)
        return torch.from_numpy(tokens), int(self.data.token_bytes[tokens[:, 1:]].sum())


class TextData(L.LightningDataModule):
    """Training and validation batches for a Trainer. A run that is resumed goes on at the batch where it stopped.

        data = TextData(prepare(load_corpus("stdlib"), "bytes", None, default_cache_dir()), context=128, batch_size=16)
        model = LanguageModel("mha", {...}, tokens=1000 * 16 * 128)
        Trainer(max_steps=1000, val_check_interval=100, check_val_every_n_epoch=None).fit(model, data)

    Training has no end but `max_steps`, so that validation goes by steps. On several devices each takes every n-th
    batch, of `batch_size` sequences, and each validates on all of the held-out text.
    """

    def __init__(self, data: TokenSet, context: int, batch_size: int, seed: int = 0, val_tokens: int = 65_536):
        super().__init__()
        self.training = TrainingBatches(data.train, context, batch_size, seed)
        self.validation = ValidationBatches(data, context, batch_size, val_tokens)

    def train_dataloader(self) -> DataLoader:
        if not self.trainer:
            return DataLoader(_InOrder(self.training), batch_size=None)
        trainer = self.trainer
        done = trainer.global_step * trainer.accumulate_grad_batches * trainer.world_size
        return DataLoader(_InOrder(self.training, done + trainer.global_rank, trainer.world_size), batch_size=None)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(_InOrder(self.validation), batch_size=None)


class _InOrder(IterableDataset):
    """Every `step`-th item of a dataset from `first` on: an order that no Trainer replaces by a sampler of its own."""

    def __init__(self, dataset: Dataset, first: int = 0, step: int = 1):
        self.dataset, self.first, self.step = dataset, first, step

    def __iter__(self) -> Iterator:
        for k in itertools.count(self.first, self.step):
            try:
                yield self.dataset[k]
            except IndexError:
                return
