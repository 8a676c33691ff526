"""The eval stage: from each trained run's checkpoint to its record.

A measure is a module of this package with a function `measure(subject) -> dict`, whose result goes into the record; two
that give the same key are merged. With `REPEATED = True` it is called again in every round, for what is timed.
"""

import contextlib
import functools
import importlib
import pkgutil
from pathlib import Path
from types import ModuleType

import torch
from filelock import Timeout
from lightning.pytorch.loggers import TensorBoardLogger

from archs import Decoder, build
from archs.techniques.dmc import DMC, merging
from eval.speed import measure_roof
from eval.subject import Subject
from train.checkpoints import trained_weights
from train.files import describe_machine, is_evaluated, lock, read_json, read_record, write_json
from train.plan import Plan, Run, find_device, resolve_dtype
from train.progress import StudyProgress, console

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
FIRST_ROUND = "evaluation.json"  # in a run's directory between the rounds
ROUNDS = 2  # of timing, all runs in each: a machine that is slow for a minute then does not decide between variants


def measures() -> list[ModuleType]:
    names = sorted(module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]))
    modules = [importlib.import_module(f"eval.{name}") for name in names]
    return [module for module in modules if hasattr(module, "measure")]


def evaluate_runs(plan: Plan) -> list[str]:
    """Evaluates what is trained and not evaluated with these settings yet; returns a line for each run that failed.

    One process does at a time, as what is timed is to have the machine for itself; another one waits for it.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock(plan.directory / "evaluation"))
        except Timeout:
            console.print(f"waiting for another kvfrontier process, which evaluates {plan.directory}", soft_wrap=True)
            stack.enter_context(lock(plan.directory / "evaluation", wait=-1))
        return _evaluate_runs(plan)


def _evaluate_runs(plan: Plan) -> list[str]:
    device, dtype = find_device(), DTYPES[resolve_dtype(plan.study.eval.dtype)]
    pending = [run for run in plan.runs() if is_trained(plan, run) and not is_evaluated(run)]
    once = [module for module in measures() if not getattr(module, "REPEATED", False)]
    repeated = [module for module in measures() if getattr(module, "REPEATED", False)]
    measured: dict[Path, dict] = {run.directory: _first_round(run) for run in pending}
    waiting = [run for run in plan.runs() if "train" in read_record(run) and not is_trained(plan, run)]
    failures = [f"{run.name} is not evaluated: what DMC trains further is not trained yet" for run in waiting]
    with StudyProgress("evaluating", len(pending) * (len(once) + ROUNDS * len(repeated))) as progress:
        roof = 0.0
        for turn in range(ROUNDS):
            roof = max(roof, measure_roof(device))
            for number, run in enumerate(pending, 1):
                if run.directory not in measured:
                    continue
                known = measured[run.directory]
                if turn == 0 and known:  # an evaluation that was interrupted has got so far
                    progress.skip(len(once) + len(repeated))
                    continue
                show = functools.partial(progress.show, f"{number}/{len(pending)} {run.name}", work=0)
                try:
                    model = load_model(run).to(device)
                    retrofit = functools.partial(load_retrofit, plan, run)
                    subject = Subject(model, plan.data, plan.study.eval, dtype, roof, show, known, run.seed, retrofit)
                    for module in [] if turn else once:
                        merge(known, module.measure(subject))
                        progress.done += 1
                    model.to(dtype)
                    for module in repeated:
                        merge(known, module.measure(subject))
                        progress.done += 1
                except Exception as e:  # no memory, bytes that differ, a broken file or measure: the others go on
                    del measured[run.directory]
                    failures.append(f"{run.name} could not be evaluated: {_in_a_line(e)}")
                    progress.say(failures[-1])
                    continue
                if turn < ROUNDS - 1:
                    write_json(run.directory / FIRST_ROUND, _state(run) | {"measured": known})
                    continue
                facts = run.settings() | _state(run)
                record = read_record(run) | known | facts
                _log_hyperparameters(run, record)
                write_json(run.directory / "record.json", record)
                (run.directory / FIRST_ROUND).unlink(missing_ok=True)
    return failures


def is_trained(plan: Plan, run: Run) -> bool:
    """With all that goes on from it, as far as that can be trained."""
    further = map(read_record, plan.retrofits(run))
    return "train" in read_record(run) and all("train" in record or "failed" in record for record in further)


def _first_round(run: Run) -> dict:
    """What an interrupted evaluation with these settings on such a machine has measured; {} where there was none."""
    found = read_json(run.directory / FIRST_ROUND)
    measured = found.pop("measured", {})
    return measured if found == _state(run) else {}


def _state(run: Run) -> dict:
    return {"eval_key": run.eval_key, "measured_on": describe_machine()}


def _in_a_line(error: Exception) -> str:
    said = str(error).splitlines()[0] if str(error) else ""
    return said if isinstance(error, RuntimeError | OSError) and said else f"{type(error).__name__}: {said}"


def merge(record: dict, measured: dict) -> None:
    """Of a key that both have as an object, the record then has all entries."""
    for key, value in measured.items():
        both = isinstance(value, dict) and isinstance(record.get(key), dict)
        record[key] = record[key] | value if both else value


def load_model(run: Run) -> Decoder:
    """The trained model on the CPU, in evaluation mode."""
    model = build(run.variant.arch, **run.variant.options)
    weights = trained_weights(run)
    model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in weights.items()})
    return model.eval()


def load_retrofit(plan: Plan, run: Run, dmc: DMC) -> Decoder:
    """The model that was trained on from a run to merge its cache. ValueError where there is none."""
    for retrofit in plan.retrofits(run):
        if retrofit.dmc == dmc:
            record = read_record(retrofit)
            if "train" not in record:
                raise ValueError(f"its training failed: {record.get('failed')}")
            model = load_model(retrofit)
            return merging(model) if dmc.merges else model
    raise ValueError(f"DMC merges keys and values of KV heads, which {run.variant.arch} does not keep")


def _log_hyperparameters(run: Run, record: dict) -> None:
    """What was built and how it came out, as a row of TensorBoard's HParams table."""
    for old in run.directory.glob("*.final"):
        old.unlink()
    logger = TensorBoardLogger(run.directory, name="", version="", default_hp_metric=False, filename_suffix=".final")
    settings = {name: record[name] for name in ("label", "arch", "seed", "params")} | {"lr": record["train"]["lr"]}
    metrics = {
        "final/val_bpb": record["loss"]["val_bpb"],
        "final/val_nats": record["loss"]["val_nats"],
        "final/kv_bytes_per_token": record["kv"]["bytes_per_token"],
        "final/train_tokens_per_s": record["train"]["tokens_per_s"],
    }
    if record["decode"]:
        metrics["final/decode_tokens_per_s"] = record["decode"][-1]["tokens_per_s"]
    logger.log_hyperparams(settings | run.variant.options, metrics, step=record["train_tokens"])
    logger.finalize("success")
