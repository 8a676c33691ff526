"""kvfrontier: trains, measures and compares language models that differ in how attention keeps its keys and values.

kvfrontier run                          # the study `quick`, a few minutes on a laptop, into runs/quick
kvfrontier run my-study.yaml --out results --set train.tokens=2_000_000
kvfrontier status runs/quick
"""

import argparse
import contextlib
import errno
import importlib
import os
import signal
import sys
import threading
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import FrameType, ModuleType

PACKAGES = "archs", "eval", "plots", "train"


class OtherName(MetaPathFinder, Loader):
    """Imports a module of PACKAGES under a second name, with the prefix `new` instead of `old`. In a checkout the
    packages are `archs` or `kvfrontier.archs`, which is their only name in a wheel (setup.py)."""

    def __init__(self, new: str, old: str):
        self.new, self.old = new, old

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        package = name.removeprefix(self.new).partition(".")[0]
        return ModuleSpec(name, self) if name.startswith(self.new) and package in PACKAGES else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(self.old + spec.name.removeprefix(self.new))
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = module.__spec__.loader_state  # the import system has put the second name's there


if "__path__" not in globals():
    __path__: list[str] = []  # else Python would look for no module inside of this one
    sys.meta_path.insert(0, OtherName(f"{__name__}.", ""))

UNWRITABLE = errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS


def main(arguments: list[str] | None = None) -> int:
    from train.options import parser

    args = parser().parse_args(arguments)
    from train.machine import tune_process

    tune_process()
    from train.errors import InputError, Interrupted

    def stop(signum: int, frame: FrameType | None) -> None:
        if _is_importing(frame):
            _say_stopped(signum, args)
            os._exit(128 + signum)
        raise Interrupted(signum)

    in_main_thread = threading.current_thread() is threading.main_thread()
    before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)} if in_main_thread else {}
    with contextlib.suppress(AttributeError):  # a caller may have replaced the stream
        sys.stdout.reconfigure(errors="replace")
    try:
        status = COMMANDS[args.command](args)
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
        _say_stopped(signum, args)
        return 128 + signum
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _say_stopped(signum: int, args: argparse.Namespace) -> None:
    goes_on = "; the same command goes on from here" if args.command in STAGES else ""
    print(f"kvfrontier: stopped by {signal.Signals(signum).name}{goes_on}", file=sys.stderr, flush=True)


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


def _run_stages(args: argparse.Namespace) -> int:
    from train.store import find_directory

    if args.command == "plot":
        directories = [find_directory(study, args.out)[0] for study in args.study]
        paper = "only", "variants", "labels", "size", "format", "style", "to"
        if len(directories) > 1 or any(getattr(args, name) for name in paper):
            return _plot_for_paper(directories, args)
        return _plot(directories[0])
    directory, study_file = find_directory(args.study, args.out)
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
    known = read_json(directory / PLAN).get("tokens") if args.one is not None or args.command == "eval" else None
    plan = Plan(study, load_data(study, study_file, directory, known), directory, study_file, measure_names())
    if args.one is not None:
        from train.runner import train_one

        return _report(train_one(plan, args.one))
    failures = []
    if line := unused_gpu():
        console.print(line, soft_wrap=True)
    if args.command in ("run", "train"):
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
    if args.command in ("run", "eval"):
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
    if args.command == "run":
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


def _plot_for_paper(directories: list[Path], args: argparse.Namespace) -> int:
    from plots import FIGURES, ResultsError, draw_for_paper, load
    from plots.style import BACKENDS
    from train.errors import InputError
    from train.study import read_yaml

    kinds, only, pairs = args.format or ["pdf"], args.only or [], "names of variants, such as {gqa: ours}"
    labels = read_yaml(args.labels, pairs) if args.labels else {}
    for name, given, known in (("--format", kinds, BACKENDS), ("--only", only, FIGURES)):
        if unknown := [each for each in given if each not in known]:
            raise InputError(f"{name} {unknown[0]}: there are {', '.join(known)}")
    if not all(isinstance(name, str) for name in labels.values()):
        raise InputError(f"{args.labels} must be {pairs}")
    try:
        results = load(*directories, variants=args.variants, labels=labels)
        for path in draw_for_paper(
            results, only, args.to or directories[0] / "paper", kinds, args.size, args.style or ()
        ):
            print(path)
    except ResultsError as e:
        raise InputError(str(e)) from None
    return 0


