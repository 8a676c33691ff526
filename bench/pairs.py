"""What the benches share: their options, models of a shape, timing in turns, and the report.

Steps are timed in turns within one process, so that a machine that slows down slows all of them. A ratio is the ratio
of the medians; its spread is the interquartile range of the ratios of each turn.
"""

import argparse
import importlib.metadata
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from train.machine import tune_process

tune_process()  # before torch is imported

import torch
import yaml
from rich.console import Console
from rich.table import Table

from archs import Decoder, build
from archs.ops import record
from train.machine import describe_machine, device_name

Step = Callable[[], object]
START = time.monotonic()
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DTYPE = "bf16" if torch.cuda.is_available() else "fp32"
SHAPE = {"vocab_size": 4096, "width": 256, "layers": 6, "heads": 8}
VARIANTS = ["mha", "gqa kv_heads=2", "mqa", "mla kv_rank=128 rope_dim=16"]
VARIANTS += ["yoco kv_heads=8 window=256", "yoco kv_heads=8 self_decoder=gret"]
GRAPH_CALLS = 20  # calls in a CUDA graph at least, so that launches are not what is timed


def parser(description: str, **defaults: int | str) -> argparse.ArgumentParser:
    """A parser with an option for each default, and the options that every bench has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for name, default in defaults.items():
        made.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help=" ")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help=" ")
    made.add_argument("--json", type=Path, help="append each row to this file, as a line of JSON")
    made.add_argument("--seconds", type=float, help="begin no further measurement after this time")
    return made


def model_parser(description: str, **defaults: int | str) -> argparse.ArgumentParser:
    """The same for benches of whole models, with options for their shape and variants."""
    made = parser(description, **SHAPE, **defaults)
    made.add_argument("--variants", nargs="+", default=VARIANTS, help="as in a study: arch option=value ...")
    return made


def options(variant: str, args: argparse.Namespace) -> tuple[str, dict]:
    """(arch, options) of one of --variants, in the shape that `args` has."""
    arch, *words = variant.split()
    settings = {key: yaml.safe_load(value) for key, _, value in (word.partition("=") for word in words)}
    return arch, {name: getattr(args, name) for name in (*SHAPE, "context")} | settings


def model_of(variant: str, args: argparse.Namespace) -> Decoder:
    arch, settings = options(variant, args)
    return build(arch, **settings).to(args.device, DTYPES[args.dtype]).eval()


def recorded(calls: list[Step], device: str) -> tuple[Step, int]:
    """(One step that does all calls, their number), recorded as a decode step is; a GPU repeats few calls."""

    def run() -> None:
        for call in calls:
            call()

    if device == "cpu":
        return record(run), len(calls)
    calls = calls * -(-GRAPH_CALLS // len(calls))
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay, len(calls)


def print_failure(what: str, error: Exception) -> None:
    print(f"{what}: {type(error).__name__}: {error}".splitlines()[0][:200], file=sys.stderr, flush=True)


def quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values if len(values) > 1 else 2 * values, n=4, method="inclusive")


def ratio(slower: list[float], faster: list[float]) -> tuple[str, str]:
    """(Ratio of the medians, lower and upper quartile of the ratios of each turn), as text."""
    low, _, high = quartiles([a / b for a, b in zip(slower, faster, strict=True)])
    return f"{statistics.median(slower) / statistics.median(faster):.2f}", f"{low:.2f}-{high:.2f}"


def spread(times: list[float]) -> str:
    """Median and interquartile range in milliseconds."""
    low, median, high = (1e3 * t for t in quartiles(times))
    return f"{median:.2f} ({low:.2f}-{high:.2f})"


class Report:
    """A table on the terminal; each row is also a line of JSON where --json names a file."""

    def __init__(self, title: str, args: argparse.Namespace, columns: list[str]):
        self.title, self.args, self.columns = title, args, columns
        self.rows: list[tuple[str, ...]] = []
        threads = f", {torch.get_num_threads()} threads" if args.device == "cpu" else ""
        self.device = f"{device_name(torch.device(args.device))}{threads}, torch {torch.__version__}"
        print(f"{title}\n{self.device}", flush=True)

    def out_of_time(self) -> bool:
        return self.args.seconds is not None and time.monotonic() - START > self.args.seconds

    def in_turns(self, steps: dict[str, Step], repeats: int, warmup: int = 2) -> dict[str, list[float]]:
        """Seconds of each step, one time a turn, after `warmup` turns. Out of time, one of each is enough."""
        times: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(-warmup, repeats):
            if turn not in (-warmup, 0) and self.out_of_time():
                continue
            for name, step in steps.items():
                self._synchronize()
                start = time.perf_counter()
                step()
                self._synchronize()
                if turn >= 0:
                    times[name].append(time.perf_counter() - start)
        return times

    def _synchronize(self) -> None:
        if self.args.device == "cuda":
            torch.cuda.synchronize()

    def add(self, *row: str) -> None:
        """A row: a value for each column."""
        self.rows.append(row)
        print("  ".join(row), flush=True)
        if self.args.json:
            about = {"bench": Path(sys.argv[0]).stem, "title": self.title, "device": self.device} | describe_machine()
            about["versions"]["transformers"] = importlib.metadata.version("transformers")
            with self.args.json.open("a", encoding="utf-8") as f:
                f.write(json.dumps(about | dict(zip(self.columns, row, strict=True))) + "\n")

    def measure(self, names: Iterable[str], function: Callable[[str], object]) -> int:
        """Calls `function` for each name as long as there is time, then shows the table. Returns the exit status: 1 if
        a call failed, which does not stop the others."""
        status = 0
        for name in names:
            if self.out_of_time():
                print(f"{name}: left out after {self.args.seconds:g} s", file=sys.stderr, flush=True)
                continue
            try:
                function(name)
            except Exception as e:
                print_failure(name, e)
                status = 1
        table = Table(*self.columns, title=self.title, caption=self.device)
        for row in self.rows:
            table.add_row(*row)
        Console().print(table)
        return status
