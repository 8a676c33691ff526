"""Batches as a LightningDataModule."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import lightning as L
from torch.utils.data import DataLoader, Dataset, IterableDataset

from train.batches import TrainingData
from train.sections import TokenizerConfig
from train.sources import Place, parse


def load_text(corpus: dict, tokenizer: dict) -> TrainingData:
    """The tokens that a study's sections `corpus` and `tokenizer` describe; files are relative to the current folder.
    ValueError says what is wrong."""
    return parse(corpus).load(TokenizerConfig(**tokenizer), Place([Path.cwd()]))


class DataModule(L.LightningDataModule):
    """Training and validation batches for a Trainer. A run that is resumed continues at the batch where it stopped.

        data = DataModule(load_text({"name": "stdlib"}, {"name": "bytes"}), context=128, batch_size=16)
        model = LanguageModel("mha", {...}, tokens=1000 * 16 * 128)
        Trainer(max_steps=1000, val_check_interval=100, check_val_every_n_epoch=None).fit(model, data)

    Only `max_steps` ends it. On several devices each takes every n-th batch, and validates on all held-out text.
    """

    def __init__(self, data: TrainingData, context: int, batch_size: int, seed: int = 0, val_tokens: int = 65_536):
        super().__init__()
        self.training = data.training(context, batch_size, seed)
        self.validation = data.held_out("tune", context, batch_size, val_tokens)

    def train_dataloader(self) -> DataLoader:
        return self._loader(_InOrder(self.training, self.trainer))

    def val_dataloader(self) -> DataLoader:
        return self._loader(_InOrder(self.validation))

    def _loader(self, batches: "_InOrder") -> DataLoader:
        """Memory is pinned for a GPU, so that copies to it overlap with its work."""
        on_gpu = bool(self.trainer) and self.trainer.strategy.root_device.type == "cuda"
        return DataLoader(batches, batch_size=None, pin_memory=on_gpu)


class _InOrder(IterableDataset):
    """A dataset from its start; or this device's share of it, from the batch on that the Trainer has come to, also in
    a second epoch. A Trainer cannot replace this order by its own sampler."""

    def __init__(self, dataset: Dataset, trainer: L.Trainer | None = None):
        self.dataset, self.trainer = dataset, trainer

    def __iter__(self) -> Iterator:
        first, step = 0, 1
        if t := self.trainer:
            done = t.global_step * t.accumulate_grad_batches * t.world_size
            first, step = done + t.global_rank, t.world_size
        for k in itertools.count(first, step):
            try:
                yield self.dataset[k]
            except IndexError:
                return
