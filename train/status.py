"""plan.json, which says in a study's directory what was asked for, and how far each of its runs is.

With it a stage can be given the directory alone, and `kvfrontier status` answers without loading a corpus or torch.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from train.errors import InputError
from train.files import is_locked, read_json, read_rows, write_json
from train.progress import duration

if TYPE_CHECKING:
    from train.plan import Plan

PLAN = "plan.json"


def write_plan(study: str, study_file: Path, plan: "Plan") -> None:
    """`study_file` is what the study's paths are relative to. InputError where it can't be written."""
    from train.plan import stale_because, step_counts

    runs = []
    for run in plan.known_runs():
        entry = {
            "name": run.name,
            "directory": run.directory.relative_to(plan.directory).as_posix(),
            "key": run.key,
            "eval_key": run.eval_key if run.compared else None,
            "steps": step_counts(run.variant.tokens, plan.study.train)[0],
        }
        because = stale_because(run, plan.study.train, plan.data)
        runs.append(entry | ({"stale": because} if because else {}))
    waiting = [f"{v.label} seed {seed}" for v in plan.variants for seed in plan.study.seeds if not plan.run(v, seed)]
    content = {
        "study": study,
        "study_file": str(study_file.resolve()),
        "settings": plan.study.settings(),
        "runs": runs + [{"name": name} for name in waiting],
    }
    try:
        write_json(plan.directory / PLAN, content)
    except OSError as e:
        raise InputError(f"cannot write to {plan.directory}: {e.strerror}; choose another place with --out") from None


def read_plan(directory: Path) -> dict:
    """{} without one. InputError for one that no kvfrontier has written."""
    plan = read_json(directory / PLAN)
    if (directory / PLAN).exists() and not _is_plan(plan):
        raise InputError(f"{directory / PLAN} is damaged: give the study's YAML file with --out {directory}")
    return plan


def _is_plan(plan: dict) -> bool:
    try:
        whole = isinstance(plan["settings"]["train"]["batch_tokens"], int) and isinstance(plan["study_file"], str)
        keys = "directory", "key", "eval_key", "steps"
        runs = [run for run in plan["runs"] if "directory" in run]
        return whole and all(run["name"] for run in plan["runs"]) and all(key in run for run in runs for key in keys)
    except (KeyError, TypeError):
        return False


def states(directory: Path) -> dict[str, str]:
    """Of each run by name: done, running (step, time left), failed (why) and so on. InputError without a plan.json."""
    plan = read_plan(directory)
    if "runs" not in plan:
        raise InputError(f"{directory} is no study's directory: it has no {PLAN}")
    return {run["name"]: _state(directory, run, plan["settings"]["train"]["batch_tokens"]) for run in plan["runs"]}


def _state(directory: Path, run: dict, batch_tokens: int) -> str:
    if "directory" not in run:
        return "waiting for its learning rate"
    folder = directory / run["directory"]
    record = read_json(folder / "record.json")
    if record.get("key") == run["key"]:
        if "failed" in record:
            return f"failed: {record['failed']}"
        done = run["eval_key"] in (None, record.get("eval_key"))  # of runs that are not compared
        return "done" if done else "trained, not evaluated"
    if read_json(folder / "config.json").get("key") != run["key"]:
        return f"stale: {run['stale']}" if "stale" in run else "missing"
    tokens, speed = progress_of(folder)
    step = f"step {tokens // batch_tokens} of {run['steps']}"
    if not is_locked(folder):
        return f"interrupted: {step}"
    left = run["steps"] * batch_tokens - tokens
    return f"running: {step}" + (f", {duration(left / speed)} left" if speed else "")


def progress_of(folder: Path) -> tuple[int, float]:
    """(tokens, tokens a second) of a run's last log."""
    rows = read_rows(folder / "metrics.jsonl")
    speed = next((row["train/tokens_per_s"] for row in reversed(rows) if row.get("train/tokens_per_s")), 0.0)
    return max((row["tokens"] for row in rows), default=0), speed
