"""The eval stage: from each trained run's checkpoint to its record.

A measure is a module of this package with a function `measure(subject) -> dict`, whose result goes into the record; two
objects under the same key are merged. With `REPEATED = True` it is called in every round, for what is timed.
"""

import contextlib
import functools
import importlib
from types import ModuleType

from filelock import Timeout

from archs import Decoder
from archs.techniques import Technique
from eval import measure_names
from eval.speed import measure_roof
from eval.subject import DTYPES, EvalContext
from train.files import lock, read_json, write_json
from train.machine import describe_machine, find_device, resolve_dtype
from train.plan import Plan, Run, Snapshot
from train.progress import StudyProgress, console
from train.runner import TRAINED, trained_weights
from train.trained import restore, untrained

FIRST_ROUND = "evaluation.json"  # in a run's directory between the rounds
ROUNDS = 2  # each times all runs: a machine that is slow for a minute then does not decide between variants


def measures() -> list[ModuleType]:
    return [importlib.import_module(f"{__package__}.{name}") for name in measure_names()]


def evaluate_runs(plan: Plan) -> list[str]:
    """Evaluates what is trained and not evaluated with these settings yet; returns a line for each run that failed.

    One process does so at a time, because timings need the machine for themselves; another process waits for it.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock(plan.directory / "evaluation"))
        except Timeout:
            console.print(f"waiting for another kvfrontier process, which evaluates {plan.directory}", soft_wrap=True)
            stack.enter_context(lock(plan.directory / "evaluation", wait=-1))
        return _evaluate_runs(plan)


def is_trained(look: Snapshot, run: Run) -> bool:
    """True if the run and its retrofits are trained, except for retrofits that failed."""
    retrofits = map(look.record, look.plan.retrofits(run))
    return "train" in look.record(run) and all("train" in r or "failed" in r for r in retrofits)


def _evaluate_runs(plan: Plan) -> list[str]:
    device, dtype, look = find_device(), DTYPES[resolve_dtype(plan.study.eval.dtype)], plan.look()
    pending = [run for run in look.runs if is_trained(look, run) and not look.is_evaluated(run)]
    states = {run.directory: {"eval_key": look.eval_key(run), "measured_on": describe_machine()} for run in pending}
    once = [module for module in measures() if not getattr(module, "REPEATED", False)]
    repeated = [module for module in measures() if getattr(module, "REPEATED", False)]
    measured = {run.directory: _first_round(run, states[run.directory]) for run in pending}
    waiting = [run for run in look.runs if run.is_finished(look.record(run)) and not is_trained(look, run)]
    failures = [f"{run.name} is not evaluated: its retrofits (eval.techniques) are not trained yet" for run in waiting]
    with StudyProgress("evaluating", len(pending) * (len(once) + ROUNDS * len(repeated))) as progress:
        roof = 0.0
        for turn in range(ROUNDS):
            roof = max(roof, measure_roof(device))
            for number, run in enumerate(pending, 1):
                if run.directory not in measured:
                    continue
                known = measured[run.directory]
                if turn == 0 and known:  # an evaluation was interrupted after this round
                    progress.skip(len(once) + len(repeated))
                    continue
                show = functools.partial(progress.show, f"{number}/{len(pending)} {run.name}", work=0)
                try:
                    model = load_model(run).to(device)
                    retrofit = functools.partial(load_retrofit, look, run)
                    how = dtype, roof, show, known, run.seed, retrofit, plan.document_end
                    context = EvalContext(model, plan.data, plan.study.eval, *how)
                    for module in [] if turn else once:
                        merge(known, module.measure(context))
                        progress.done += 1
                    model.to(dtype)
                    for module in repeated:
                        merge(known, module.measure(context))
                        progress.done += 1
                except Exception as e:  # no memory, wrong bytes, a broken file or measure: the other runs go on
                    del measured[run.directory]
                    failures.append(f"{run.name} could not be evaluated: {_in_a_line(e)}")
                    progress.say(failures[-1])
                    continue
                if turn < ROUNDS - 1:
                    write_json(run.directory / FIRST_ROUND, states[run.directory] | {"measured": known})
                    continue
                # What an evaluation with other settings measured does not belong to this study.
                kept = {k: v for k, v in run.record().items() if k in TRAINED or k.startswith("lm_eval")}
                record = kept | known | run.settings | states[run.directory]
                write_json(run.directory / "record.json", record)
                (run.directory / FIRST_ROUND).unlink(missing_ok=True)
    return failures


def _first_round(run: Run, state: dict) -> dict:
    """What an interrupted evaluation has measured of the run with these settings on such a machine; {} without one."""
    content = read_json(run.directory / FIRST_ROUND)
    measured = content.pop("measured", {})
    return measured if content == state else {}


def _in_a_line(error: Exception) -> str:
    message = str(error).splitlines()[0] if str(error) else ""
    return message if isinstance(error, RuntimeError | OSError) and message else f"{type(error).__name__}: {message}"


def merge(record: dict, measured: dict) -> None:
    """Puts what was measured into the record; where both have an object under a key, the record gets its entries."""
    for key, value in measured.items():
        both = isinstance(value, dict) and isinstance(record.get(key), dict)
        record[key] = record[key] | value if both else value


def load_model(run: Run) -> Decoder:
    """The run's trained model on the CPU, in evaluation mode."""
    return restore(untrained(run.variant.arch, run.variant.options, run.technique), trained_weights(run))


def load_retrofit(look: Snapshot, run: Run, technique: Technique) -> Decoder:
    """The model that was trained further from a run for a technique. ValueError if its training failed."""
    retrofit = next(r for r in look.plan.retrofits(run) if r.technique == technique)
    record = look.record(retrofit)
    if "train" not in record:
        raise ValueError(f"its training failed: {record.get('failed')}")
    return load_model(retrofit)
