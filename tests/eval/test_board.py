"""TensorBoard's answers, asked over HTTP, about a study of two variants with three seeds each."""

import json
import shutil
import statistics
import urllib.request
from types import SimpleNamespace

import pytest
from tensorboard import program
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from texts import MINIATURE, evaluated_study, kvf

from eval.board import write_board

SEEDS = [0, 1, 2]
STUDY = MINIATURE | {
    "variants": [
        {"arch": "mha"},
        {"arch": "mla", "kv_rank": 8, "rope_dim": 4},
        {"arch": "yoco", "kv_heads": 1, "window": 8},
    ],
    "seeds": SEEDS,
    "train": {"tokens": 640, "batch_tokens": 64, "val_tokens": 64, "val_points": 2, "precision": "fp32"},
    "eval": {"loss_tokens": 64, "decode": {"batch": [1], "context": [8], "seeds": [0]}},
}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return evaluated_study(tmp_path_factory, "board", STUDY)


@pytest.fixture(scope="module")
def ask(study):
    board = program.TensorBoard()
    board.configure(argv=[None, "--logdir", str(study), "--port", "0", "--load_fast", "false"])
    url = board.launch()

    def ask(path: str, **body):
        data = json.dumps(body).encode() if body else None
        request = urllib.request.Request(f"{url}{path}", data, {"Content-Type": "application/json"})
        return json.loads(urllib.request.urlopen(request, timeout=60).read())

    return ask


def test_the_hparams_table_has_each_option_as_a_column_and_each_variant_as_a_group_of_its_seeds(study, ask):
    experiment = ask("data/plugin/hparams/experiment", experimentName="")
    columns = {info["name"]: info["differs"] for info in experiment["hparamInfos"]}
    assert {"kv_rank", "rope_dim", "window", "self_decoder", "kv_heads", "arch", "lr", "width"} <= columns.keys()
    assert (columns["arch"], columns["kv_rank"], columns["width"]) == (True, True, False)
    metrics = [info["name"]["tag"] for info in experiment["metricInfos"]]
    assert metrics[0] == "final/val_bpb"
    runs = json.loads((study / "results.json").read_text())["runs"]
    assert {"final/val_bpb", "final/kv_bytes_per_token", "final/decode_tokens_per_s", "final/train_mfu"} <= {*metrics}
    body = {
        "experimentName": "",
        "allowedStatuses": ["STATUS_SUCCESS"],
        "startIndex": 0,
        "sliceSize": 100,
        "colParams": [{"metric": {"group": "", "tag": tag}} for tag in metrics],
        "aggregationType": "AGGREGATION_AVG",
    }
    groups = ask("data/plugin/hparams/session_groups", **body)["sessionGroups"]
    assert {group["name"]: len(group["sessions"]) for group in groups} == {"mha": 3, "mla": 3, "yoco": 3}
    for group in groups:
        found = {value["name"]["tag"]: value["value"] for value in group["metricValues"]}
        losses = [run["loss"]["val_bpb"] for run in runs if run["label"] == group["name"]]
        assert found["final/val_bpb"] == pytest.approx(statistics.mean(losses), rel=1e-5)
        assert {*metrics} == {*found}
        assert ("kv_rank" in group["hparams"]) == (group["name"] == "mla")


def test_means_over_seeds_are_runs_of_their_own_with_what_lies_a_deviation_around_them(study):
    means = EventAccumulator(str(study / "mean" / "mla")).Reload()
    rows = [json.loads(line) for line in (study / "runs/mla/seed-0/metrics.jsonl").read_text().splitlines()]
    tags = {tag for row in rows for tag in row if tag != "tokens"}
    assert {*means.Tags()["scalars"]} == {f"{tag}{end}" for tag in tags for end in ("", "_low", "_high")}
    seeds = [EventAccumulator(str(study / "runs" / "mla" / f"seed-{seed}")).Reload() for seed in SEEDS]
    for events in zip(*(each.Scalars("val/bpb") for each in (means, *seeds)), strict=True):
        assert len({event.step for event in events}) == 1
        assert events[0].value == pytest.approx(statistics.mean(event.value for event in events[1:]), rel=1e-6)
    low, high = (means.Scalars(f"val/bpb_{end}")[-1].value for end in ("low", "high"))
    assert high - low == pytest.approx(
        2 * statistics.stdev(each.Scalars("val/bpb")[-1].value for each in seeds), rel=1e-3
    )


def test_charts_with_all_variants_in_one(ask):
    layout = ask("data/plugin/custom_scalars/layout")
    (loss, _) = layout["category"]
    (overlaid, margin) = loss["chart"]
    assert overlaid["multiline"]["tag"] == ["^val/bpb$"]
    assert margin["margin"]["series"] == [{"value": "val/bpb", "lower": "val/bpb_low", "upper": "val/bpb_high"}]


def test_one_seed_has_no_chart_of_means(study, tmp_path):
    """TensorBoard would show an empty chart and an error."""
    (record, *_) = json.loads((study / "results.json").read_text())["runs"]
    directory = tmp_path / "runs" / "mha" / "seed-0"
    shutil.copytree(study / "runs" / "mha" / "seed-0", directory)
    write_board(tmp_path, [(SimpleNamespace(directory=directory, variant=SimpleNamespace(label="mha")), record)])
    (event,) = EventAccumulator(str(tmp_path / "study")).Reload().Tensors("custom_scalars__config__")
    layout = Layout.FromString(event.tensor_proto.string_val[0])
    assert [len(category.chart) for category in layout.category] == [1, 1]


def test_a_second_evaluation_leaves_one_file_in_each_place(study):
    files = {path.relative_to(study).parent for path in study.rglob("*.final")}
    (study / "results.json").unlink()
    assert kvf("eval", study) == 0
    again = [path.relative_to(study).parent for path in study.rglob("*.final")]
    assert sorted(again) == sorted(files)
