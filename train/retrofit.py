"""Training a finished model further for a technique that changes how its cache works, such as DMC."""

from typing import Any

import torch
from torch import Tensor

from archs.techniques import Technique
from train.module import LanguageModel


class Retrofit(LanguageModel):
    """A LanguageModel whose layers have the technique's form. Load the finished model's weights into it.

    The loss of a step is the language model's plus the technique's penalty.
    """

    def __init__(self, technique: Technique, arch: str, options: dict[str, Any], **recipe: Any):
        super().__init__(arch, options, **recipe)
        self.technique = technique
        self.model = technique.retrofit(self.model)

    def setup(self, stage: str) -> None:
        """A retrofit is too short to gain by compilation."""

    def on_train_batch_start(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        # Random decisions are a function of seed and place, so resuming needs no generator state.
        torch.manual_seed(hash((self.hparams.seed, self.tokens_seen)) + self.trainer.global_rank)
        self._done = self.tokens_seen / self.hparams.tokens
        self.technique.before_step(self.model, self._done)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + self.technique.penalty(self.model, self._done)
