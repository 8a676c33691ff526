"""The benches run at a miniature size and report what they measured; all of them run within a time."""

import json
import os
import re
import runpy
import shlex
import signal
import sys
import time
from pathlib import Path

import pytest

from train.study import parse_study, read_yaml
from train.variants import resolve_variants

BENCH = Path(__file__).parents[2] / "bench"
SMALL = ["--batch", "2", "--context", "24", "--device", "cpu"]
VARIANTS = ["mha", "gqa kv_heads=2", "mla kv_rank=16 rope_dim=8", "yoco kv_heads=4 window=8"]
MODEL = ["--width", "32", "--layers", "2", "--heads", "4", "--vocab-size", "64", *SMALL, "--variants", *VARIANTS]
LAYER = ["--heads", "4", "--head-dim", "16", "--kv-rank", "16", "--rope-dim", "8", *SMALL]
RUNS = {  # arguments, number of rows
    "decode": ([*MODEL, "--decode-repeats", "2", "--prefill-repeats", "1"], 2 * 3 + 1),
    "training": ([*MODEL, "--repeats", "2", "--no-compile"], 4 + 1),
    "roof": (MODEL, 4),
    "attention": ([*LAYER, "--repeats", "2"], 4),
    "tiles": ([*LAYER, "--dtype", "fp32", "--repeats", "1", "--slots", "16", "--programs", "2"], 3 * 3),
    "llama": (
        [*MODEL[:8], "--variants", *VARIANTS[:2], "--batches", "2", "--contexts", "24", "--decode-repeats", "2"],
        2 * 2,
    ),
    "paging": ([*MODEL, "--repeats", "2"], 4 * 4),
    "loss": (["--vocab-size", "64", "--width", "16", *SMALL, "--repeats", "2"], 2),
}


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Runs a script of bench/ in this process: (exit status, rows of JSON)."""
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.setattr("eval.speed.ROOF_BYTES", {"cpu": 2**20})

    def run(name, arguments):
        rows = tmp_path / "rows.jsonl"
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments, "--json", str(rows)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(BENCH / f"{name}.py"), run_name="__main__")
        return end.value.code, [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []

    return run


@pytest.mark.parametrize("name", RUNS)
def test_each_bench_measures_every_variant(name, bench, capsys):
    arguments, count = RUNS[name]
    if name == "tiles":
        pytest.importorskip("triton", reason="Triton comes with torch's CUDA build; it is not here")
    if name == "llama":
        pytest.importorskip("llama_cpp", reason="llama-cpp-python is not here; bench/llama.py says how to run with it")
    status, rows = bench(name, arguments)
    assert (status, len(rows)) == (0, count)
    for row in rows:
        assert row["bench"] == name
        assert all(row[key] for key in ("what", "title", "device"))
        assert row["machine"]["cores"] > 0
        assert {"torch", "transformers"} <= row["versions"].keys()
    assert not capsys.readouterr().err


def test_a_variant_that_fails_does_not_stop_the_others(bench, capsys):
    status, rows = bench("roof", [*MODEL[:-4], "mha kv_rank=4", "mha"])
    assert status == 1
    assert [row["what"] for row in rows] == ["mha"]
    assert "mha kv_rank=4: " in capsys.readouterr().err


def test_out_of_time_nothing_further_is_begun(bench, capsys):
    assert bench("roof", [*MODEL, "--seconds", "0"]) == (0, [])
    assert capsys.readouterr().err.count("left out after 0 s") == len(VARIANTS)


@pytest.fixture
def all_benches(tmp_path, monkeypatch):
    """bench/all.py with other steps: {name: (share, what Python runs)}."""
    script = runpy.run_path(str(BENCH / "all.py"))

    def run(steps, minutes):
        monkeypatch.setattr(sys, "argv", ["all.py", "--minutes", str(minutes), "--out", str(tmp_path / "out")])
        for device in ("CPU", "GPU"):
            monkeypatch.setitem(script["main"].__globals__, device, steps)
        return script["main"]()

    signals = signal.SIGTERM, signal.SIGINT
    before = [signal.getsignal(each) for each in signals]
    yield run
    for each, handler in zip(signals, before, strict=True):
        signal.signal(each, handler)


def test_a_step_that_fails_or_takes_too_long_does_not_stop_the_others(all_benches, tmp_path, capsys):
    words = " ".join(f"'{word}'" for word in [*MODEL[:-4], "mha"])
    steps = {"slow": (1, "-c 'import time; time.sleep(60)'"), "broken": (1, "-c 1/0")}
    steps["paging"] = 20, f"bench/paging.py {words}"
    start = time.monotonic()
    assert all_benches(steps, minutes=0.7) == 1
    assert time.monotonic() - start < 45
    rows = [json.loads(line) for line in (tmp_path / "out" / "bench.jsonl").read_text().splitlines()]
    assert {row["bench"] for row in rows} == {"paging"}
    assert "ZeroDivisionError" in (tmp_path / "out" / "broken.log").read_text()
    printed = capsys.readouterr().out
    for line in ("slow: stopped after 2 s", "broken: failed with status 1", "paging: done"):
        assert line in printed


def test_a_signal_ends_the_current_step_and_keeps_what_was_written(all_benches, tmp_path, capsys):
    child = tmp_path / "child"
    kill = f"import os, signal, time; open('{child}', 'w').write(str(os.getpid()))"
    kill += "; os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)"
    with pytest.raises(SystemExit, match="143"):
        all_benches({"first": (1, "-c 'print(5)'"), "second": (1, f'-c "{kill}"'), "third": (1, "-c 1")}, minutes=1)
    with pytest.raises(ProcessLookupError):
        os.kill(int(child.read_text()), 0)
    assert (tmp_path / "out" / "first.log").read_text() == "5\n"
    assert not (tmp_path / "out" / "third.log").exists()
    assert "SIGTERM" in capsys.readouterr().err


def test_the_hour_is_one_by_arithmetic(monkeypatch, capsys):
    """As its file says; memory grows with the batch, and time with the tokens."""
    estimate = runpy.run_path(str(BENCH / "estimate.py"))
    monkeypatch.setattr(sys, "argv", ["estimate.py", "hour"])
    assert estimate["main"]() == 0
    minutes = dict(re.findall(r"hour on ([\w ]+): (\d+) minutes", capsys.readouterr().out))
    assert int(minutes["H100"]) <= 25
    assert int(minutes["RTX 4090"]) <= 60
    text = (BENCH.parent / "studies" / "hour.yaml").read_text(encoding="utf-8")
    assert f"it takes {minutes['RTX 4090']} and {minutes['H100']} minutes" in text
    study = parse_study(read_yaml(BENCH.parent / "studies" / "hour.yaml"))
    variant, chip = resolve_variants(study, 4096)[-1], estimate["CHIPS"]["H100"]
    one, two = (estimate["cost"](variant, tokens, study, chip) for tokens in (10**8, 2 * 10**8))
    assert two.seconds - estimate["START"] == pytest.approx(2 * (one.seconds - estimate["START"]))
    assert one.memory == two.memory < 10e9


@pytest.mark.parametrize("device", ["CPU", "GPU"])
def test_the_steps_run_files_that_exist(device):
    for share, command in runpy.run_path(str(BENCH / "all.py"))[device].values():
        files = [word for word in shlex.split(command) if word.endswith(".py")]
        assert share > 0
        assert files or command.startswith("-m kvfrontier check ")
        assert all((BENCH.parent / file).exists() for file in files)
