"""The commands and their options. Nothing here imports what a command does, so that `--help` answers at once."""

import argparse
import sys
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, like all messages about bad input."""
        print(f"kvfrontier: {message}; see {self.prog} --help", file=sys.stderr)
        sys.exit(2)


def parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="kvfrontier",
        description="Trains language models from scratch that differ only in how attention keeps its keys and values, "
        "measures cache bytes, decode speed and loss, and plots memory against quality.",
    )
    parser.add_argument("--version", action="version", version=f"kvfrontier {version('kvfrontier')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    stages = {
        "run": "train, evaluate and plot a study; what is finished and unchanged is not done again",
        "train": "train the runs of a study",
        "eval": "evaluate the trained runs of a study and gather results.json",
        "plot": "draw figures, tables and the report from results.json",
    }
    for stage, does in stages.items():
        command = commands.add_parser(stage, help=does, description=does[0].upper() + does[1:] + ".")
        what = "the name of a study in studies/, a YAML file, or the directory of a study (default: quick)"
        if stage == "plot":
            command.add_argument("study", nargs="*", default=["quick"], help=f"{what}; several: on one plane")
            _add_paper(command)
        else:
            command.add_argument("study", nargs="?", default="quick", help=what)
        command.add_argument("--out", type=_folder, metavar="DIR", help="where to write (default: runs/<study>)")
        if stage != "plot":
            _add_set(command)
        command.set_defaults(one=None, workers=None, ray=None)
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
    check = commands.add_parser(
        "check",
        help="whether kernels compute on this machine what their formulas say; or which laws your own attention keeps",
        epilog="example: kvfrontier check my_file.py:MyAttention",
    )
    what = "the study whose variants are checked (default: quick), or file.py:Class, the attention whose laws are tried"
    check.add_argument("study", nargs="?", default="quick", help=what)
    export = commands.add_parser(
        "export", help="write a trained run as a directory that Hugging Face transformers loads, where it can"
    )
    export.add_argument("run", type=Path, metavar="RUN_DIR", help="such as runs/quick/runs/mha/seed-0")
    export.add_argument("out", type=Path, metavar="OUT")
    imports = commands.add_parser(
        "import",
        help="make a run of a Llama, Mistral, Qwen3 or DeepSeek-V3 directory, which sample, eval and techniques take",
        description="Makes a study of one run, which is not trained: its weights are those of a model as transformers "
        "writes it (config.json, *.safetensors, tokenizer.json).",
        epilog="example: kvfrontier import SmolLM-135M runs/smollm --set 'corpus={files: [texts/*.txt]}'; "
        "kvfrontier eval runs/smollm",
    )
    imports.add_argument("folder", type=Path, metavar="DIR", help="with the model's files")
    imports.add_argument("out", type=_folder, metavar="OUT", help="a new directory, the study's")
    _add_set(imports)
    imports.set_defaults(one=None, workers=None, ray=None)
    sample = commands.add_parser(
        "sample",
        help="text from a trained run, through its cache",
        description="Writes text that a trained run makes, through its cache, as it comes.",
        epilog="example: kvfrontier sample runs/quick/runs/gqa/seed-0 --prompt 'def ' --top-k 20 --technique h2o "
        "--budget 0.5",
    )
    sample.add_argument("run", type=Path, metavar="RUN_DIR", help="such as runs/quick/runs/mha/seed-0")
    text = sample.add_mutually_exclusive_group()
    text.add_argument("--prompt", default="", metavar="TEXT", help="what it goes on from (default: a new document)")
    text.add_argument("--prompt-file", metavar="FILE", help="the same from a file; - is the standard input")
    numbers = {
        "--tokens": (_tokens, 128, "how many to make (default: 128)"),
        "--samples": (_count, 1, "how many texts to make together (default: 1)"),
        "--temperature": (float, 1.0, "0: always the likeliest token (default: 1)"),
        "--top-k": (int, None, "choose from this many of the likeliest tokens"),
        "--top-p": (float, None, "choose from the fewest tokens that have this share of the probability"),
        "--seed": (int, 0, "another number gives another text (default: 0)"),
    }
    for name, (kind, default, does) in numbers.items():
        sample.add_argument(name, type=kind, default=default, metavar="N", help=does)
    _add_technique(sample)
    sample.add_argument(
        "--no-cache", action="store_true", help="recompute all tokens for each further one, and compare the speeds"
    )
    harness = commands.add_parser(
        "lm-eval",
        help="tasks of lm-eval on trained runs",
        description="Runs tasks of lm-eval, an extra (uv run --extra lm-eval), on trained runs. Results go into their "
        "records, and with the next kvfrontier eval and plot into the tables.",
        epilog="example: kvfrontier lm-eval runs/quick/runs/*/seed-0 --tasks my_task --include tasks/",
    )
    harness.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="such as runs/quick/runs/mha/seed-0")
    harness.add_argument("--tasks", type=_names, required=True, metavar="NAMES", help="such as lambada_openai,piqa")
    harness.add_argument("--include", type=Path, metavar="FOLDER", help="with YAML files of your own tasks")
    harness.add_argument("--limit", type=_count, metavar="N", help="so many examples of each task")
    harness.add_argument("--few-shot", type=int, metavar="N", help="examples before each question")
    _add_technique(harness)
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
    status = commands.add_parser("status", help="which runs are done, running, interrupted, failed, stale, missing")
    status.add_argument(
        "study", nargs="?", default="quick", help="the directory of a study, its name or its YAML file (default: quick)"
    )
    return parser


def _add_set(command: argparse.ArgumentParser) -> None:
    does = "override a value of the study, such as train.tokens=2_000_000 or variants.gqa.kv_heads=1; repeatable"
    more = {"dest": "overrides", "action": "append", "default": [], "metavar": "KEY=VALUE"}
    command.add_argument("--set", **more, help=does)


def _add_technique(command: argparse.ArgumentParser) -> None:
    command.add_argument("--technique", metavar="NAME", help="what acts on the cache, such as h2o (docs/techniques.md)")
    command.add_argument("--budget", metavar="N", help="of the technique: tokens to keep, or a share such as 0.5")
    command.add_argument("--bits", metavar="N", help="quantise the cache to 8, 4 or 2 bits")
    more = {"action": "append", "default": [], "metavar": "KEY=VALUE"}
    command.add_argument("--option", **more, help="a further option of the technique, such as residual=32; repeatable")


def _add_paper(plot: argparse.ArgumentParser) -> None:
    """The options of `plot` for single figures."""
    plot.epilog = (
        "example: kvfrontier plot runs/quick --only frontier,decode --size 3.3x2.2 --format pdf,pgf --variants gqa,mha"
    )
    paper = plot.add_argument_group("figures for a paper", "any of these writes figures alone, into DIR/paper")
    paper.add_argument("--only", type=_names, metavar="FIGURES", help="such as frontier,decode (default: all)")
    paper.add_argument("--variants", type=_names, metavar="LABELS", help="show these, in this order")
    paper.add_argument("--labels", type=Path, metavar="FILE", help="YAML with other names: {gqa: ours}")
    paper.add_argument("--size", type=_size, metavar="WxH", help="in inches, such as 3.3x2.2 (default: 6.9 wide)")
    paper.add_argument("--format", type=_names, metavar="KINDS", help="of pdf, svg, png, pgf, eps (default: pdf)")
    paper.add_argument("--style", metavar="FILE", help="a matplotlib style: a file or a name")
    paper.add_argument("--to", type=_folder, metavar="FOLDER", help="where to write (default: DIR/paper)")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _size(text: str) -> tuple[float, float]:
    width, _, height = text.partition("x")
    try:
        size = float(width), float(height)
    except ValueError:
        size = 0.0, 0.0
    if not all(0.5 <= length <= 40 for length in size):
        raise argparse.ArgumentTypeError(f"{text!r} must be WIDTHxHEIGHT in inches, 0.5 to 40, such as 3.3x2.2")
    return size


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
