"""The side-by-side scripts run, at a miniature size, and say what they measured."""

import contextlib
import json
import runpy
import sys
from pathlib import Path

import pytest
from texts import write_texts

BENCH = Path(__file__).parents[2] / "bench"
SMALL = ["--batch", "2", "--context", "24", "--device", "cpu"]
VARIANTS = ["mha", "gqa kv_heads=2", "mla kv_rank=16 rope_dim=8", "yoco kv_heads=4 window=8"]
MODEL = ["--width", "32", "--layers", "2", "--heads", "4", "--vocab-size", "64", *SMALL, "--variants", *VARIANTS]
LAYER = ["--heads", "4", "--head-dim", "16", "--kv-rank", "16", "--rope-dim", "8", *SMALL]
RUNS = {  # arguments, rows that are printed
    "decode": ([*MODEL, "--decode-repeats", "2", "--prefill-repeats", "1"], 2 * 3 + 1),
    "training": ([*MODEL, "--repeats", "2", "--no-compile"], 4 + 1),
    "roof": (MODEL, 4),
    "attention": ([*LAYER, "--repeats", "2"], 4),
    "tiles": ([*LAYER, "--dtype", "fp32", "--repeats", "1", "--slots", "16", "--programs", "2"], 3 * 3),
    "paging": ([*MODEL, "--repeats", "2", "--tokenizer", "bytes"], 4 * 2 * 4),
}


@pytest.mark.parametrize("name", RUNS)
def test_each_script_measures_every_variant(name, tmp_path, monkeypatch, capsys):
    arguments, rows = RUNS[name]
    if name == "tiles":
        split_kv = pytest.importorskip("archs.split_kv", reason="Triton comes with torch's CUDA build; it is not here")
        monkeypatch.setattr(split_kv, "tiling", split_kv.tiling)  # put back if it fails
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments, "--json", str(tmp_path / "numbers.jsonl")])
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.setattr("eval.speed.ROOF_BYTES", {"cpu": 2**20})
    monkeypatch.setenv("KVFRONTIER_CACHE", str(tmp_path))
    with contextlib.suppress(SystemExit):
        runpy.run_path(str(BENCH / f"{name}.py"), run_name="__main__")
    numbers = [json.loads(line) for line in (tmp_path / "numbers.jsonl").read_text().splitlines()]
    assert len(numbers) == rows
    assert all(row["machine"] and row["what"] for row in numbers)
    assert not capsys.readouterr().err


def test_a_variant_that_fails_does_not_take_the_others_with_it(monkeypatch, capsys):
    arguments = ["roof.py", *MODEL[:-4], "mha kv_rank=4", "mha"]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.setattr("eval.speed.ROOF_BYTES", {"cpu": 2**20})
    with pytest.raises(SystemExit, match="1"):
        runpy.run_path(str(BENCH / "roof.py"), run_name="__main__")
    said = capsys.readouterr()
    assert "mha kv_rank=4: " in said.err
    assert "split-kv" in said.out


def test_the_gpu_script_runs_scripts_that_exist(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    parts = runpy.run_path(str(BENCH / "gpu.py"))["PARTS"]
    for steps in parts.values():
        assert sum(seconds for _, seconds, _ in steps) <= 600
        for _, _, command in steps:
            assert all((BENCH.parent / word).exists() for word in command if word.endswith(".py"))


def test_the_study_goes_on_from_the_archive_of_an_earlier_piece(tmp_path, monkeypatch, capsys):
    import kvfrontier

    write_texts(tmp_path)
    study = {
        "corpus": {"files": ["texts/*.txt"]},
        "tokenizer": {"name": "bytes"},
        "model": {"width": 32, "layers": 2, "heads": 4, "context": 16},
        "match": "none",
        "variants": [{"arch": "mha"}, {"arch": "yoco", "kv_heads": 1, "window": 8}],
        "seeds": [0, 1],
        "train": {"tokens": 640, "batch_tokens": 64, "val_tokens": 64, "val_points": 2},
        "eval": {"loss_tokens": 128, "decode": {"batch": [1], "context": [8], "seeds": [1]}},
    }
    (tmp_path / "mini.yaml").write_text(json.dumps(study))
    monkeypatch.setenv("KVFRONTIER_CACHE", str(tmp_path / "cache"))
    arguments = ["--out", "out", "--study", str(tmp_path / "mini.yaml"), "--fit-context", "64", "--fit-gb", "0.001"]

    def piece(place, *more):
        (tmp_path / place).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / place)
        monkeypatch.setattr(sys, "argv", ["h100.py", *arguments, *more])
        script = runpy.run_path(str(BENCH / "h100.py"))
        did = []

        def in_process(command, seconds):
            did.append(command[0])
            return 0 if command[0] == "plot" else kvfrontier.main(command)

        monkeypatch.setitem(script["main"].__globals__, "kvfrontier", in_process)
        assert script["main"]() == 0
        assert did == ["train", "eval", "plot"]
        return json.loads(Path("runs/mini/results.json").read_text())

    first = piece("a")
    assert [bool(run["decode"]) for run in first["runs"]] == [False, True, False, True]
    fits = json.loads(Path("runs/mini/fits.json").read_text())["batch"]
    for label, cache_bytes in ("mha", 64 * 512), ("yoco", 64 * 64 + 8 * 64):
        assert fits[label]["bytes_a_sequence"] == cache_bytes
        assert 0 < fits[label]["tried"] <= fits[label]["computed"] == (10**6 - weights(first, label)) // cache_bytes
    capsys.readouterr()
    assert piece("b", "--from", str(tmp_path / "a" / "out" / "mini.tar.gz")) == first
    assert not list(Path("runs").rglob("*.ckpt"))  # nothing was trained again
    assert len(json.loads(Path("runs/mini/pieces.json").read_text())) == 2


def weights(results, label):
    return 4 * next(run["params"] for run in results["runs"] if run["label"] == label)
