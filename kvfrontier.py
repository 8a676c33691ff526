"""kvfrontier: trains, measures and compares language models that differ in how attention keeps its keys and values.

kvfrontier run                          # the study `quick`, a few minutes on a laptop, into runs/quick
kvfrontier run my-study.yaml --out results --set train.tokens=2_000_000
kvfrontier status runs/quick
"""

import argparse
import contextlib
import errno
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import NoReturn

UNWRITABLE = errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS


def main(arguments: list[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    from train.machine import tune_process

    tune_process()
    from train.errors import InputError, Interrupted

    def stop(signum: int, frame: FrameType | None) -> None:
        if _is_importing(frame):
            _say_stopped(signum)
            os._exit(128 + signum)
        raise Interrupted(signum)

    in_main_thread = threading.current_thread() is threading.main_thread()
    before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)} if in_main_thread else {}
    with contextlib.suppress(AttributeError):  # a caller may have replaced the stream
        sys.stdout.reconfigure(errors="replace")
    try:
        status = args.command(args)
        if sys.stdout:  # None if it is closed
            sys.stdout.flush()
        return status
    except BrokenPipeError:  # stdout was closed, as by `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + signal.SIGPIPE
    except InputError as e:
        print(f"kvfrontier: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    except OSError as e:
        if e.errno in UNWRITABLE:
            problem = f"cannot write {e.filename or 'a file'}: {e.strerror}"
            advice = "make room there and give the same command again, or choose another place with --out"
        elif e.filename:
            problem = f"{str(e.filename)[:200]}: {e.strerror}"
            advice = "put that right and give the same command again"
        else:
            raise
        print(f"kvfrontier: {problem}; what was done is kept: {advice}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, Interrupted) as e:
        for s in before:
            signal.signal(s, signal.SIG_IGN)  # the same signal may come twice
        signum = getattr(e, "signum", signal.SIGINT)
        _say_stopped(signum)
        return 128 + signum
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _say_stopped(signum: int) -> None:
    name = signal.Signals(signum).name
    print(f"kvfrontier: stopped by {name}; the same command goes on from here", file=sys.stderr, flush=True)


def _is_importing(frame: FrameType | None) -> bool:
    """True if this file is importing a module. An exception there would reach libraries that are half loaded, of which
    some go on and others abort. Imports that other files make while a command runs do not count."""
    by_this_file = importing = False
    while frame:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            importing = True
        elif importing:  # the frame that asked for the import; the outermost one comes last
            importing, by_this_file = False, frame.f_code.co_filename == __file__
        frame = frame.f_back
    return by_this_file


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, like all messages about bad input."""
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
    check = commands.add_parser("check", help="whether kernels compute on this machine what their formulas say")
    check.add_argument(
        "study", nargs="?", default="quick", help="the study whose variants are checked (default: quick)"
    )
    check.set_defaults(command=_check)
    export = commands.add_parser(
        "export", help="write a trained run as a directory that Hugging Face transformers loads, where it can"
    )
    export.add_argument("run", type=Path, metavar="RUN_DIR", help="such as runs/quick/runs/mha/seed-0")
    export.add_argument("out", type=Path, metavar="OUT")
    export.set_defaults(command=_export)
    cache_bytes = commands.add_parser(
        "bytes",
        help="the cache of any model from its config.json, without weights: per token, constant, stored, read",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Cache bytes of models from their Hugging Face config.json, without weights. Fields that are not\n"
        "understood are refused, and never guessed. A trained run or the directory of a study stands beside them.",
        epilog="for example:\n  kvfrontier bytes Qwen3-0.6B/config.json DeepSeek-V3 runs/quick --context 32768 "
        "--memory 80GiB",
    )
    cache_bytes.add_argument(
        "sources", nargs="+", metavar="SOURCE", help="a config.json, a directory that holds one, a run, or a study"
    )
    cache_bytes.add_argument(
        "--context",
        type=_tokens,
        metavar="N",
        help="tokens in the cache (default: the longest that each config states)",
    )
    cache_bytes.add_argument("--batch", type=_tokens, default=1, metavar="N", help="sequences (default: 1)")
    cache_bytes.add_argument(
        "--dtype",
        choices=["fp32", "fp16", "bf16", "fp8", "int8", "nvfp4", "int4", "int2"],
        help="of keys and values in the cache (default: bf16, or what the config quantises its cache to)",
    )
    cache_bytes.add_argument(
        "--memory", metavar="SIZE", help="such as 80GiB: the largest batch whose cache fits, weights not counted"
    )
    cache_bytes.add_argument("--json", dest="as_json", action="store_true", help="print a list of objects, plain bytes")
    cache_bytes.add_argument(
        "--figure", type=_figure, metavar="FILE", help="draw bytes over context: .pdf, .png or .svg"
    )
    cache_bytes.set_defaults(command=_bytes)
    status = commands.add_parser("status", help="which runs are done, running, interrupted, failed, stale, missing")
    status.add_argument(
        "study", nargs="?", default="quick", help="the directory of a study, its name or its YAML file (default: quick)"
    )
    status.set_defaults(command=_status)
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1024:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, 1 to 1024")
    return int(text)


def _tokens(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) < 2**40:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, 1 or more")
    return int(text)


def _folder(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("is empty; name a directory")
    return Path(text)


def _figure(text: str) -> Path:
    if Path(text).suffix not in (".pdf", ".png", ".svg"):
        raise argparse.ArgumentTypeError(f"{text!r} must end in .pdf, .png or .svg")
    return Path(text)


def _run_stages(args: argparse.Namespace) -> int:
    from train.store import find_directory

    directory, study_file = find_directory(args.study, args.out)
    if args.stage == "plot":
        return _plot(directory)
    from eval import measure_names
    from train.errors import InputError
    from train.files import read_json
    from train.machine import unused_gpu
    from train.plan import Plan
    from train.progress import console
    from train.store import PLAN, read_plan
    from train.study import load_data, parse_study, read_yaml

    if study_file:
        settings = read_yaml(study_file)
    elif saved := read_plan(directory):
        settings, study_file = saved["settings"], Path(saved["study_file"])
    else:
        raise InputError(f"{directory} has no {PLAN}: only plot works there; give the study's YAML file and --out")
    study = parse_study(settings, args.overrides)
    known = read_json(directory / PLAN).get("tokens") if args.one is not None or args.stage == "eval" else None
    plan = Plan(study, load_data(study, study_file, directory, known), directory, study_file, measure_names())
    if args.one is not None:
        from train.runner import train_one

        return _report(train_one(plan, args.one))
    failures = []
    if line := unused_gpu():
        console.print(line, soft_wrap=True)
    if args.stage in ("run", "train"):
        plan.save()
        look = plan.look()
        if look.ready:
            for line in plan.repeats():
                console.print(line, soft_wrap=True)
            try:
                failures += _train(args, plan)
            finally:
                plan.save()
        else:
            console.print(f"all {len(look.runs)} runs are trained", highlight=False)
            failures += look.failures
    if args.stage in ("run", "eval"):
        from eval.results import write_results

        look = plan.look()
        if not all(map(look.is_evaluated, look.runs)):
            from eval.evaluate import evaluate_runs  # takes seconds to import

            failures += evaluate_runs(plan)
        if write_results(plan):
            plan.save()
        elif not failures:
            raise InputError(f"no run in {directory} is trained with these settings; see kvfrontier status {directory}")
        else:
            return _report(failures)
    if args.stage == "run":
        _plot(directory, only_if_changed=True)
    return _report(failures)


def _train(args: argparse.Namespace, plan) -> list[str]:
    """Trains all runs; returns a line for each that failed."""
    from train.errors import InputError
    from train.progress import StudyProgress
    from train.workers import OnRay, SideBySide, train_with

    config = plan.study.train
    if config.num_nodes > 1:
        raise InputError(
            f"train.num_nodes={config.num_nodes}: runs on several machines are started one by one, a process on each "
            f"device, by srun or torchrun with: kvfrontier train {args.study} --run NAME"
        )
    with StudyProgress("training", 0) as progress:
        if args.ray is not None:
            workers = OnRay(plan, args.ray)
        elif args.workers or config.devices > 1:
            workers = SideBySide(plan, args.workers or 1)
        else:
            from train.runner import InProcess

            workers = InProcess(plan, progress)
        return train_with(workers, plan, progress)


def _report(failures: list[str]) -> int:
    for failure in failures:
        print(f"kvfrontier: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _plot(directory: Path, only_if_changed: bool = False) -> int:
    from plots import ResultsError, draw, is_drawn
    from train.errors import InputError
    from train.files import lock

    report = directory / "report.html"
    if only_if_changed and is_drawn(directory):
        print(f"unchanged: {report}")
        return 0
    try:
        with lock(directory / "drawing", wait=-1) if directory.is_dir() else contextlib.nullcontext():
            draw(directory)
    except ResultsError as e:
        raise InputError(str(e)) from None
    print((directory / "tables" / "results.md").read_text(encoding="utf-8"))
    print(f"figures, tables and the report are in {directory}: open {report}, or tensorboard --logdir {directory}")
    return 0


def _check(args: argparse.Namespace) -> int:
    from eval.check import LIMIT, checks
    from train.errors import InputError
    from train.machine import device_name, find_device, unused_gpu
    from train.store import find_directory
    from train.study import parse_study, read_yaml

    study_file = find_directory(args.study, None)[1]
    if not study_file:
        raise InputError(f"{args.study} is the directory of results; give the name or the YAML file of a study")
    print(unused_gpu() or f"on {device_name(find_device())}; differences are shares of the largest number")
    wrong = 0
    for each in checks(parse_study(read_yaml(study_file)), study_file):
        dtype = str(each.dtype).removeprefix("torch.")
        verdict = "" if each.passed else f"  more than {LIMIT[each.dtype]}"
        print(f"{each.label:24} {each.what:8} {dtype:8} {each.error:8.1e}  {each.kernels}{verdict}", flush=True)
        wrong += not each.passed
    return _report([f"{wrong} of the checks failed"] if wrong else [])


def _export(args: argparse.Namespace) -> int:
    from train.export import export

    export(args.run, args.out)
    print(f"{args.out}: AutoModelForCausalLM.from_pretrained loads it")
    return 0


def _bytes(args: argparse.Namespace) -> int:
    from eval.kv_bytes.command import curves, report
    from eval.kv_bytes.models import read_caches

    caches = [cache for source in args.sources for cache in read_caches(source, args.dtype)]
    text = report(caches, args.context, args.batch, args.memory, args.as_json)
    if args.figure:
        from plots.figures.cache_bytes import render_models

        args.figure.write_bytes(render_models(curves(caches))[args.figure.suffix[1:]])
    print(text)
    return 0


def _status(args: argparse.Namespace) -> int:
    from train.store import find_directory, states

    directory = Path(args.study) if Path(args.study).is_dir() else find_directory(args.study, None)[0]
    for name, state in states(directory).items():
        print(f"{name}  {state}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
