"""The train stage: every run of a study that is not done yet, each in its own directory, repeatable and resumable.

A run writes `config.json` (what decides its result), TensorBoard events, `metrics.jsonl`, its last two checkpoints and,
when it has trained to the end, `record.json`. A run whose directory has another key starts over.

A run that was stopped or killed at any moment goes on from its last checkpoint to the same weights and curves: batches
and dropout are functions of the seed and the place in the run, and what was logged after the checkpoint is dropped.
"""

import contextlib
import json
import logging
import math
import os
import shutil
import signal
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from filelock import Timeout
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment

from train.checkpoints import DurableCheckpoints, checkpoint_path, checkpoints, newest_whole
from train.data import TextData
from train.errors import InputError
from train.files import device_name, lock, read_json, read_record, write_atomic, write_json
from train.module import LanguageModel
from train.mqar import RecallTask
from train.plan import Plan, Run, Variant, find_device, settings, stale_because
from train.progress import StudyProgress
from train.study import TrainConfig
from train.tokens import TokenSet

SECONDS_BETWEEN_CHECKPOINTS = 60
LOG_POINTS = 100


class Interrupted(Exception):
    """Ctrl-C or SIGTERM came; a checkpoint has been written. `signum` is the signal."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


def train_runs(plan: Plan) -> list[str]:
    """Trains what is not trained yet; returns a line for each run that failed. Interrupted if a signal came.

    Runs that another process trains are left to it: InputError at the end, which names them.
    """
    failures: list[str] = []
    elsewhere: list[Run] = []
    _quiet_lightning()
    config = plan.study.train
    with StudyProgress("training", 0) as progress:
        for number, run in enumerate(plan.to_train(), 1):
            left = plan.left()
            progress.left(sum(_work(variant) for variant in left))
            try:
                with lock(run.directory):
                    if not read_record(run).get("train"):  # else another process has just finished it
                        train_run(run, config, plan.data, progress, f"{number}/{number - 1 + len(left)} {run.name}")
            except Timeout:
                elsewhere.append(run)
            except (RuntimeError, ArithmeticError) as e:  # out of memory, not finite: the other runs go on
                failure = f"{run.name} failed: {str(e).splitlines()[0]}"
                diverged = isinstance(e, ArithmeticError)
                write_json(run.directory / "record.json", {"key": run.key, "failed": failure, "diverged": diverged})
                progress.say(failure)
                if not (diverged and run.tunes):  # a learning rate that is too high is what tuning is to find out
                    failures.append(failure)
            except OSError as e:
                where = e.filename or run.directory
                raise InputError(
                    f"{run.name}: cannot write {where}: {e.strerror or e}; what was done is kept: make room there and "
                    "give the same command again"
                ) from None
    if waiting := [run.name for run in elsewhere if "train" not in read_record(run)]:
        raise InputError(
            f"{', '.join(waiting)}: in work by another kvfrontier process in {plan.directory}; all else is trained: "
            "when it has ended, give the same command again"
        )
    return failures


def _work(variant: Variant) -> int:
    """Of one run, in the unit of the study's progress."""
    return variant.params * variant.tokens


