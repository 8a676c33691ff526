"""What a study trains on, as a protocol, and its batches as a LightningDataModule."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import lightning as L
import numpy as np
import tiktoken
from torch.utils.data import DataLoader, Dataset, IterableDataset


class TrainingData(Protocol):
    """A corpus in tokens (train/tokens.py) or a task that generates its sequences (train/mqar.py)."""

    tokenizer: tiktoken.Encoding | None  # None: the ids stand for no text

    @property
    def n_vocab(self) -> int: ...

    @property
    def token_bytes(self) -> np.ndarray:
        """int64 (n_vocab,): bytes of text that each token stands for."""

    @property
    def token_kinds(self) -> np.ndarray:
        """uint8 (n_vocab,): 1 for special tokens, 2 for punctuation, 0 for others."""

    @property
    def facts(self) -> dict[str, Any]:
        """The "corpus" of results.json; its `fingerprint` differs where the text or the task does."""

    def check(self, context: int) -> None:
        """InputError if sequences of `context` tokens cannot be made."""

    def training(self, context: int, batch_size: int, seed: int) -> Dataset:
        """Item k is batch k of `seed`: (inputs, targets), int64 (batch_size, context). It has no end."""

    def validation(self, context: int, batch_size: int, limit: int) -> Dataset:
        """Held-out batches with about `limit` targets in all: (inputs, targets, bytes that the targets stand for)."""

    def spread(self, sequences: int, available: int) -> Sequence[int]:
        """Numbers of about `sequences` of the first `available` held-out sequences that stand for all of them."""


class DataModule(L.LightningDataModule):
    """Training and validation batches for a Trainer. A run that is resumed continues at the batch where it stopped.

        text = prepare(load_corpus("stdlib"), "bytes", None, default_cache_dir())
        data = DataModule(text, context=128, batch_size=16)
        model = LanguageModel("mha", {...}, tokens=1000 * 16 * 128)
        Trainer(max_steps=1000, val_check_interval=100, check_val_every_n_epoch=None).fit(model, data)

    Training ends at `max_steps` alone, so validation goes by steps. On several devices each takes every n-th batch, of
    `batch_size` sequences, and each validates on all of the held-out text.
    """

    def __init__(self, data: TrainingData, context: int, batch_size: int, seed: int = 0, val_tokens: int = 65_536):
        super().__init__()
        self.training = data.training(context, batch_size, seed)
        self.validation = data.validation(context, batch_size, val_tokens)

    def train_dataloader(self) -> DataLoader:
        if not self.trainer:
            return self._loader(_InOrder(self.training))
        trainer = self.trainer
        done = trainer.global_step * trainer.accumulate_grad_batches * trainer.world_size
        return self._loader(_InOrder(self.training, done + trainer.global_rank, trainer.world_size))

    def val_dataloader(self) -> DataLoader:
        return self._loader(_InOrder(self.validation))

    def _loader(self, batches: "_InOrder") -> DataLoader:
        """Memory is pinned for a GPU, so that copies to it overlap with its work."""
        on_gpu = bool(self.trainer) and self.trainer.strategy.root_device.type == "cuda"
        return DataLoader(batches, batch_size=None, pin_memory=on_gpu)


class _InOrder(IterableDataset):
    """Every `step`-th item of a dataset from `first` on. A Trainer cannot replace this order by its own sampler."""

    def __init__(self, dataset: Dataset, first: int = 0, step: int = 1):
        self.dataset, self.first, self.step = dataset, first, step

    def __iter__(self) -> Iterator:
        for k in itertools.count(self.first, self.step):
            try:
                yield self.dataset[k]
            except IndexError:
                return
