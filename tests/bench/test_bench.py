"""The side-by-side scripts run, at a miniature size, and say what they measured."""

import json
import runpy
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"
SHAPE = ["--width", "32", "--layers", "2", "--heads", "4", "--vocab-size", "64", "--kv-rank", "16", "--rope-dim", "8"]
SMALL = [*SHAPE, "--batch", "2", "--context", "24", "--device", "cpu"]
RUNS = {
    "decode": ([*SMALL, "--window", "8", "--decode-repeats", "2", "--prefill-repeats", "2"], 9),
    "training": ([*SMALL, "--window", "8", "--repeats", "2", "--no-compile"], 7),
    "roof": ([*SMALL, "--window", "8"], 6),
    "attention": (
        [*SHAPE[4:6], *SHAPE[8:], *SMALL[len(SHAPE) :], "--head-dim", "16", "--repeats", "2"],
        4,
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_each_script_measures_every_variant(name, tmp_path, monkeypatch, capsys):
    arguments, rows = RUNS[name]
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments, "--json", str(tmp_path / "numbers.jsonl")])
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.setattr("eval.speed.ROOF_BYTES", {"cpu": 2**20})
    runpy.run_path(str(BENCH / f"{name}.py"), run_name="__main__")
    numbers = [json.loads(line) for line in (tmp_path / "numbers.jsonl").read_text().splitlines()]
    assert len(numbers) == rows
    assert all(row["machine"] and row["what"] for row in numbers)
    assert not capsys.readouterr().err


def test_the_gpu_script_runs_scripts_that_exist(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    parts = runpy.run_path(str(BENCH / "gpu.py"))["PARTS"]
    for steps in parts.values():
        assert sum(seconds for _, seconds, _ in steps) <= 600
        for _, _, command in steps:
            assert all((BENCH.parent / word).exists() for word in command if word.endswith(".py"))
