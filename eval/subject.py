"""The input of every measure: a trained model, the data, and the model's predictions on the held-out part of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from archs import Decoder
from archs.techniques import Technique
from train.batches import IGNORED, TrainingData, documents
from train.module import token_nats
from train.study import EvalConfig

TOKENS_AT_ONCE = 8192
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Predictions:
    """For held-out sequences (N, T), the loss of each target in nats and whether it was the likeliest token.

    A place where nothing is predicted has the target IGNORED and 0 nats. `n_bytes`: the bytes of text (or of answers)
    that all targets stand for.
    """

    inputs_NT: Tensor
    targets_NT: Tensor
    nats_NT: Tensor
    right_NT: Tensor
    n_bytes: int

    @property
    def predicted_NT(self) -> Tensor:
        return self.targets_NT != IGNORED

    def mean_nats(self, mask_NT: Tensor) -> float:
        return self.nats_NT[mask_NT].double().mean().item()


@dataclass
class EvalContext:
    """`measured` is what the record holds so far; `show` displays a result to the user."""

    model: Decoder  # in fp32; for the REPEATED measures in `dtype`
    data: TrainingData
    config: EvalConfig
    dtype: torch.dtype  # of weights and cache while decoding
    roof_gb_s: float
    show: Callable[[str], None]
    measured: dict = field(default_factory=dict)
    seed: int = 0
    retrofit: Callable[[Technique], Decoder] | None = None  # loads the model that was trained further for a technique
    document_end: int | None = None  # of models that were trained with a document mask

    @cached_property
    @torch.inference_mode()
    def predictions(self) -> Predictions:
        """Predictions in fp32 of about `loss_tokens` test tokens, each from at most `context` tokens before it."""
        context, device = self.model.options.context, self.model.embed.weight.device
        columns, n_bytes = [], 0
        rows = max(1, TOKENS_AT_ONCE // context)
        batches = self.data.held_out("test", context, rows, self.config.loss_tokens)
        for inputs, targets, batch_bytes in batches:
            document_BT = documents(inputs, self.document_end)
            logits = self.model(inputs.to(device), document_BT if document_BT is None else document_BT.to(device))
            nats = token_nats(logits, targets.to(device))
            columns.append((inputs, targets, nats.cpu(), logits.argmax(-1).cpu() == targets))
            n_bytes += batch_bytes
        return Predictions(*map(torch.cat, zip(*columns, strict=True)), n_bytes)
