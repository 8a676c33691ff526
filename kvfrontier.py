"""kvfrontier: trains, measures and compares language models that differ in how attention keeps its keys and values.

kvfrontier run                          # the study `quick`, a few minutes on a laptop, into runs/quick
kvfrontier run my-study.yaml --out results --set train.tokens=2_000_000
kvfrontier status runs/quick
"""

import argparse
import json
import os
import sys
from pathlib import Path

PLAN = "plan.json"  # in a study's directory: what was asked for, so that a stage can be given the directory alone


def let_threads_sleep() -> None:
    """Has torch's CPU threads wait awake for half a millisecond at most; to be called before torch is imported.

    Threads that spin for longer stall each other where cores are shared: up to 50x slower steps on a busy 2-core
    virtual machine. Threads that sleep at once must be woken for each operation, of which a decode step has hundreds.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def main(arguments: list[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    let_threads_sleep()
    from train.errors import InputError

    try:
        return args.command(args)
    except InputError as e:
        print(f"kvfrontier: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("kvfrontier: stopped; the same command goes on from here", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kvfrontier",
        description="Trains language models from scratch that differ only in how attention keeps its keys and values, "
        "measures cache bytes, decode speed and loss, and plots memory against quality.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    stages = {
        "run": "train, evaluate and plot a study; what is finished and unchanged is not done again",
        "train": "train the runs of a study",
        "eval": "evaluate the trained runs of a study and gather results.json",
        "plot": "draw figures, tables and the report from results.json",
    }
    for stage, does in stages.items():
        command = commands.add_parser(stage, help=does, description=does[0].upper() + does[1:] + ".")
        command.add_argument(
            "study",
            nargs="?",
            default="quick",
            help="the name of a study in studies/, a YAML file, or the directory of a study (default: quick)",
        )
        command.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: runs/<study>)")
        command.add_argument(
            "--set",
            dest="overrides",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help="override a value of the study, such as train.tokens=2_000_000 or variants.gqa.kv_heads=1; repeatable",
        )
        command.set_defaults(command=_run_stages, stage=stage)
    status = commands.add_parser("status", help="which runs are done, running, interrupted, failed, stale, missing")
    status.add_argument("directory", type=Path, metavar="DIR")
    status.set_defaults(command=_status)
    return parser


def _run_stages(args: argparse.Namespace) -> int:
    name, directory = _directory(args)
    if args.stage == "plot":
        return _plot(directory)
    from train.errors import InputError
    from train.plan import Plan
    from train.progress import console
    from train.study import load_data, parse_study

    given, beside = _given(args)
    study = parse_study(given, args.overrides)
    plan = Plan(study, load_data(study, beside), directory)

    failures = []
    if args.stage in ("run", "train"):
        _write_plan(name, beside, plan)
        if any(True for _ in plan.to_train()):
            from train.runner import Interrupted, train_runs

            try:
                failures += train_runs(plan)
            except Interrupted as e:
                console.print(f"{e}: stopped after a checkpoint; the same command goes on from here", highlight=False)
                return 128 + e.signum
            finally:
                _write_plan(name, beside, plan)
        else:
            console.print(f"all {len(plan.runs())} runs are trained", highlight=False)
        for variant in plan.untunable():
            failures.append(f"{variant.label}: no learning rate gave a finite loss; give lower ones in train.lr")
    if args.stage in ("run", "eval"):
        from eval.results import write_results
        from train.files import is_evaluated

        if not all(is_evaluated(run) for run in plan.runs()):
            from eval.evaluate import evaluate_runs  # takes seconds to import

            failures += evaluate_runs(plan)
        if write_results(name, plan):
            _write_plan(name, beside, plan)
        elif not failures:
            raise InputError(f"no run in {directory} is trained with these settings; see kvfrontier status {directory}")
        else:
            return _report(failures)
    if args.stage == "run":
        _plot(directory, only_if_changed=True)
    return _report(failures)


def _report(failures: list[str]) -> int:
    for failure in failures:
        print(f"kvfrontier: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _directory(args: argparse.Namespace) -> tuple[str, Path]:
    """The study's name and where its results are."""
    from train.errors import InputError

    if _is_study_directory(args.study):
        if args.out:
            raise InputError(f"--out does not go with {args.study}, which is a study's directory already")
        directory = Path(args.study)
        return _read_plan(directory).get("study", directory.resolve().name), directory
    from train.study import find_study

    name = find_study(args.study).stem
    return name, args.out or Path("runs") / name


