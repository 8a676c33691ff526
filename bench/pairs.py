"""Timing things side by side: in turns within one process, so that a machine that slows down slows all of them.

A ratio is that of the medians; its spread is the interquartile range of the ratios turn by turn.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from train.machine import tune_process

tune_process()  # before torch is imported

import torch
import yaml
from rich.console import Console
from rich.table import Table

from archs import Decoder, build
from train.machine import device_name

Step = Callable[[], object]
SHAPE = {"vocab_size": 4096, "width": 256, "layers": 6, "heads": 8}
VARIANTS = ["mha", "gqa kv_heads=2", "mqa", "mla kv_rank=128 rope_dim=16"]
VARIANTS += ["yoco kv_heads=8 window=256", "yoco kv_heads=8 self_decoder=gret"]


def parser(description: str, **defaults: int | str) -> argparse.ArgumentParser:
    """An option for each default, and --json, a file that gets the numbers."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for name, default in defaults.items():
        made.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help=" ")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help=" ")
    made.add_argument("--json", type=Path, help="append the numbers to this file, one line each")
    return made


def model_parser(description: str, **defaults: int | str) -> argparse.ArgumentParser:
    """The same for scripts on whole models: their shape and variants, too."""
    made = parser(description, **SHAPE, **defaults)
    made.add_argument("--variants", nargs="+", default=VARIANTS, help="as in a study: arch option=value ...")
    return made


def options(variant: str, args: argparse.Namespace) -> tuple[str, dict]:
    """(arch, options) of one of --variants in the shape that was asked for."""
    arch, *own = variant.split()
    given = {key: yaml.safe_load(value) for key, _, value in (option.partition("=") for option in own)}
    return arch, {name: getattr(args, name) for name in (*SHAPE, "context")} | given


def model_of(variant: str, args: argparse.Namespace, dtype: torch.dtype) -> Decoder:
    arch, own = options(variant, args)
    return build(arch, **own).to(args.device, dtype).eval()


def machine(device: str) -> str:
    """What the numbers were measured on."""
    threads = f", {torch.get_num_threads()} threads" if device == "cpu" else ""
    return f"{device_name(torch.device(device))}{threads}, torch {torch.__version__}"


def in_turns(steps: dict[str, Step], device: str, repeats: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each step's `repeats` runs, one of each in turn, after `warmup` turns."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(-warmup, repeats):
        for name, step in steps.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn >= 0:
                times[name].append(time.perf_counter() - start)
    return times


def said(error: Exception) -> str:
    """The first line of what an error says, cut."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values if len(values) > 1 else 2 * values, n=4, method="inclusive")


def ratio(slower: list[float], faster: list[float]) -> tuple[float, float, float]:
    """(median of the one over median of the other, lower and upper quartile of the ratios turn by turn)."""
    turns = [a / b for a, b in zip(slower, faster, strict=True)]
    low, _, high = quartiles(turns)
    return statistics.median(slower) / statistics.median(faster), low, high


def spread(times: list[float]) -> str:
    """Median and interquartile range in milliseconds."""
    low, median, high = (1e3 * t for t in quartiles(times))
    return f"{median:.2f} ({low:.2f}-{high:.2f})"


class Report:
    """A table on the terminal, and every row as a line of JSON where --json asks for it."""

    def __init__(self, title: str, path: Path | None, device: str, columns: list[str]):
        self.title, self.path, self.machine, self.columns = title, path, machine(device), columns
        self.rows: list[dict] = []
        print(f"{title}\n{self.machine}", flush=True)

    def add(self, **row: str | float) -> None:
        self.rows.append(row)
        print("  ".join(str(row[name]) for name in self.columns), flush=True)
        if self.path:
            with self.path.open("a", encoding="utf-8") as f:
                f.write(json.dumps({"bench": self.title, "machine": self.machine, **row}) + "\n")

    def show(self) -> None:
        table = Table(*self.columns, title=self.title, caption=self.machine)
        for row in self.rows:
            table.add_row(*(str(row[name]) for name in self.columns))
        Console().print(table)
