"""kvfrontier: trains, measures and compares language models that differ in how attention keeps its keys and values.

kvfrontier run                          # the study `quick`, a few minutes on a laptop, into runs/quick
kvfrontier run my-study.yaml --out results --set train.tokens=2_000_000
kvfrontier status runs/quick
"""

import argparse
import contextlib
import errno
import functools
import gc
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import NoReturn

UNWRITABLE = errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS


def tune_process() -> None:
    """Has torch's CPU threads sleep soon and Python look for garbage less often; to be called before torch is imported.

    Threads that wait awake for longer than half a millisecond stall each other where cores are shared: up to 50x slower
    steps on a busy 2-core virtual machine. Threads that sleep at once must be woken for each operation, of which a
    decode step has hundreds.
    Looking for garbage among the objects that imports make, all of which stay, takes a quarter of a command's start.
    """
    gc.set_threshold(100_000)
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def main(arguments: list[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    tune_process()
    from train.errors import InputError, Interrupted

    def stop(signum: int, frame: FrameType | None) -> None:
        if _imports(frame):
            _say_stopped(signum)
            os._exit(128 + signum)
        raise Interrupted(signum)

    of_signals = threading.current_thread() is threading.main_thread()
    before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)} if of_signals else {}
    with contextlib.suppress(AttributeError):  # of a stream that a caller has put there
        sys.stdout.reconfigure(errors="replace")
    try:
        status = args.command(args)
        if sys.stdout:  # None where it is closed
            sys.stdout.flush()
        return status
    except BrokenPipeError:  # who read what is printed has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + signal.SIGPIPE
    except InputError as e:
        print(f"kvfrontier: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    except OSError as e:
        if e.errno in UNWRITABLE:
            said = f"cannot write {e.filename or 'a file'}: {e.strerror}"
            todo = "make room there and give the same command again, or choose another place with --out"
        elif e.filename:
            said = f"{str(e.filename)[:200]}: {e.strerror}"
            todo = "put that right and give the same command again"
        else:
            raise
        print(f"kvfrontier: {said}; what was done is kept: {todo}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, Interrupted) as e:
        for s in before:
            signal.signal(s, signal.SIG_IGN)  # one that was sent twice
        signum = getattr(e, "signum", signal.SIGINT)
        _say_stopped(signum)
        return 128 + signum
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _say_stopped(signum: int) -> None:
    name = signal.Signals(signum).name
    print(f"kvfrontier: stopped by {name}; the same command goes on from here", file=sys.stderr, flush=True)


def _imports(frame: FrameType | None) -> bool:
    """Whether this file is importing a module, before or between what it does; an exception there would come to
    libraries that are half loaded, of which some go on and others abort."""
    asked = importing = False
    while frame:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            importing = True
        elif importing:  # who asked for it; the outermost comes last
            importing, asked = False, frame.f_code.co_filename == __file__
        frame = frame.f_back
    return asked


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, as all that is said of bad input."""
        print(f"kvfrontier: {message}; see {self.prog} --help", file=sys.stderr)
        sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
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
        command.add_argument("--out", type=_folder, metavar="DIR", help="where to write (default: runs/<study>)")
        if stage != "plot":
            command.add_argument(
                "--set",
                dest="overrides",
                action="append",
                default=[],
                metavar="KEY=VALUE",
                help="override a value of the study, such as train.tokens=2_000_000 or variants.gqa.kv_heads=1; "
                "repeatable",
            )
        command.set_defaults(command=_run_stages, stage=stage, one=None, workers=None, ray=None)
        if stage in ("run", "train"):
            how = command.add_mutually_exclusive_group()
            how.add_argument(
                "--workers",
                type=_count,
                metavar="N",
                help="train N runs side by side, each with a GPU of its own where there are as many",
            )
            how.add_argument(
                "--ray",
                nargs="?",
                const="",
                metavar="ADDRESS",
                help="spread the runs over a Ray cluster (default: $RAY_ADDRESS, or this machine); give it after STUDY",
            )
        if stage == "train":
            how.add_argument("--run", dest="one", metavar="NAME", help="this run alone, as kvfrontier status names it")
    export = commands.add_parser(
        "export", help="write a trained run as a directory that Hugging Face transformers loads, where it can"
    )
    export.add_argument("run", type=Path, metavar="RUN_DIR", help="such as runs/quick/runs/mha/seed-0")
    export.add_argument("out", type=Path, metavar="OUT")
    export.set_defaults(command=_export)
    status = commands.add_parser("status", help="which runs are done, running, interrupted, failed, stale, missing")
    status.add_argument(
        "study", nargs="?", default="quick", help="the directory of a study, its name or its YAML file (default: quick)"
    )
    status.set_defaults(command=_status, out=None)
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1024:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, 1 to 1024")
    return int(text)


def _folder(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("is empty; name a directory")
    return Path(text)


def _run_stages(args: argparse.Namespace) -> int:
    name, directory = _directory(args)
    if args.stage == "plot":
        return _plot(directory)
    from train.errors import InputError
    from train.plan import Plan
    from train.progress import console
    from train.status import write_plan
    from train.study import load_data, parse_study

    given, beside = _given(args)
    study = parse_study(given, args.overrides)
    plan = Plan(study, load_data(study, beside), directory)

    record_plan = functools.partial(write_plan, name, beside, plan)
    if args.one is not None:
        from train.runner import train_one

        return _report(train_one(plan, args.one, record_plan))
    failures = []
    if args.stage in ("run", "train"):
        record_plan()
        if plan.ready():
            try:
                failures += _train(args, plan, record_plan)
            finally:
                record_plan()
        else:
            console.print(f"all {len(plan.runs())} runs are trained", highlight=False)
            failures += plan.failures()
    if args.stage in ("run", "eval"):
        from eval.results import write_results
        from train.files import is_evaluated

        if not all(is_evaluated(run) for run in plan.runs()):
            from eval.evaluate import evaluate_runs  # takes seconds to import

            failures += evaluate_runs(plan)
        if write_results(name, plan):
            record_plan()
        elif not failures:
            raise InputError(f"no run in {directory} is trained with these settings; see kvfrontier status {directory}")
        else:
            return _report(failures)
    if args.stage == "run":
        _plot(directory, only_if_changed=True)
    return _report(failures)


def _train(args: argparse.Namespace, plan, record_plan) -> list[str]:
    """A line for each run that failed."""
    from train.errors import InputError

    config = plan.study.train
    if config.num_nodes > 1:
        raise InputError(
            f"train.num_nodes={config.num_nodes}: runs on several machines are started one by one, a process on each "
            f"device, by srun or torchrun with: kvfrontier train {args.study} --run NAME"
        )
    if args.ray is not None or args.workers or config.devices > 1:
        from train.workers import OnRay, SideBySide, train_by

        workers = OnRay(plan, args.ray) if args.ray is not None else SideBySide(plan, args.workers or 1)
        return train_by(workers, plan, record_plan)
    from train.runner import train_runs

    return train_runs(plan, record_plan)


def _report(failures: list[str]) -> int:
    for failure in failures:
        print(f"kvfrontier: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _directory(args: argparse.Namespace) -> tuple[str, Path]:
    """The study's name and where its results are."""
    from train.errors import InputError
    from train.files import read_json
    from train.status import PLAN, read_plan

    if Path(args.study).name == "results.json":
        args.study = str(Path(args.study).parent)

    if _is_study_directory(args.study):
        if args.out:
            raise InputError(f"--out does not go with {args.study}, which is a study's directory already")
        directory = Path(args.study)
        return read_plan(directory).get("study", directory.resolve().name), directory
    from train.study import find_study

    file = find_study(args.study)
    directory = args.out or Path("runs") / file.stem
    other = Path(str(read_json(directory / PLAN).get("study_file", file)))
    if not args.out and other.is_file() and not other.samefile(file):
        raise InputError(f"{directory} has the runs of {other}, another study; name another directory with --out")
    return file.stem, directory


def _is_study_directory(study: str) -> bool:
    from train.status import PLAN

    return any((Path(study) / name).is_file() for name in (PLAN, "results.json"))


def _given(args: argparse.Namespace) -> tuple[dict, Path]:
    """The study as its file, or the directory's last command, has it, and the file that its paths are relative to."""
    from train.errors import InputError
    from train.status import PLAN, read_plan
    from train.study import find_study, read_yaml

    if not _is_study_directory(args.study):
        path = find_study(args.study)
        return read_yaml(path), path
    plan = read_plan(Path(args.study))
    if not plan:
        raise InputError(f"{args.study} has no {PLAN}: only plot works there; give the study's YAML file and --out")
    return plan["settings"], Path(plan["study_file"])


def _plot(directory: Path, only_if_changed: bool = False) -> int:
    report = directory / "report.html"
    if only_if_changed and _is_drawn(directory):
        print(f"unchanged: {report}")
        return 0
    from plots import ResultsError, draw
    from train.errors import InputError
    from train.files import lock

    try:
        with lock(directory / "drawing", wait=-1) if directory.is_dir() else contextlib.nullcontext():
            draw(directory)
    except ResultsError as e:
        raise InputError(str(e)) from None
    print((directory / "tables" / "results.md").read_text(encoding="utf-8"))
    print(f"figures, tables and the report are in {directory}: open {report}, or tensorboard --logdir {directory}")
    return 0


def _is_drawn(directory: Path) -> bool:
    """Whether the report, which is written last, is there and newer than what it is drawn from and with."""
    folders = [directory / name for name in ("figures", "tables")]
    if not all(path.exists() for path in (directory / "report.html", *folders)):
        return False
    drawn = (directory / "report.html").stat().st_mtime_ns
    others = [directory / "results.json", *(path for folder in folders for path in folder.iterdir())]
    return all(path.stat().st_mtime_ns <= drawn for path in others)


def _export(args: argparse.Namespace) -> int:
    from train.export import export

    export(args.run, args.out)
    print(f"{args.out}: AutoModelForCausalLM.from_pretrained loads it")
    return 0


def _status(args: argparse.Namespace) -> int:
    from train.status import states

    directory = Path(args.study) if Path(args.study).is_dir() else _directory(args)[1]
    for name, state in states(directory).items():
        print(f"{name}  {state}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
