"""The training of one run in its directory, repeatable and resumable.

A run writes `config.json` (what determines its result), TensorBoard events, `metrics.jsonl`, its last two checkpoints
and, when it has trained to the end, `record.json`. A run that was stopped or killed at any moment continues from its
last checkpoint to the same weights and curves: batches and dropout are functions of the seed and the step, and what was
logged after the checkpoint is deleted.
"""

import gc
import logging
import math
import shutil
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import lightning as L
import torch
from filelock import Timeout
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from train.callbacks import CheckpointAndStop, DurableCheckpoints, LogSamples, ShowProgress, save_checkpoint
from train.checkpoints import checkpoints, keep_weights, newest_whole
from train.data import DataModule
from train.errors import InputError, Interrupted, out_of_memory
from train.files import lock, read_json, write_json
from train.imported import read_weights
from train.loggers import finish, make_loggers
from train.machine import device_name, find_device
from train.module import LanguageModel, Retrofit
from train.plan import Plan, Run, step_counts
from train.progress import StudyProgress, console
from train.store import PLAN, read_plan
from train.variants import Variant
from train.workers import Outcome, Workers

LOG_POINTS = 100
TRAINED = ("params_non_embedding", "train_tokens", "train", "curve")  # what training adds to a run's settings


class InProcess(Workers):
    """Trains runs in this process, one after the other (a back end of workers.train_with)."""

    def __init__(self, plan: Plan, progress: StudyProgress):
        self.plan, self.progress, self.failed_before = plan, progress, failed_records(plan)

    def start(self, run: Run) -> "Future[Outcome] | None":
        """Trains the run to its end before it returns."""
        try:
            with lock(run.directory):
                train_if_needed(self.plan, run, self.progress, self.failed_before)
        except Timeout:
            return None
        future: Future[Outcome] = Future()
        future.set_result((0, []))
        return future


def train_one(plan: Plan, name: str) -> list[str]:
    """Trains the run that `kvfrontier status` calls `name`, once no other process does; returns a line if it failed.
    InputError if there is no such run, or if its settings come out differently on this machine than in plan.json."""
    runs = {run.name: run for run in plan.look().known_runs}
    if name not in runs:
        raise InputError(f"no run {name!r} can be trained in {plan.directory}: there are {', '.join(runs)}")
    run = runs[name]
    if run.parent and not run.parent.is_finished(run.parent.record()):
        raise InputError(f"{name} goes on from {run.parent.name}, which is not trained yet: train that first")
    planned = {entry["name"]: entry for entry in read_plan(plan.directory).get("runs", [])}
    if not planned and not rank_zero_only.rank:
        plan.save()
    if planned.get(name, {}).get("key", run.key) != run.key:
        advice = "train the changed study without --run first, or make the machines alike in corpus and train.precision"
        raise InputError(f"{name} has other settings here than in {plan.directory / PLAN}: {advice}")
    failed_before = failed_records(plan)
    with StudyProgress("training", run.variant.work) as progress:
        if rank_zero_only.rank:  # the process of a further device: the first one has the lock and writes
            return train_as_rank(plan, run, progress)
        with lock(run.directory, wait=-1):
            train_if_needed(plan, run, progress, failed_before)
    line = run.failure(run.record())
    return [line] if line else []


def train_as_rank(plan: Plan, run: Run, progress: StudyProgress) -> list[str]:
    """The part of a further device in a run. If it fails, so does the first one's process, which writes the record."""
    try:
        if not run.is_finished(run.record()):
            train_run(plan, run, progress)
    except (RuntimeError, ArithmeticError) as e:
        return [f"{run.name}, process {rank_zero_only.rank}: {(str(e) or type(e).__name__).splitlines()[0]}"]
    return []


def failed_records(plan: Plan) -> dict[Path, dict]:
    """The records, by directory, of ready runs that failed in an earlier command: they are tried again."""
    look = plan.look()
    return {run.directory: look.record(run) for run in look.ready if "failed" in look.record(run)}


def train_if_needed(plan: Plan, run: Run, progress: StudyProgress, failed_before: dict[Path, dict]) -> None:
    """Trains the run, whose lock the caller holds, unless another process has finished it, or has seen it fail since
    `failed_before` was read. A failure goes into the record; InputError if the disk cannot be written."""
    record = run.record()
    if run.is_finished(record) or ("failed" in record and record != failed_before.get(run.directory)):
        return
    try:
        if failure := train_in_pieces(plan, run, progress):
            write_json(run.directory / "record.json", {"key": run.key, **failure, "failed_at": time.time()})
            progress.say(f"{run.name} failed: {failure['failed']}")
    except OSError as e:
        problem = f"{run.name}: cannot write {e.filename or run.directory}: {e.strerror or e}"
        raise InputError(f"{problem}; what was done is kept: make room there and give the same command again") from None


