"""Training further on so that the cache merges (DMC): to its ratio, through the commands of a study."""

import json
import shutil

import pytest
import torch
from texts import MINIATURE, kvf, refused, user_folder

from archs import build
from archs.techniques import dmc, technique
from train.checkpoints import newest_whole
from train.module import Retrofit
from train.plan import Plan
from train.store import states
from train.study import load_data, parse_study

DMCS = [
    {"technique": "dmc", "budget": [1.0, 0.5], "train_tokens": 40_000, "lr": 0.005},
    {"technique": "dmc", "budget": 0.25, "train_tokens": 2048},
]
SHORT = "dmc-0.25-tokens-2048-lr-0.001"
STUDY = MINIATURE | {
    "corpus": {"files": ["texts/*.txt"], "tune": ["texts/1*.txt"], "test": ["texts/2*.txt"]},
    "model": MINIATURE["model"] | {"context": 32},
    "variants": [{"arch": "mha"}, {"arch": "mla", "kv_rank": 8, "rope_dim": 4}],
    "train": {"tokens": 20_480, "batch_tokens": 512, "lr": 0.005, "warmup_tokens": 1024, "checkpoint_steps": 50}
    | {"val_tokens": 512, "val_points": 2},
    "eval": {
        "loss_tokens": 2048,
        "decode": {"batch": [1], "context": [32]},
        "techniques": [{"technique": "full", "bits": 8, "residual": 0, "group": 8}, *DMCS],
    },
}


@pytest.fixture(scope="module")
def out(tmp_path_factory, two_figures):
    folder = user_folder(tmp_path_factory, "retrofit", STUDY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.runner.keep_weights", lambda directory: None)  # a test goes back to the one before
        assert kvf("run", folder / "study.yaml", "--out", folder / "out") == 0
    return folder / "out"


def measured(out, label):
    return json.loads((out / "runs" / label / "seed-0" / "record.json").read_text())["techniques"]


def test_an_mha_reaches_a_ratio_of_2(out):
    full, packed, same, half, _ = measured(out, "mha")
    assert packed["val_nats"] == pytest.approx(full["val_nats"], rel=1e-3)
    assert packed["bytes_held"] < 0.8 * full["bytes_held"]
    assert same["bytes_held"] == full["bytes_held"]
    assert 1.8 <= full["bytes_held"] / half["bytes_held"] <= 2.2
    assert same["val_nats"] < full["val_nats"]  # it was trained further
    assert "KV heads" in measured(out, "mla")[2]["skipped"]


def test_retrofits_are_runs_like_others(out, capsys):
    names = [f"mha seed 0 dmc-{budget}-tokens-40000-lr-0.005" for budget in ("1", "0.5")]
    assert [name for name in states(out) if "dmc" in name] == [*names, f"mha seed 0 {SHORT}"]
    assert set(states(out).values()) == {"done"}
    record = out / "retrofits" / "mha" / "seed-0" / SHORT / "record.json"
    written = record.stat().st_mtime_ns, (out / "results.json").stat().st_mtime_ns
    assert kvf("run", out) == 0
    assert (record.stat().st_mtime_ns, (out / "results.json").stat().st_mtime_ns) == written
    assert "all 2 runs are trained" in capsys.readouterr().err


def test_an_interrupted_retrofit_goes_on_to_the_same_weights(out):
    run = out / "retrofits" / "mha" / "seed-0" / "dmc-0.5-tokens-40000-lr-0.005"
    path, whole = newest_whole(run, print)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    losses = [line for line in lines if "val/loss" in line]
    path.unlink()  # as if it had been killed after the checkpoint before
    (run / "record.json").unlink()
    assert newest_whole(run, print)[1]["seen"]["tokens_seen"] < whole["seen"]["tokens_seen"]
    assert kvf("train", out) == 0
    again = newest_whole(run, print)[1]["state_dict"]
    assert all(torch.equal(weight, again[name]) for name, weight in whole["state_dict"].items())
    assert [line for line in (run / "metrics.jsonl").read_text().splitlines() if "val/loss" in line] == losses


def test_a_retrofit_that_failed_is_left_out_until_it_is_trained(out):
    run = out / "retrofits" / "mha" / "seed-0" / SHORT
    trained = json.loads((run / "record.json").read_text())
    failed = {"key": trained["key"], "failed": "no disk", "diverged": False, "oom": False}
    (run / "record.json").write_text(json.dumps(failed))
    assert kvf("eval", out) == 0
    assert measured(out, "mha")[4]["skipped"] == "its training failed: no disk"
    assert [kvf(stage, out) for stage in ("train", "eval")] == [0, 0]
    assert "bytes_held" in measured(out, "mha")[4]


def test_what_waits_for_a_retrofit_is_named(out, capsys):
    asked = "eval.techniques=[{technique: dmc, budget: 0.25, train_tokens: 1024}]"
    assert kvf("eval", out, "--set", asked) == 1
    assert "mha seed 0 is not evaluated: its retrofits (eval.techniques) are not trained yet" in capsys.readouterr().err


def test_another_base_run_is_another_retrofit(out):
    def keys(*overrides):
        study = parse_study(STUDY, overrides)
        plan = Plan(study, load_data(study, out.parent / "study.yaml", out), out)
        return [run.key for run in plan.look().retrofits]

    assert keys("eval.loss_tokens=4096") == keys()
    assert not set(keys("train.lr=0.004")) & set(keys())


def test_it_starts_as_the_model_that_was_trained(out, monkeypatch):
    """Before the decisions' element fades, and where nothing merges yet."""
    run = out / "runs" / "mha" / "seed-0"
    weights, config = newest_whole(run, print)[1]["state_dict"], json.loads((run / "config.json").read_text())
    module = Retrofit(technique("dmc", budget=0.5), "mha", config["options"], tokens=1000)
    module.load_state_dict(weights)
    plain = build("mha", **config["options"]).eval()
    plain.load_state_dict({name.removeprefix("model."): weight for name, weight in weights.items()})
    monkeypatch.setattr(dmc, "BIAS", -1e4)
    for block in module.model.blocks:
        block.attention.attended_D[0] = 1.0
    tokens = torch.randint(config["options"]["vocab_size"], (4, 32))
    for model in (module.model.eval(), module.model.train()):
        torch.testing.assert_close(model(tokens), plain(tokens), rtol=1e-4, atol=1e-4)


def test_a_retrofit_alone_waits_for_its_base(out, capsys):
    shutil.rmtree(out / "runs" / "mha")
    message = refused(capsys, "train", out.parent / "study.yaml", "--out", out, "--run", f"mha seed 0 {SHORT}")
    assert "goes on from mha seed 0, which is not trained yet" in message