def _check(args: argparse.Namespace) -> int:
    from eval.check import LIMIT, checks
    from train.errors import InputError
    from train.machine import device_name, find_device, unused_gpu
    from train.store import find_directory
    from train.study import parse_study, read_yaml

    if ":" in args.study and not Path(args.study).exists():
        return _check_laws(args.study)
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


def _check_laws(arch: str) -> int:
    from eval.laws import laws

    wrong = 0
    for law in laws(arch):
        print(f"{'fails' if law.failure else 'holds'}  {law.name} ({law.cases} cases)")
        if law.failure:
            print(f"       {law.failure}")
        wrong += bool(law.failure)
    return _report([f"{wrong} of the laws do not hold for {arch}"] if wrong else [])


def _export(args: argparse.Namespace) -> int:
    from train.export import export

    export(args.run, args.out)
    print(f"{args.out}: AutoModelForCausalLM.from_pretrained loads it")
    return 0


def _import(args: argparse.Namespace) -> int:
    from train.imported import import_model

    args.command, args.study = "train", str(import_model(args.folder, args.out))
    if not (status := _run_stages(args)):
        for record in sorted(args.out.glob("runs/*/*/record.json")):
            print(f"kvfrontier sample takes {record.parent}, and kvfrontier eval takes {args.out}")
    return status


def _technique(args: argparse.Namespace) -> dict:
    """The technique that acts on a cache, with its options; {} for none."""
    import yaml

    from train.errors import InputError

    pairs = [
        f"{name}={value}" for name in ("technique", "budget", "bits") if (value := getattr(args, name)) is not None
    ]
    acts = {}
    for pair in [*pairs, *args.option]:
        key, equals, value = pair.partition("=")
        try:
            acts[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            equals = ""
        if not equals:
            raise InputError(f"--option {pair}: must be KEY=VALUE")
    return acts


def _sample(args: argparse.Namespace) -> int:
    from eval.sample import sample
    from train.errors import InputError

    prompt = args.prompt
    if args.prompt_file:
        try:
            prompt = sys.stdin.read() if args.prompt_file == "-" else Path(args.prompt_file).read_text(encoding="utf-8")
        except UnicodeDecodeError as e:
            raise InputError(f"--prompt-file {args.prompt_file}: is not UTF-8 text: {e.reason}") from None
    how = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "seed")}
    sample(args.run, prompt, args.tokens, args.samples, how, _technique(args), not args.no_cache)
    return 0


def _harness(args: argparse.Namespace) -> int:
    from train.errors import InputError

    try:
        from eval.harness import evaluate
    except ModuleNotFoundError as e:
        raise InputError(f"lm-eval needs its extra: uv run --extra lm-eval kvfrontier lm-eval ... ({e})") from None
    acts, how = _technique(args), {"limit": args.limit, "num_fewshot": args.few_shot}
    for run in args.runs:
        for task, values in evaluate(run, args.tasks, args.include, acts, **how).items():
            for metric, value in values.items():
                print(f"{run}  {task}  {metric.removesuffix(',none')}  {value:.6g}", flush=True)
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


STAGES = dict.fromkeys(("run", "train", "eval", "plot"), _run_stages)
COMMANDS = STAGES | {
    "check": _check,
    "export": _export,
    "import": _import,
    "sample": _sample,
    "bytes": _bytes,
    "lm-eval": _harness,
    "status": _status,
}

if __name__ == "__main__":
    sys.exit(main())