def train_in_pieces(plan: Plan, run: Run, progress: StudyProgress) -> dict | None:
    """Trains a run, its batch in twice as many pieces each time that memory runs out; other runs of the variant say in
    how many to begin. Returns the record's part that says why it failed, or None."""
    config = plan.study.train
    devices = config.devices * config.num_nodes
    sequences = config.batch_tokens // run.variant.options["context"] // devices
    pieces = min(sequences, pieces_needed(plan, run.variant))
    while True:
        try:
            return train_run(plan, run, progress, pieces)
        except ArithmeticError as e:
            return {"failed": str(e), "diverged": True, "oom": False}
        except (RuntimeError, MemoryError) as e:
            message, oom = (str(e) or type(e).__name__).splitlines()[0], out_of_memory(e)
        if not oom:
            return {"failed": message, "diverged": False, "oom": False}
        if pieces == sequences or devices > 1:  # a device that retries alone would leave the others waiting
            least = "even with one sequence at a time" if pieces == sequences else f"with {sequences} on each device"
            advice = "lower model.width, model.layers or model.context, or train.batch_tokens on several devices"
            return {"failed": f"out of memory {least} ({message}); {advice}", "diverged": False, "oom": True}
        gc.collect()
        torch.cuda.empty_cache()
        pieces = min(2 * pieces, sequences)
        progress.say(f"{run.name}: out of memory; each batch now goes through the model in {pieces} pieces")


def pieces_needed(plan: Plan, variant: Variant) -> int:
    """In how many pieces the batches of the variant's finished runs went through the model on a device of this kind."""
    look, device = plan.look(), device_name(find_device())
    same = [look.record(run).get("train", {}) for run in look.known_runs if run.variant.label == variant.label]
    return max((train.get("pieces", 1) for train in same if train.get("device") == device), default=1)


def train_run(plan: Plan, run: Run, progress: StudyProgress, pieces: int = 1) -> None:
    """Trains a run from its last checkpoint, or from the start, to its end. Each device's process calls it, and the
    first one alone writes. FloatingPointError if the run diverges, Interrupted if a signal came."""
    _quiet_lightning()
    config, writes = plan.study.train, not rank_zero_only.rank
    start = prepare_directory(plan, run, progress.say) if writes else wait_for_directory(run)
    checkpoint, tokens_done = (start[0], start[1]["seen"]["tokens_seen"]) if start else (None, 0)
    steps, val_every = step_counts(run.variant.tokens, config)
    module = make_module(plan, run, steps * config.batch_tokens, pieces)
    loggers = make_loggers(run, config.loggers, tokens_done) if writes else []
    stop = CheckpointAndStop(run.directory, val_every, config.checkpoint_seconds, config.checkpoint_steps)
    callbacks = [stop, ShowProgress(progress, run.name, steps, run.variant.work / steps)]
    if run.kind == "compared" and plan.data.tokenizer:
        callbacks.append(LogSamples(plan.data.tokenizer))
    trainer = make_trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="gpu" if find_device().type == "cuda" else "cpu",
        devices=config.devices,
        num_nodes=config.num_nodes,
        strategy=config.strategy,
        precision="bf16-mixed" if run.settings["precision"] == "bf16" else "32-true",
        logger=loggers,
        log_every_n_steps=max(1, steps // LOG_POINTS),
        val_check_interval=val_every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=callbacks,
        plugins=[DurableCheckpoints()],
    )
    context = run.variant.options["context"]
    sequences = config.batch_tokens // context // (config.devices * config.num_nodes)
    batches = DataModule(plan.data, context, sequences, run.seed, config.val_tokens)
    try:
        if run.is_imported:
            trainer.validate(module, batches, verbose=False)
            progress.skip(run.variant.work)
        else:
            trainer.fit(module, batches, ckpt_path=checkpoint, weights_only=True)
    finally:
        finish(loggers)
    save_checkpoint(trainer, run.directory)
    if writes:
        write_record(run, module, loggers[-1].curve())
        keep_weights(run.directory)
        if stop.signum:  # it came at the last step
            raise Interrupted(stop.signum)


