"""The side-by-side scripts run, at a miniature size, and say what they measured."""

import json
import runpy
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"
SMALL = ["--batch", "2", "--context", "24", "--device", "cpu"]
VARIANTS = ["mha", "gqa kv_heads=2", "mla kv_rank=16 rope_dim=8", "yoco kv_heads=4 window=8"]
MODEL = ["--width", "32", "--layers", "2", "--heads", "4", "--vocab-size", "64", *SMALL, "--variants", *VARIANTS]
LAYER = ["--heads", "4", "--head-dim", "16", "--kv-rank", "16", "--rope-dim", "8", *SMALL]
RUNS = {  # arguments, rows that are printed
    "decode": ([*MODEL, "--decode-repeats", "2", "--prefill-repeats", "2"], 2 * 3 + 1),
    "training": ([*MODEL, "--repeats", "2", "--no-compile"], 4 + 1),
    "roof": (MODEL, 4),
    "attention": ([*LAYER, "--repeats", "2"], 4),
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