def step_counts(tokens: int, config: TrainConfig) -> tuple[int, int]:
    """(optimizer steps, steps between validations): the budget rounded down so that the last step is validated."""
    steps = tokens // config.batch_tokens
    val_every = max(min(2, steps), steps // config.val_points)  # 2: a checkpoint can come between
    return steps // val_every * val_every, val_every


def train_run(run: Run, config: TrainConfig, data: TokenSet | RecallTask, progress: StudyProgress, name: str) -> None:
    """Trains one run from its last checkpoint, or from the start, to its end."""
    found = None
    if read_json(run.directory / "config.json").get("key") == run.key:
        found = newest_whole(run.directory, progress.say)
        if not found and checkpoints(run.directory):
            progress.say(f"{run.name}: no checkpoint is whole; the run starts over")
    elif because := stale_because(run, config, data):
        progress.say(f"{run.name} starts over: {because}")
    checkpoint, tokens_done = (found[0], found[1]["seen"]["tokens_seen"]) if found else (None, 0)
    if not found:
        shutil.rmtree(run.directory, ignore_errors=True)
        write_json(run.directory / "config.json", settings(run, config, data))
    steps, val_every = step_counts(run.variant.tokens, config)
    module = LanguageModel(
        run.variant.arch,
        run.variant.options,
        tokens=steps * config.batch_tokens,
        lr=run.lr,
        warmup_tokens=config.warmup_tokens,
        weight_decay=config.weight_decay,
        clip=config.clip,
        seed=run.seed,
    )
    context = run.variant.options["context"]
    metrics = JSONLines(run.directory / "metrics.jsonl", up_to_tokens=tokens_done)
    tensorboard = TensorBoardLogger(
        run.directory, name="", version="", default_hp_metric=False, purge_step=tokens_done + 1 if tokens_done else None
    )
    keep_going = KeepGoing(run.directory, val_every)
    trainer = L.Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="gpu" if find_device().type == "cuda" else "cpu",
        devices=1,
        precision="bf16-mixed" if run.precision == "bf16" else "32-true",
        logger=[tensorboard, metrics],
        log_every_n_steps=max(1, steps // LOG_POINTS),
        val_check_interval=val_every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[keep_going, ShowProgress(progress, name, steps, _work(run.variant) / steps)],
        plugins=[DurableCheckpoints()],
    )
    batches = TextData(data, context, config.batch_tokens // context, run.seed, config.val_tokens)
    trainer.fit(module, batches, ckpt_path=checkpoint, weights_only=True)
    save(trainer, run.directory)
    curve = metrics.curve()
    if not math.isfinite(curve[-1]["val_nats"]):
        raise FloatingPointError(f"the validation loss is {curve[-1]['val_nats']}; try a lower learning rate")
    write_json(
        run.directory / "record.json",
        {
            **run.settings(),
            "params_non_embedding": module.model.count_params(embedding=False),
            "train_tokens": module.tokens_seen,
            "train": {
                "tokens_per_s": module.tokens_per_s,
                "mfu": module.mfu(module.tokens_per_s),
                "seconds": module.train_seconds,
                "lr": run.lr,
                "device": device_name(trainer.strategy.root_device),
                "threads": torch.get_num_threads(),
                "flops_per_token": 3 * module.model.flops_per_token(context),
            },
            "curve": curve,
        },
    )
    if keep_going.signum:  # it came at the last step
        raise Interrupted(keep_going.signum)


def save(trainer: L.Trainer, directory: Path) -> None:
    """Writes a checkpoint, after what was logged: a run that goes on from it logs none of that again."""
    for logger in trainer.loggers:
        logger.save()
    trainer.save_checkpoint(checkpoint_path(directory, trainer.global_step))


class KeepGoing(L.Callback):
    """Writes a checkpoint every minute and when a signal asks to stop.

    Not at a step that is validated: the validation comes after it and would be missing when the run goes on.
    """

    def __init__(self, directory: Path, val_every: int):
        self.directory, self.val_every = directory, val_every
        self.signum: int | None = None
        self.handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, module: LanguageModel) -> None:
        self.saved = time.monotonic()
        if threading.current_thread() is threading.main_thread():
            self.handlers = {s: signal.signal(s, self._stop) for s in (signal.SIGINT, signal.SIGTERM)}

    def _stop(self, signum: int, frame: Any) -> None:
        self.signum = signum

    def on_train_batch_end(self, trainer: L.Trainer, module: LanguageModel, outputs, batch, batch_idx: int) -> None:
        if (batch_idx + 1) % self.val_every == 0:
            return
        if self.signum or time.monotonic() - self.saved > SECONDS_BETWEEN_CHECKPOINTS:
            save(trainer, self.directory)
            self.saved = time.monotonic()
        if self.signum:
            raise Interrupted(self.signum)

    def teardown(self, trainer: L.Trainer, module: LanguageModel, stage: str) -> None:
        for signum, handler in self.handlers.items():
            signal.signal(signum, handler)
        self.handlers = {}


class ShowProgress(L.Callback):
    """Tells the study's display of each step."""

    def __init__(self, progress: StudyProgress, name: str, steps: int, work: float):
        self.progress, self.name, self.steps, self.work = progress, name, steps, work
        self.loss = self.speed = ""

    def on_train_start(self, trainer: L.Trainer, module: LanguageModel) -> None:
        self.progress.skip(trainer.global_step * self.work)

    def on_train_batch_end(self, trainer: L.Trainer, module: LanguageModel, outputs, batch, batch_idx: int) -> None:
        if (batch_idx + 1) % trainer.log_every_n_steps == 0:
            self.loss = f"loss {outputs['loss'].item():.3f}"
            self.speed = f"{module.tokens_per_s:,.0f} tokens/s"
        detail = f"step {batch_idx + 1}/{self.steps}  {self.loss}  {self.speed}"
        self.progress.show(self.name, detail, self.work)


class JSONLines(Logger):
    """metrics.jsonl: a line for each thing logged, `tokens` and the metrics. Lines past `up_to_tokens` are dropped."""

    def __init__(self, path: Path, up_to_tokens: int):
        super().__init__()
        self.path = path
        rows = [row for row in self.rows() if row["tokens"] <= up_to_tokens]
        write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows).encode())

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

    def rows(self) -> list[dict]:
        if not self.path.exists():
            return []
        rows = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # a line torn by a kill
                rows.append(json.loads(line))
        return rows

    def curve(self) -> list[dict]:
        return [
            {"tokens": row["tokens"], "val_nats": row["val/loss"], "val_bpb": row["val/bpb"]}
            for row in self.rows()
            if "val/bpb" in row
        ]


def _quiet_lightning() -> None:
    """Lightning's tips are about single runs; the study has its own display."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for text in (".*does not have many workers.*", ".*treespec, LeafSpec.*"):
        warnings.filterwarnings("ignore", text)
