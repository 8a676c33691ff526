"""Optimizers and learning rate schedules of a study's recipe."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from archs import Decoder

DECAYING = 0.2  # the last part of a wsd schedule
BETAS = (0.9, 0.95)


class Together(torch.optim.Optimizer):
    """Several optimizers, each of parameters of its own, as one."""

    def __init__(self, *optimizers: torch.optim.Optimizer):
        self.optimizers = optimizers
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})

    def step(self, closure: Callable | None = None) -> Any:
        with torch.enable_grad():
            loss = closure() if closure else None
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def state_dict(self) -> dict:
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict) -> None:
        for optimizer, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]


def adamw(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with decay on matrices alone."""
    return _adamw(list(model.parameters()), lr, weight_decay)


def _adamw(params: list[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.AdamW:
    matrices, vectors = ([p for p in params if (p.dim() > 1) == wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=BETAS, fused=True)


def muon(model: Decoder, lr: float, weight_decay: float) -> Together:
    """Muon for the matrices of layers, AdamW for embeddings and vectors. Updates have AdamW's size, so that one rate is
    for both (Moonlight, arXiv 2502.16982, section 2.2). What is stored as one matrix, such as the projections to
    queries, keys and values, is one to Muon."""
    tables = {model.embed.weight, model.unembed.weight}
    inner = [p for p in model.parameters() if p.dim() == 2 and p not in tables]
    others = [p for p in model.parameters() if p.dim() != 2 or p in tables]
    how = {"lr": lr, "weight_decay": weight_decay, "adjust_lr_fn": "match_rms_adamw"}
    return Together(torch.optim.Muon(inner, **how), _adamw(others, lr, weight_decay))


OPTIMIZERS = {"adamw": adamw, "muon": muon}


def cosine(done: float) -> float:
    """The share of the peak rate when a share `done` of the training after warm-up is done: a cosine to a tenth."""
    return 0.55 + 0.45 * math.cos(math.pi * done)


def wsd(done: float) -> float:
    """Constant, then over the last fifth 1 - sqrt(x) down to zero (Hägele et al., arXiv 2405.18392, section 3)."""
    return 1 - math.sqrt(max(0.0, done - 1 + DECAYING) / DECAYING)


SCHEDULES = {"cosine": cosine, "wsd": wsd}
