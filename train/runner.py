"""The train stage: every run of a study that is not done yet, each in its own directory, repeatable and resumable.

A run writes `config.json` (what decides its result), TensorBoard events, `metrics.jsonl`, its last two checkpoints and,
when it has trained to the end, `record.json`. A run whose directory has another key starts over.

A run that was stopped or killed at any moment goes on from its last checkpoint to the same weights and curves: batches
and dropout are functions of the seed and the place in the run, and what was logged after the checkpoint is dropped.
"""

import gc
import json
import logging
import math
import os
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from filelock import Timeout
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from train.checkpoints import DurableCheckpoints, checkpoint_path, checkpoints, newest_whole, trained_weights
from train.data import TextData
from train.errors import InputError, Interrupted, out_of_memory
from train.files import (
    device_name,
    is_finished,
    lock,
    read_json,
    read_record,
    read_rows,
    write_atomic,
    write_json,
)
from train.module import LanguageModel
from train.mqar import RecallTask
from train.plan import Plan, Run, failure, find_device, settings, stale_because, step_counts
from train.progress import StudyProgress
from train.retrofit import Retrofit
from train.status import PLAN, read_plan
from train.study import TrainConfig
from train.tokens import TokenSet

SECONDS_OF_ONE_SIGNAL = 2  # `timeout` and others send one to a process and to its group: it comes twice
STEPS_BETWEEN_DECISIONS = 10  # of several devices, which then wait for each other
LOG_POINTS = 100


def train_runs(plan: Plan, record_plan: Callable[[], object] = lambda: None) -> list[str]:
    """Trains what is not trained yet, one run after the other; returns a line for each that failed. Interrupted if a
    signal came.

    Runs that another process trains are left to it, and waited for at the end. `record_plan` is called when a learning
    rate has been tried: there may be more runs then.
    """
    tried: set[Path] = set()
    before = failed_before(plan)
    waits = False
    with StudyProgress("training", 0) as progress:
        while runs := [run for run in plan.ready() if run.directory not in tried]:
            left = plan.left()
            progress.left(sum(variant.work for variant in left))
            name = f"{len(tried) + 1}/{len(tried) + len(left)}"
            for run in runs:
                try:
                    with lock(run.directory):
                        train_if_needed(plan, run, progress, f"{name} {run.name}", before)
                except Timeout:
                    continue
                tried.add(run.directory)
                if run.tunes:
                    record_plan()
                break
            else:
                if not waits:
                    names = ", ".join(run.name for run in runs)
                    progress.say(f"waiting for another kvfrontier process in {plan.directory}, at work on {names}")
                waits = True
                time.sleep(1)
    return plan.failures()


def train_one(plan: Plan, name: str, record_plan: Callable[[], object]) -> list[str]:
    """Trains the run that `kvfrontier status` calls `name`, once no other process does; returns a line if it failed.

    `record_plan` is called where there is no plan.json yet. InputError where there is no such run, or where its
    settings come out as others on this machine than in plan.json.
    """
    runs = {run.name: run for run in plan.known_runs()}
    if name not in runs:
        raise InputError(f"no run {name!r} can be trained in {plan.directory}: there are {', '.join(runs)}")
    run = runs[name]
    if run.of and not is_finished(run.of):
        raise InputError(f"{name} goes on from {run.of.name}, which is not trained yet: train that first")
    planned = {entry["name"]: entry for entry in read_plan(plan.directory).get("runs", [])}
    if not planned and not rank_zero_only.rank:
        record_plan()
    if planned.get(name, {}).get("key", run.key) != run.key:
        raise InputError(
            f"{name} has other settings here than in {plan.directory / PLAN}: give kvfrontier train the changed study "
            "without --run first; or, where machines differ in corpus or in what train.precision=auto picks, make them "
            "alike"
        )
    before = failed_before(plan)
    with StudyProgress("training", run.variant.work) as progress:
        if rank_zero_only.rank:  # a process of a further device: the first one has the lock and writes
            return [] if is_finished(run) else train_further(plan, run, progress)
        with lock(run.directory, wait=-1):
            train_if_needed(plan, run, progress, name, before)
    line = failure(run)
    return [line] if line else []


def train_further(plan: Plan, run: Run, progress: StudyProgress) -> list[str]:
    """A further device's part of a run; what goes wrong is also the first one's, which writes the record."""
    try:
        train_run(run, plan.study.train, plan.data, progress, run.name)
    except (RuntimeError, ArithmeticError) as e:
        return [f"{run.name}, process {rank_zero_only.rank}: {(str(e) or type(e).__name__).splitlines()[0]}"]
    return []


def failed_before(plan: Plan) -> dict[Path, dict]:
    """The records of runs that failed in an earlier command: they are tried again."""
    records = {run.directory: read_record(run) for run in plan.ready()}
    return {directory: record for directory, record in records.items() if "failed" in record}


