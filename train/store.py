"""The directory of a study: where it is, the plan.json in it, and the state of each of its runs.

plan.json holds the study's settings and its runs (see `Plan.save`). With it a command needs the directory alone, and
`kvfrontier status` answers without loading a corpus or torch.
"""

import contextlib
from pathlib import Path

from train.errors import InputError
from train.files import is_locked, read_json, read_rows
from train.progress import duration

PLAN = "plan.json"
RESULTS = "results.json"
STUDIES = Path(__file__).resolve().parent.parent / "studies"


def find_study(name: str) -> Path:
    """The YAML file of a study: its path, or its name in studies/. InputError if there is none."""
    for path in (Path(name), STUDIES / f"{name}.yaml"):
        with contextlib.suppress(OSError):  # the name is too long for a path
            if path.is_file():
                return path
    shipped = ", ".join(sorted(p.stem for p in STUDIES.glob("*.yaml")))
    raise InputError(f"no study {name!r}: give the path of a YAML file or one of {shipped}")


def find_directory(study: str, out: Path | None) -> tuple[Path, Path | None]:
    """(directory, YAML file) that a command's STUDY and --out mean; the file is None where STUDY is a directory.
    Without --out the results go to runs/<name of the file>. InputError if they cannot go there."""
    path = Path(study).parent if Path(study).name == RESULTS else Path(study)
    if (path / PLAN).is_file() or (path / RESULTS).is_file():
        if out:
            raise InputError(f"--out does not go with {path}, which is a study's directory already")
        return path, None
    file = find_study(study)
    directory = out or Path("runs") / file.stem
    other = Path(str(read_json(directory / PLAN).get("study_file", file)))
    if not out and other.is_file() and not other.samefile(file):
        raise InputError(f"{directory} has the runs of {other}, another study; name another directory with --out")
    return directory, file


def read_plan(directory: Path) -> dict:
    """The content of plan.json, {} without one. InputError if kvfrontier cannot have written it."""
    plan = read_json(directory / PLAN)
    if (directory / PLAN).exists() and not _is_plan(plan):
        raise InputError(f"{directory / PLAN} is damaged: give the study's YAML file with --out {directory}")
    return plan


def _is_plan(plan: dict) -> bool:
    keys = {"name", "key", "eval_key", "steps"}
    try:
        settings = isinstance(plan["settings"]["train"]["batch_tokens"], int) and isinstance(plan["study_file"], str)
        return settings and all("directory" not in run or keys <= run.keys() for run in plan["runs"])
    except (KeyError, TypeError, AttributeError):
        return False


def states(directory: Path) -> dict[str, str]:
    """The state of each run by name, such as `running: step 3 of 9, 0:20 left`. InputError without a plan.json."""
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
        done = run["eval_key"] in (None, record.get("eval_key"))  # None: this run is not evaluated
        return "done" if done else "trained, not evaluated"
    if read_json(folder / "config.json").get("key") != run["key"]:
        return f"stale: {run['stale']}" if "stale" in run else "missing"
    tokens, speed = logged_progress(folder)
    step = f"step {tokens // batch_tokens} of {run['steps']}"
    if not is_locked(folder):
        return f"interrupted: {step}"
    left = run["steps"] * batch_tokens - tokens
    return f"running: {step}" + (f", {duration(left / speed)} left" if speed else "")


def logged_progress(folder: Path) -> tuple[int, float]:
    """(tokens, tokens per second) that a run in `folder` logged last; zeros where it has logged none."""
    rows = read_rows(folder / "metrics.jsonl")
    speed = next((row["train/tokens_per_s"] for row in reversed(rows) if row.get("train/tokens_per_s")), 0.0)
    return max((row["tokens"] for row in rows), default=0), speed
