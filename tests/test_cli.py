"""The command line on a miniature study: what it writes, what it does again, what it says of bad input."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from texts import MINIATURE, kvf, refused, user_folder, write_texts

import kvfrontier
import plots
from archs import VARIANTS, Decoder
from eval.check import LIMIT
from train.files import lock

ROOT = Path(kvfrontier.__file__).parent
ARCHS = [arch for arch in VARIANTS if arch in ("mha", "mqa", "gqa", "mla", "yoco", "dsa", "delta")]
STUDY = MINIATURE | {
    "variants": [{"label": f"{arch}-0", "arch": arch, **VARIANTS[arch].examples[0]} for arch in ARCHS],
    "train": {"tokens": 1600, "batch_tokens": 64, "warmup_tokens": 64, "val_tokens": 128, "val_points": 5},
    "eval": {"loss_tokens": 256, "decode": {"batch": [1, 2], "context": [8, 32]}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return user_folder(tmp_path_factory, "user", STUDY)


def write_study(folder, name="mini.yaml", **changes):
    path = folder / name
    path.write_text(yaml.safe_dump(STUDY | changes))
    return str(path)


@pytest.fixture(scope="module")
def done(folder):
    out = folder / "out"
    assert kvf("run", write_study(folder), "--out", out) == 0
    return out


def test_a_study_writes_everything_that_the_contract_lists(done):
    results = json.loads((done / "results.json").read_text())
    labels = [v["label"] for v in STUDY["variants"]]
    assert [r["label"] for r in results["runs"]] == labels
    assert results["archs"] == list(VARIANTS)
    assert results["match"] == "none"
    for run in results["runs"]:
        assert run["kv"]["bytes_per_token"] == run["kv"]["formula_bytes_per_token"]
        assert run["kv"]["constant_bytes"] == run["kv"]["formula_constant_bytes"]
        assert len(run["decode"]) == 4
        assert run["train_tokens"] == 1600
        assert [point["tokens"] for point in run["curve"]] == [320, 640, 960, 1280, 1600]
        assert run["recompute"]["context"] == 32
        folder = done / "runs" / run["label"] / "seed-0"
        assert json.loads((folder / "record.json").read_text()) == run
        assert json.loads((folder / "config.json").read_text())["options"] == run["options"]
        assert len((folder / "metrics.jsonl").read_text().splitlines()) == 25 + 5
    with (done / "results.csv").open() as f:
        rows = list(csv.DictReader(f))
    assert [row["label"] for row in rows] == labels
    assert float(rows[0]["loss.val_bpb"]) == results["runs"][0]["loss"]["val_bpb"]
    assert float(rows[0]["decode.b2.c32.token_ms"]) == results["runs"][0]["decode"][3]["token_ms"]
    for name in ("frontier", "cache_bytes", "decode", "curves", "recompute"):
        assert len(list((done / "figures").glob(f"{name}*"))) == 5  # two widths as pdf and png, and the csv
    for name in ("tables/results.md", "tables/results.tex", "report.html"):
        assert all(label in (done / name).read_text() for label in labels)


def scalars(folder):
    return EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()


def test_tensorboard_has_the_same_tags_in_every_run_tokens_as_steps_and_hyperparameters_with_final_metrics(done):
    tags = []
    for variant in STUDY["variants"]:
        events = scalars(done / "runs" / variant["label"] / "seed-0")
        tags.append(sorted(events.Tags()["scalars"]))
        assert [e.step for e in events.Scalars("val/bpb")] == [320, 640, 960, 1280, 1600]
        assert [e.step for e in events.Scalars("train/loss")] == list(range(64, 1601, 64))
        assert not any(variant["label"] in tag or variant["arch"] in tag for tag in tags[-1])
    assert all(t == tags[0] for t in tags)
    assert {"final/val_bpb", "final/kv_bytes_per_token", "val/bpb", "train/loss"} <= set(tags[0])
    assert "figures/frontier" in scalars(done / "study").Tags()["images"]
    run = json.loads((done / "results.json").read_text())["runs"][0]
    events = scalars(done / "runs" / run["label"] / "seed-0")
    plugin = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    hparams = HParamsPluginData.FromString(plugin).session_start_info.hparams
    assert hparams["arch"].string_value == run["arch"]
    assert hparams["width"].number_value == 32
    (final,) = events.Scalars("final/val_bpb")
    assert final.value == pytest.approx(run["loss"]["val_bpb"], rel=1e-6)
    assert final.step == 1600


def snapshot(directory):
    return {p: p.stat().st_mtime_ns for p in directory.rglob("*") if p.is_file() and p.name != "plan.json"}


def test_kernels_are_checked_in_the_models_of_a_study(folder, capsys, monkeypatch):
    study = write_study(folder, "check.yaml", variants=STUDY["variants"][:1] + STUDY["variants"][-1:])
    assert kvf("check", study) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[:3] for line in lines] == [
        [variant["label"], what, "float32"]
        for variant in (STUDY["variants"][0], STUDY["variants"][-1])
        for what in ("training", "decode")
    ]
    assert all(0 < float(line.split()[3]) < 1e-3 for line in lines)
    monkeypatch.setattr("eval.check.LIMIT", dict.fromkeys(LIMIT, 0.0))
    assert kvf("check", study) == 1
    out, err = capsys.readouterr()
    assert out.count("more than 0.0") == 4
    assert err == "kvfrontier: 4 of the checks failed\n"


def test_the_same_command_again_does_nothing(done, folder):
    before = snapshot(done)
    assert kvf("run", write_study(folder), "--out", done) == 0
    assert snapshot(done) == before


def test_a_changed_value_redoes_what_it_touches(done, folder):
    done = shutil.copytree(done, folder / "changed")
    before = snapshot(done)
    variants = [dict(v) for v in STUDY["variants"]]
    changed = next(v for v in variants if "kv_rank" in v)
    changed["kv_rank"] += 8
    study = write_study(folder, "changed.yaml", variants=variants)
    assert [kvf(stage, study, "--out", done) for stage in ("train", "eval")] == [0, 0]
    after = snapshot(done)
    retrained = {p.parts[-4] for p in before if p.suffix == ".ckpt" and before[p] != after.get(p)}
    assert retrained == {changed["label"]}
    results = json.loads((done / "results.json").read_text())
    assert {r["options"]["kv_rank"] for r in results["runs"] if r["label"] == changed["label"]} == {changed["kv_rank"]}


def test_stages_one_by_one_and_by_the_directory_alone(folder, capsys, two_figures):
    out = folder / "stages"
    study = write_study(folder, "stages.yaml", variants=STUDY["variants"][:2])
    assert "no run in" in refused(capsys, "eval", study, "--out", out)
    refused(capsys, "status", out)
    assert kvf("train", study, "--out", out) == 0
    assert kvf("status", out) == 0
    assert capsys.readouterr().out.count("trained, not evaluated") == 2
    assert kvf("eval", out) == 0
    assert kvf("status", out) == 0
    assert capsys.readouterr().out.count("done") == 2
    assert not (out / "report.html").exists()
    assert kvf("plot", out) == 0
    assert (out / "report.html").exists()
    for techniques, asked in ("[{technique: full}]", True), ("[]", False):
        record = next((out / "runs").rglob("record.json"))
        record.write_text(json.dumps(json.loads(record.read_text()) | {"lm_eval": {"task": {"acc": 0.5}}}))
        assert kvf("eval", out, "--set", "eval.loss_tokens=128", "--set", f"eval.techniques={techniques}") == 0
        runs = json.loads((out / "results.json").read_text())["runs"]
        assert {r["loss"]["tokens"] for r in runs} == {128}
        assert {"techniques" in r for r in runs} == {asked}  # what was measured for another study is gone
        assert [r["lm_eval"] for r in runs if "lm_eval" in r] == [{"task": {"acc": 0.5}}]
    before = snapshot(out), (out / "plan.json").read_text()
    refused(capsys, "eval", out, "--set", "train.lr=1.0")
    assert (snapshot(out), (out / "plan.json").read_text()) == before


def test_families_tuned_rates_and_an_a_a_comparison_end_to_end(folder, capsys):
    """The same variant under two labels is the same to the last bit, and not separable; everything is done once."""
    out = folder / "tuned"
    variants = [{"label": label, "arch": "mha"} for label in "ab"] + [{"arch": "gqa", "kv_heads": [2, 1]}]
    train = STUDY["train"] | {"tokens": 512, "val_points": 2, "lr": [1e-3, 4e-3], "tuning_seeds": 1}
    measured = {"loss_tokens": 256, "decode": {"batch": [1], "context": [8]}}
    study = write_study(folder, "tuned.yaml", variants=variants, train=train, seeds=[0, 1], eval=measured)
    refused(capsys, "eval", study, "--out", out)
    assert kvf("train", study, "--out", out) == 0
    assert kvf("eval", out) == 0
    results = json.loads((out / "results.json").read_text())
    assert [r["label"] for r in results["runs"] if r["seed"] == 0] == ["a", "b", "gqa-2", "gqa-1"]
    a, b = ([r["loss"] for r in results["runs"] if r["label"] == label] for label in "ab")
    assert a == b
    compared = [c["verdict"] for c in [*results["comparisons"], *results["details"]] if c["label"] == "b"]
    assert set(compared) == {"not separable"}
    for run in results["runs"]:
        rates = {rate["lr"]: rate["val_bpb"] for rate in run["tuning"]["rates"]}
        best = min(rates, key=rates.get)
        assert len(rates) >= 4
        assert best / 4 <= run["train"]["lr"] == run["tuning"]["lr"] <= 4 * best
        assert run["tuning"]["seeds"] == [1000]
    found = {entry["family"]: entry["labels"] for entry in results["bytes_for_baseline"]}
    assert found == {"a": ["a"], "b": ["b"], "gqa": ["gqa-1", "gqa-2"]}
    assert {row["label"] for row in results["matching"]["heads"]} == {"a", "b", "gqa-2", "gqa-1"}
    capsys.readouterr()
    assert kvf("status", out) == 0
    states = capsys.readouterr().out.splitlines()
    assert "a lr 0.001 seed 1000  done" in states
    assert {line.rsplit("  ", 1)[1] for line in states} == {"done"}
    before = snapshot(out)
    assert [kvf(stage, study, "--out", out) for stage in ("train", "eval")] == [0, 0]
    assert snapshot(out) == before


def test_the_generated_recall_task_goes_through_the_same_stages(folder, two_figures):
    out = folder / "recall"
    corpus, tokenizer = {"name": "mqar", "pairs": [1, 2]}, {"name": "ids", "vocab_size": 16}
    study = write_study(folder, "recall.yaml", corpus=corpus, tokenizer=tokenizer, variants=STUDY["variants"][:2])
    assert kvf("run", study, "--out", out) == 0
    results = json.loads((out / "results.json").read_text())
    assert (results["corpus"]["name"], results["corpus"]["pairs"]) == ("mqar", [1, 2])
    assert {c["metric"] for c in results["comparisons"]} == {"val_bpb", "accuracy"}
    assert all(run["loss"]["accuracy_at"].keys() == {"1", "2"} for run in results["runs"])
    assert (out / "figures" / "recall.pdf").exists()
    assert kvf("export", next((out / "runs").glob("*/seed-0")), out / "hf") == 0
    assert {"config.json", "generation_config.json", "model.safetensors"} == {
        path.name for path in (out / "hf").iterdir()
    }
    (out / "plan.json").write_text("damaged")
    assert kvf("eval", study, "--out", out) == 0  # the file of the study is enough


def test_needles_in_a_text_go_through_the_same_stages(folder, two_figures):
    out, corpus = folder / "needle", {"name": "needle", "text": STUDY["corpus"], "needles": 2, "curriculum": 1}
    more = {"model": STUDY["model"] | {"context": 128}, "train": STUDY["train"] | {"batch_tokens": 256, "tokens": 1024}}
    techniques = [{"technique": "streaming-llm", "budget": 0.5}]
    more["eval"] = STUDY["eval"] | {"loss_tokens": 1024, "technique_tokens": 1024, "techniques": techniques}
    more |= {"tokenizer": {"name": "ids", "vocab_size": 16}, "variants": STUDY["variants"][:1]}
    study = write_study(folder, "needle.yaml", corpus=corpus, **more)
    assert kvf("run", study, "--out", out) == 0
    results = json.loads((out / "results.json").read_text())
    assert (results["corpus"]["name"], results["corpus"]["text"]) == ("needle", "files")
    (run, *_) = results["runs"]
    assert run["loss"]["accuracy_at"].keys() == {"2"}
    assert set(run["loss"]["accuracy_at_distance"]) <= {str(2**n) for n in range(8)}
    assert {(row["kind"], row["pairs"]) for row in results["bytes_for_accuracy"]} == {("full", 2), ("streaming-llm", 2)}
    assert kvf("eval", out) == 0


def test_no_study_reads_its_own_output_or_its_cache_and_a_worker_reads_no_text(
    tmp_path, monkeypatch, capsys, two_figures
):
    write_texts(tmp_path)
    (tmp_path / "texts" / "0.md").write_text("# A heading\n" * 99)
    (tmp_path / "texts" / "0.jsonl").write_text('{"text": "A row"}\n' * 99)
    patterns = {"files": ["**/*.md", "**/*.jsonl", "**/*"]}
    write_study(tmp_path, "all.yaml", corpus=patterns, variants=STUDY["variants"][:1])
    monkeypatch.setenv("KVFRONTIER_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    assert kvf("run", "all.yaml") == 0
    before = snapshot(Path("runs"))
    assert {path.suffix for path in before} > {".md", ".jsonl", ".json"}
    capsys.readouterr()
    assert kvf("run", "all.yaml") == 0
    assert "all 1 runs are trained" in capsys.readouterr().err
    assert snapshot(Path("runs")) == before
    shutil.rmtree("texts")
    (record,) = Path("runs/all/runs").glob("*/seed-0/record.json")
    shutil.rmtree(record.parent)
    assert kvf("train", "all.yaml", "--run", f"{record.parts[-3]} seed 0") == 0
    assert "no file matches 'texts/*" in refused(capsys, "train", "all.yaml", "--set", "corpus={files: ['texts/*']}")


def test_rates_and_curves_are_of_tune_and_the_record_is_of_test(folder, capsys):
    """In a study of tokens made elsewhere, which is trained on them several times over."""
    same = np.tile(np.frombuffer(b"The same line.\n", np.uint8), 60).astype(np.uint16)
    noise = np.random.default_rng(0).integers(257, size=900).astype(np.uint16)
    for name, ids in (("train", same), ("val", same), ("test", noise)):
        ids.tofile(folder / f"{name}.bin")
    corpus = {"tokens": ["*.bin"], "tokenizer": "bytes"}
    changes = {"variants": STUDY["variants"][:1], "train": STUDY["train"] | {"lr": [4e-3, 8e-3, 2e-3]}}
    study = write_study(folder, "tokens.yaml", corpus=corpus, **changes)
    assert [kvf(stage, study, "--out", folder / "tokens") for stage in ("train", "eval")] == [0, 0]
    assert "training on 1,600 tokens goes 1.8 times over the corpus, which has 900\n" in capsys.readouterr().err
    results = json.loads((folder / "tokens" / "results.json").read_text())
    (run,) = results["runs"]
    assert [results["corpus"][f"{name}_tokens"] for name in ("train", "tune", "val")] == [900] * 3
    tried = [rate["val_bpb"] for rate in run["tuning"]["rates"]] + [run["curve"][-1]["val_bpb"]]
    assert max(tried) < 6 < 8 < run["loss"]["val_bpb"]


BAD = [
    ({"corpus": {"files": ["nothing/*.txt"]}}, "nothing/*.txt"),
    ({"corpus": {"files": ["tiny.txt"]}}, "tokens in the split 'train', too few"),
    ({"corpus": {"files": ["tiny.txt"], "column": 3}}, "corpus.column=3: must be text"),
    ({"tokenizer": {"name": "gpt2"}}, "gpt2"),
    ({"trian": {"tokens": 5}}, "did you mean 'train'"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_input_is_one_line_and_status_2(folder, capsys, monkeypatch, changes, message):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(folder / "no-encodings"))
    (folder / "tiny.txt").write_text("So short.")
    out = folder / "bad"
    assert message in refused(capsys, "run", write_study(folder, "bad.yaml", **changes), "--out", out)
    assert not (out / "runs").exists()


def test_commands_about_nothing_are_one_line_and_status_2(folder, capsys):
    for arguments in (
        ("run", "no-such-study"),
        ("status", folder / "nowhere"),
        ("plot", folder / "nowhere"),
        ("plot", write_study(folder), "--out", folder / "never-run"),
    ):
        assert refused(capsys, *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "quick", "--workers", "0"], "argument --workers: '0' must be a whole number, 1 to 1024"),
        (["run", "--workers", "2", "--ray"], "argument --ray: not allowed with argument --workers"),
        (["trian"], "invalid choice: 'trian'"),
        (["run", "--out", ""], "argument --out: is empty"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_wrong_arguments_are_one_line_and_status_2(arguments, message, capsys):
    assert message in refused(capsys, *arguments)


def test_help_answers_in_under_a_second_and_without_torch():
    times, check = [], "import sys, kvfrontier as k\ntry: k.main(['--help'])\nfinally: print('torch' in sys.modules)"
    for _ in range(3):
        began = time.perf_counter()
        output = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, cwd=ROOT).stdout
        times.append(time.perf_counter() - began)
    assert min(times) < 1
    assert all(word in output for word in ("run", "train", "eval", "plot", "status"))
    assert output.endswith("False\n")


def test_what_a_cache_holds_beside_its_formula_fails_the_run_and_the_command(folder, monkeypatch, capsys):
    study, out = write_study(folder, "broken.yaml", variants=STUDY["variants"][:2]), folder / "broken"
    assert kvf("train", study, "--out", out) == 0
    wrong_label, label = (variant["label"] for variant in STUDY["variants"][:2])
    right = Decoder.kv_bytes_per_token

    def wrong(self, dtype):
        return right(self, dtype) + (type(self) is VARIANTS[STUDY["variants"][0]["arch"]])

    monkeypatch.setattr(Decoder, "kv_bytes_per_token", wrong)
    assert kvf("eval", out) == 1
    assert f"{wrong_label} seed 0 could not be evaluated" in capsys.readouterr().err
    assert [run["label"] for run in json.loads((out / "results.json").read_text())["runs"]] == [label]
    monkeypatch.undo()
    assert kvf("eval", out) == 0
    assert len(json.loads((out / "results.json").read_text())["runs"]) == 2


def test_a_signal_while_modules_load_does_not_come_to_them(tmp_path, monkeypatch):
    """Whether this file is importing is told from the stack; what others import while it trains does not count."""
    probe = "import sys, kvfrontier\nSAID = kvfrontier._is_importing(sys._getframe())"
    for name, asks, expected in (("first", kvfrontier.__file__, True), ("second", __file__, False)):
        (tmp_path / f"{name}_probe.py").write_text(probe)
        (tmp_path / f"{name}_asks.py").write_text(f"import {name}_probe")  # imported by what is imported
        monkeypatch.syspath_prepend(tmp_path)
        exec(compile(f"import {name}_asks", asks, "exec"), {})
        assert expected == sys.modules[f"{name}_probe"].SAID
    assert not kvfrontier._is_importing(sys._getframe())


def test_what_was_drawn_in_part_is_drawn_again_by_one_at_a_time(done, tmp_path, two_figures):
    out = tmp_path / "part"
    shutil.copytree(done, out)
    assert plots.is_drawn(out)
    os.utime(out / "figures" / "frontier.png")  # a drawing that ended before its report
    assert not plots.is_drawn(out)
    shutil.rmtree(out / "figures")
    with ThreadPoolExecutor(1) as pool, lock(out / "drawing"):
        drawn = pool.submit(kvf, "plot", out)
        time.sleep(0.5)
        assert not (out / "figures").exists()
    assert drawn.result() == 0
    assert plots.is_drawn(out)
    assert not list(out.rglob("*.tmp"))


def test_who_stops_reading_or_closes_the_output_ends_it_quietly(done, monkeypatch):
    read, write = os.pipe()
    os.close(read)
    code = f"import sys, kvfrontier; sys.exit(kvfrontier.main(['status', {str(done)!r}]))"
    ended = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(write)
    assert (ended.returncode, ended.stderr) == (128 + signal.SIGPIPE, "")
    monkeypatch.setattr(sys, "stdout", None)
    assert kvf("status", done) == 0


@pytest.mark.parametrize("plan", ['{"a": 1}', "", '{"runs": [], "settings": {}}', '{"runs": null}'])
def test_a_damaged_plan_is_one_line_and_status_2(plan, tmp_path, capsys):
    (tmp_path / "plan.json").write_text(plan)
    for command in ("status", "train", "eval"):
        message = refused(capsys, command, tmp_path)
        assert "plan.json is damaged: give the study's YAML file with --out" in message


def test_a_study_is_found_by_file_directory_or_results(done, folder, tmp_path, monkeypatch, capsys):
    """By its file in runs/ of the current folder, unless another file of that name has its runs there."""
    (folder / "elsewhere" / "runs").mkdir(parents=True)
    shutil.copytree(done, folder / "elsewhere" / "runs" / "mini", symlinks=True)
    monkeypatch.chdir(folder / "elsewhere")
    capsys.readouterr()
    for name in (done, done / "results.json", folder / "mini.yaml"):
        assert kvf("status", name) == 0
    states = capsys.readouterr().out
    assert states == 3 * states[: len(states) // 3]
    assert states.count("yoco-0 seed 0  done") == 3
    before = snapshot(Path("runs"))
    study = write_study(tmp_path, "mini.yaml")
    assert re.search(
        r"runs/mini has the runs of .*mini.yaml, another study; name another", refused(capsys, "run", study)
    )
    assert snapshot(Path("runs")) == before
    (folder / "mini.yaml").rename(folder / "moved.yaml")
    try:
        assert kvf("status", study) == 0
    finally:
        (folder / "moved.yaml").rename(folder / "mini.yaml")