def train_if_needed(plan: Plan, run: Run, progress: StudyProgress, name: str, before: dict[Path, dict]) -> None:
    """To be called with the run's lock: another process may just have finished it, or failed, where its record is not
    as it was `before`. What goes wrong with the run alone is written into its record; InputError where nothing can be
    written."""
    record = read_record(run)
    if is_finished(run) or ("failed" in record and record != before.get(run.directory)):
        return
    try:
        if failed := train_in_pieces(plan, run, progress, name):
            write_json(run.directory / "record.json", {"key": run.key, **failed, "failed_at": time.time()})
            progress.say(f"{run.name} failed: {failed['failed']}")
    except OSError as e:
        where = e.filename or run.directory
        raise InputError(
            f"{run.name}: cannot write {where}: {e.strerror or e}; what was done is kept: make room there and give the "
            "same command again"
        ) from None


def train_in_pieces(plan: Plan, run: Run, progress: StudyProgress, name: str) -> dict | None:
    """Trains a run, its batch in as many pieces as memory demands; why that was not possible, for its record."""
    config = plan.study.train
    devices = config.devices * config.num_nodes
    sequences, pieces = config.batch_tokens // run.variant.options["context"] // devices, 1
    while True:
        try:
            return train_run(run, config, plan.data, progress, name, pieces)
        except ArithmeticError as e:
            return {"failed": str(e), "diverged": True, "oom": False}
        except (RuntimeError, MemoryError) as e:
            why, oom = (str(e) or type(e).__name__).splitlines()[0], out_of_memory(e)
        if not oom:
            return {"failed": why, "diverged": False, "oom": False}
        if pieces == sequences or devices > 1:  # a device that stops alone leaves the others waiting
            least = "even with one sequence at a time" if pieces == sequences else f"with {sequences} on each device"
            advice = "lower model.width, model.layers or model.context, or train.batch_tokens on several devices"
            return {"failed": f"out of memory {least} ({why}); {advice}", "diverged": False, "oom": True}
        gc.collect()
        torch.cuda.empty_cache()
        pieces = min(2 * pieces, sequences)
        progress.say(f"{run.name}: out of memory; each batch now goes through the model in {pieces} pieces")


def train_run(
    run: Run,
    config: TrainConfig,
    data: TokenSet | RecallTask,
    progress: StudyProgress,
    name: str,
    pieces: int = 1,
) -> None:
    """Trains one run from its last checkpoint, or from the start, to its end.

    On several devices each process calls it for the same run, and the first one (rank 0) alone writes.
    """
    _quiet_lightning()
    writes = not rank_zero_only.rank
    found = prepare_directory(run, config, data, progress.say) if writes else find_checkpoint(run)
    checkpoint, tokens_done = (found[0], found[1]["seen"]["tokens_seen"]) if found else (None, 0)
    steps, val_every = step_counts(run.variant.tokens, config)
    module = make_module(run, config, steps * config.batch_tokens, pieces)
    context = run.variant.options["context"]
    loggers = []
    if writes:
        metrics = JSONLines(run.directory / "metrics.jsonl", up_to_tokens=tokens_done)
        purge = tokens_done + 1 if tokens_done else None
        tensorboard = TensorBoardLogger(run.directory, name="", version="", default_hp_metric=False, purge_step=purge)
        loggers = [tensorboard, metrics]
    keep_going = KeepGoing(run.directory, val_every, config.checkpoint_seconds, config.checkpoint_steps)
    trainer = make_trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="gpu" if find_device().type == "cuda" else "cpu",
        devices=config.devices,
        num_nodes=config.num_nodes,
        strategy=config.strategy,
        precision="bf16-mixed" if run.precision == "bf16" else "32-true",
        logger=loggers,
        log_every_n_steps=max(1, steps // LOG_POINTS),
        val_check_interval=val_every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[keep_going, ShowProgress(progress, name, steps, run.variant.work / steps)],
        plugins=[DurableCheckpoints()],
    )
    of_device = config.batch_tokens // context // (config.devices * config.num_nodes)
    batches = TextData(data, context, of_device, run.seed, config.val_tokens)
    trainer.fit(module, batches, ckpt_path=checkpoint, weights_only=True)
    save(trainer, run.directory)
    if not writes:
        return
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
                "checkpoint_seconds": module.checkpoint_seconds,
                "device": device_name(trainer.strategy.root_device),
                "flops_per_token": 3 * module.model.flops_per_token(context),
            },
            "curve": curve,
        },
    )
    if keep_going.signum:  # it came at the last step
        raise Interrupted(keep_going.signum)


