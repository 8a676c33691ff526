"""Training a finished model further so that its cache merges (DMC, archs/techniques/dmc.py), to a compression ratio.

The decisions' element fades out of the keys over the first tenth of the budget; from then on the share of tokens that
must merge rises, to its target at seven tenths (DMC, arXiv 2403.09636, section 3.2).
"""

from typing import Any

import torch
from torch import Tensor

from archs.techniques.dmc import merging
from train.module import LanguageModel

FADED, RISEN = 0.1, 0.7  # shares of the budget


class Retrofit(LanguageModel):
    """As LanguageModel, whose weights it is to be given; `budget` is one over the compression ratio.

    The loss is the language model's and max(0, what must merge - what would merge), as a share of the tokens.
    """

    def __init__(self, arch: str, options: dict[str, Any], *, budget: float, **recipe: Any):
        super().__init__(arch, options, **recipe)
        self.budget = budget
        merging(self.model)

    def setup(self, stage: str) -> None:
        """Not compiled: it is short."""

    def on_train_batch_start(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        torch.manual_seed(hash((self.hparams.seed, self.tokens_seen)) + self.trainer.global_rank)
        done = self.tokens_seen / self.hparams.tokens
        for block in self.model.blocks:
            block.attention.attended_D[0] = max(0.0, 1 - done / FADED)
        self.must_merge = (1 - self.budget) * min(1.0, max(0.0, (done - FADED) / (RISEN - FADED)))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        merged = torch.stack([block.attention.merged for block in self.model.blocks]).mean()
        return loss + (self.must_merge - merged).clamp(min=0)
