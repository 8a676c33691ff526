"""Where a run's metrics go: metrics.jsonl always, and the loggers that a study names."""

import hashlib
import importlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment

from train.errors import InputError
from train.files import read_rows, write_atomic
from train.plan import Run


def make_loggers(run: Run, names: Sequence[str], tokens_done: int) -> list[Logger]:
    """The named loggers and, last, metrics.jsonl. What was logged after `tokens_done`, where the checkpoint is from
    which the run continues, is forgotten. InputError if one cannot be made."""
    lines = JSONLines(run.directory / "metrics.jsonl", up_to_tokens=tokens_done)
    settings = {"label": run.variant.label, "seed": run.seed, "lr": run.lr} | run.variant.options
    loggers: list[Logger] = []
    for name in names:
        try:
            logger = MAKERS[name](run, tokens_done) if name in MAKERS else _of_class(name)(save_dir=run.directory)
        except Exception as e:  # whatever another's class does
            why = " ".join(str(e).split()) or type(e).__name__
            known = (
                f"give {', '.join(MAKERS)} (an extra: `uv run --extra wandb`), or package.module:Class of Lightning's"
            )
            raise InputError(f"train.loggers: {name!r} cannot be used ({why}); {known}") from None
        if name == "csv":  # Lightning begins a new file where a run continues
            for row in lines.rows:
                logger.log_metrics({key: value for key, value in row.items() if key != "tokens"}, row["tokens"])
        if name != "tensorboard":  # its table is of the whole study (eval/board.py)
            logger.log_hyperparams(settings)
        loggers.append(logger)
    return [*loggers, lines]


def finish(loggers: Sequence[Logger]) -> None:
    """To be called when a run ends: Weights & Biases would log the next run in this process to the same one."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()


def _tensorboard(run: Run, tokens_done: int) -> Logger:
    purge = tokens_done + 1 if tokens_done else None
    return TensorBoardLogger(run.directory, name="", version="", default_hp_metric=False, purge_step=purge)


def _wandb(run: Run, tokens_done: int) -> Logger:
    """A run of Weights & Biases, in a group with other seeds; offline unless WANDB_MODE says else."""
    offline = os.environ.get("WANDB_MODE", "offline") == "offline"
    identity = hashlib.sha256(str(run.directory.resolve()).encode()).hexdigest()[:16]  # the same where the run goes on
    how = {"offline": offline, "version": identity, "project": "kvfrontier", "group": run.variant.label}
    return WandbLogger(run.name, run.directory, **how)


MAKERS = {
    "tensorboard": _tensorboard,
    "csv": lambda run, tokens_done: CSVLogger(run.directory, name="", version=""),
    "wandb": _wandb,
}


def _of_class(name: str) -> Any:
    module, _, kind = name.rpartition(":")
    return getattr(importlib.import_module(module), kind)


class JSONLines(Logger):
    """metrics.jsonl: each line has `tokens` and the metrics logged there. Deletes lines past `up_to_tokens`, where the
    checkpoint is from which the run continues."""

    def __init__(self, path: Path, up_to_tokens: int):
        super().__init__()
        self.path = path
        self.rows = [row for row in read_rows(path) if row["tokens"] <= up_to_tokens]  # of the run so far
        write_atomic(path, "".join(json.dumps(row) + "\n" for row in self.rows).encode())

    name, version = "jsonl", ""

    @property
    @rank_zero_experiment
    def experiment(self) -> None:
        return None

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        with self.path.open("a", encoding="utf-8") as f:
            f.write(json.dumps({"tokens": step, **metrics}) + "\n")

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """config.json has them."""

    def save(self) -> None:
        with self.path.open("a", encoding="utf-8") as f:
            os.fsync(f.fileno())

    def curve(self) -> list[dict]:
        """The validations so far, as the record has them."""
        rows = [row for row in read_rows(self.path) if "val/bpb" in row]
        return [{"tokens": row["tokens"], "val_nats": row["val/loss"], "val_bpb": row["val/bpb"]} for row in rows]