def _is_study_directory(study: str) -> bool:
    return any((Path(study) / name).is_file() for name in (PLAN, "results.json"))


def _given(args: argparse.Namespace) -> tuple[dict, Path]:
    """The study as its file, or the directory's last command, has it, and the file that its paths are relative to."""
    from train.errors import InputError
    from train.study import find_study, read_yaml

    if not _is_study_directory(args.study):
        path = find_study(args.study)
        return read_yaml(path), path
    plan = _read_plan(Path(args.study))
    if not plan:
        raise InputError(f"{args.study} has no {PLAN}: only plot works there; give the study's YAML file and --out")
    return plan["settings"], Path(plan["study_file"])


def _read_plan(directory: Path) -> dict:
    from train.files import read_json

    return read_json(directory / PLAN)


def _write_plan(name: str, beside: Path, plan) -> None:
    from train.errors import InputError
    from train.files import write_json
    from train.plan import stale_because

    runs = [
        {
            "name": run.name,
            "directory": run.directory.relative_to(plan.directory).as_posix(),
            "key": run.key,
            "eval_key": None if run.tunes else run.eval_key,
            "tokens": run.variant.tokens,
        }
        for run in [*plan.tuning_runs(), *plan.runs()]
    ]
    for entry, run in zip(runs, [*plan.tuning_runs(), *plan.runs()], strict=True):
        if because := stale_because(run, plan.study.train, plan.data):
            entry["stale"] = because
    waiting = [f"{v.label} seed {seed}" for v in plan.variants for seed in plan.study.seeds if not plan.run(v, seed)]
    content = {
        "study": name,
        "study_file": str(beside.resolve()),
        "settings": plan.study.settings(),
        "runs": runs + [{"name": name} for name in waiting],
    }
    try:
        write_json(plan.directory / PLAN, content)
    except OSError as e:
        raise InputError(f"cannot write to {plan.directory}: {e.strerror}; choose another place with --out") from None


def _plot(directory: Path, only_if_changed: bool = False) -> int:
    report, results = directory / "report.html", directory / "results.json"
    if only_if_changed and report.exists() and report.stat().st_mtime >= results.stat().st_mtime:
        print(f"unchanged: {report}")
        return 0
    from plots import ResultsError, draw
    from train.errors import InputError

    try:
        draw(directory)
    except ResultsError as e:
        raise InputError(str(e)) from None
    print((directory / "tables" / "results.md").read_text(encoding="utf-8"))
    print(f"figures, tables and the report are in {directory}: open {report}, or tensorboard --logdir {directory}")
    return 0


def _status(args: argparse.Namespace) -> int:
    from train.errors import InputError

    plan = _read_plan(args.directory)
    if "runs" not in plan:
        raise InputError(f"{args.directory} is no study's directory: it has no {PLAN}")
    for run in plan["runs"]:
        print(f"{run['name']}  {_state(args.directory, run, plan['settings']['train']['batch_tokens'])}")
    return 0


def _state(directory: Path, run: dict, batch_tokens: int) -> str:
    from train.files import is_locked, read_json
    from train.progress import duration

    if "directory" not in run:
        return "waiting for its learning rate"
    folder = directory / run["directory"]
    record = read_json(folder / "record.json")
    if record.get("key") == run["key"]:
        if "failed" in record:
            return f"failed: {record['failed']}"
        done = run["eval_key"] in (None, record.get("eval_key"))  # what tunes a rate is not evaluated
        return "done" if done else "trained, not evaluated"
    if read_json(folder / "config.json").get("key") != run["key"]:
        return f"stale: {run['stale']}" if "stale" in run else "missing"
    rows = []
    if (folder / "metrics.jsonl").exists():
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines if line.endswith("}")]
    tokens = max((row["tokens"] for row in rows), default=0)
    step = f"step {tokens // batch_tokens} of {run['tokens'] // batch_tokens}"
    if not is_locked(folder):
        return f"interrupted: {step}"
    speed = next((row["train/tokens_per_s"] for row in reversed(rows) if row.get("train/tokens_per_s")), 0)
    return f"running: {step}" + (f", {duration((run['tokens'] - tokens) / speed)} left" if speed else "")


if __name__ == "__main__":
    sys.exit(main())