def write_record(run: Run, module: LanguageModel, curve: list[dict]) -> None:
    """Writes the record of a run that has trained to its end. FloatingPointError if its last validation diverged."""
    if not math.isfinite(curve[-1]["val_nats"]):
        raise FloatingPointError(f"the validation loss is {curve[-1]['val_nats']}; try a lower learning rate")
    train = {
        "tokens_per_s": module.tokens_per_s,
        "mfu": module.mfu(module.tokens_per_s),
        "seconds": module.train_seconds,
        "lr": run.lr,
        **run.variant.recipe,
        "warmup_tokens": module.hparams.warmup_tokens,
        "checkpoint_seconds": module.checkpoint_seconds,
        "pieces": module.hparams.pieces,
        "backend": module.backend,
        "device": device_name(module.trainer.strategy.root_device),
        "flops_per_token": 3 * module.model.flops_per_token(run.variant.options["context"]),
    }
    values = module.model.count_params(embedding=False), module.tokens_seen, train, curve
    write_json(run.directory / "record.json", run.settings | dict(zip(TRAINED, values, strict=True)))


def trained_weights(run: Run) -> dict[str, torch.Tensor]:
    """The state dict of the run's LanguageModel at the end of its training. RuntimeError if it is missing."""
    newest = newest_whole(run.directory, console.print)
    if not newest or newest[1]["seen"]["tokens_seen"] != run.record().get("train_tokens"):
        raise RuntimeError(f"its last checkpoint is missing or damaged; delete {run.directory} to train it again")
    return newest[1]["state_dict"]


def make_module(plan: Plan, run: Run, tokens: int, pieces: int) -> LanguageModel:
    """The module to train for `tokens`, with initial weights or, of a retrofit, its parent's."""
    config = plan.study.train
    recipe = run.variant.recipe | {"tokens": tokens, "lr": run.lr, "seed": run.seed, "pieces": pieces}
    recipe |= {"weight_decay": config.weight_decay, "clip": config.clip, "document_end": plan.document_end}
    recipe["warmup_tokens"] = min(recipe["warmup_tokens"], tokens // 2)  # else a short run would never reach its rate
    arch, options, technique = run.variant.arch, run.variant.options, run.technique
    if not technique:
        module = LanguageModel(arch, options, **recipe)
        if run.is_imported:
            read_weights(module.model, arch, Path(run.variant.weights["folder"]))
        return module
    recipe["warmup_tokens"] = tokens // 20
    plain = technique.is_full  # it is only trained further, to be compared with the others
    module = LanguageModel(arch, options, **recipe) if plain else Retrofit(technique, arch, options, **recipe)
    module.load_state_dict(trained_weights(run.parent))
    return module


def make_trainer(**arguments: Any) -> L.Trainer:
    """InputError if Lightning refuses a study's devices or strategy."""
    try:
        return L.Trainer(**arguments)
    except (ValueError, TypeError, ImportError, RuntimeError, MisconfigurationException) as e:
        devices, nodes, strategy = (arguments[name] for name in ("devices", "num_nodes", "strategy"))
        message = " ".join(str(e).split())
        raise InputError(f"train.devices={devices}, num_nodes={nodes}, strategy={strategy!r}: {message}") from None


def prepare_directory(plan: Plan, run: Run, say: Callable[[str], object]) -> tuple[Path, dict] | None:
    """(path, content) of the checkpoint from which the run continues. None if it starts from the beginning, in an empty
    directory with config.json; `say` gets a line that says why a run starts over."""
    if read_json(run.directory / "config.json").get("key") == run.key:
        checkpoint = newest_whole(run.directory, say)
        if checkpoint and "optimizer_states" in checkpoint[1]:
            (run.directory / "record.json").unlink(missing_ok=True)  # the run failed, and is tried again
            return checkpoint
        if checkpoints(run.directory):
            why = "only weights are left of its checkpoints" if checkpoint else "no checkpoint is whole"
            say(f"{run.name}: {why}; the run starts over")
    elif because := plan.stale_because(run):
        say(f"{run.name} starts over: {because}")
    shutil.rmtree(run.directory, ignore_errors=True)
    write_json(run.directory / "config.json", plan.config(run))
    return None


def wait_for_directory(run: Run) -> tuple[Path, dict] | None:
    """The same checkpoint in the process of a further device, once the first one has prepared the directory."""
    for _ in range(600):
        if read_json(run.directory / "config.json").get("key") == run.key:
            return newest_whole(run.directory, lambda line: None)
        time.sleep(0.1)
    raise RuntimeError(f"{run.directory} was not prepared by the first process: do all machines share it?")


def _quiet_lightning() -> None:
    """Silences Lightning's tips, which are about single runs: the study has its own display."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers.*|.*treespec, LeafSpec.*")