def make_module(run: Run, config: TrainConfig, tokens: int, pieces: int) -> LanguageModel:
    """With first weights, or those of the run that it goes on from. RuntimeError where these are missing."""
    warmup = min(config.warmup_tokens, tokens // 2)  # or a short run would never reach its rate
    recipe = {"tokens": tokens, "lr": run.lr, "warmup_tokens": warmup, "seed": run.seed, "pieces": pieces}
    recipe |= {"weight_decay": config.weight_decay, "clip": config.clip}
    arch, options = run.variant.arch, run.variant.options
    if not run.dmc:
        return LanguageModel(arch, options, **recipe)
    recipe["warmup_tokens"] = tokens // 20
    merges = run.dmc.merges
    module = (
        Retrofit(arch, options, budget=run.dmc.budget, **recipe) if merges else LanguageModel(arch, options, **recipe)
    )
    module.load_state_dict(trained_weights(run.of))
    return module


def make_trainer(**arguments: Any) -> L.Trainer:
    """InputError where it does not take a study's devices or strategy."""
    try:
        return L.Trainer(**arguments)
    except (ValueError, TypeError, ImportError, RuntimeError, MisconfigurationException) as e:
        devices, nodes, strategy = (arguments[name] for name in ("devices", "num_nodes", "strategy"))
        said = " ".join(str(e).split())
        raise InputError(f"train.devices={devices}, num_nodes={nodes}, strategy={strategy!r}: {said}") from None


def prepare_directory(
    run: Run, config: TrainConfig, data: TokenSet | RecallTask, say: Callable[[str], object]
) -> tuple[Path, dict] | None:
    """Makes a run's directory ready; the checkpoint that it goes on from, where there is one."""
    if read_json(run.directory / "config.json").get("key") == run.key:
        if found := newest_whole(run.directory, say):
            (run.directory / "record.json").unlink(missing_ok=True)  # it failed, and is tried again
            return found
        if checkpoints(run.directory):
            say(f"{run.name}: no checkpoint is whole; the run starts over")
    elif because := stale_because(run, config, data):
        say(f"{run.name} starts over: {because}")
    shutil.rmtree(run.directory, ignore_errors=True)
    write_json(run.directory / "config.json", settings(run, config, data))
    return None


def find_checkpoint(run: Run) -> tuple[Path, dict] | None:
    """What `prepare_directory` found, in the process of a further device; RuntimeError where it was never called."""
    for _ in range(600):
        if read_json(run.directory / "config.json").get("key") == run.key:
            return newest_whole(run.directory, lambda line: None)
        time.sleep(0.1)
    raise RuntimeError(f"{run.directory} was not prepared by the first process: do all machines share it?")


def save(trainer: L.Trainer, directory: Path) -> None:
    """Writes a checkpoint, after what was logged: a run that goes on from it logs none of that again."""
    module = trainer.lightning_module
    if trainer.training:
        module.tick(wait=True)
    started = time.perf_counter()
    for logger in trainer.loggers:
        logger.save()
    trainer.save_checkpoint(checkpoint_path(directory, trainer.global_step))
    module.checkpoint_seconds += time.perf_counter() - started
    if trainer.training:
        module.tick(counts=False)


class KeepGoing(L.Callback):
    """Writes a checkpoint every so many seconds or steps and when a signal asks to stop; a second signal stops at once.

    Not at a step that is validated: the validation comes after it and would be missing when the run goes on. Several
    devices do what the first one decides, every tenth step.
    """

    def __init__(self, directory: Path, val_every: int, seconds: float, steps: int | None):
        self.directory, self.val_every, self.seconds, self.steps = directory, val_every, seconds, steps
        self.signum: int | None = None
        self.stepped = False
        self.handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, module: LanguageModel) -> None:
        self.saved, self.saved_step = time.monotonic(), trainer.global_step
        if threading.current_thread() is threading.main_thread():
            self.handlers = {s: signal.signal(s, self._stop) for s in (signal.SIGINT, signal.SIGTERM)}

    def _stop(self, signum: int, frame: Any) -> None:
        again = self.signum and time.monotonic() - self.asked > SECONDS_OF_ONE_SIGNAL
        if again or not self.stepped:  # there is nothing new to keep; the first step may compile for a minute
            raise Interrupted(signum)
        if not self.signum:
            self.signum, self.asked = signum, time.monotonic()

    def on_train_batch_end(self, trainer: L.Trainer, module: LanguageModel, outputs, batch, batch_idx: int) -> None:
        self.stepped = True
        if (batch_idx + 1) % self.val_every == 0:
            return
        due = time.monotonic() - self.saved > self.seconds
        due |= bool(self.steps) and trainer.global_step - self.saved_step >= self.steps
        signum = self.signum
        if trainer.world_size > 1:
            if (batch_idx + 1) % self.val_every % STEPS_BETWEEN_DECISIONS != 1:  # never a step that is validated
                return
            signum, due = trainer.strategy.broadcast((signum, due))
        if signum or due:
            save(trainer, self.directory)
            self.saved, self.saved_step = time.monotonic(), trainer.global_step
        if signum:
            raise Interrupted(signum)

    def on_train_end(self, trainer: L.Trainer, module: LanguageModel) -> None:
        """Before Lightning, too, takes its handlers back: in its teardown that has happened already."""
        for signum, handler in self.handlers.items():
            signal.signal(signum, handler)
        self.handlers = {}

    def on_exception(self, trainer: L.Trainer, module: LanguageModel, exception: BaseException) -> None:
        self.on_train_end(trainer, module)


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
        return read_rows(self.path)

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
