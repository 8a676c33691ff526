"""The loggers that a study names get what metrics.jsonl gets, also of a run that was stopped and goes on."""

import csv
import importlib.util
import json
import signal

import pytest
from miniature import one_run, train
from texts import refusal

from train.callbacks import ShowProgress
from train.errors import Interrupted


def logged(path):
    with path.open() as f:
        return {
            (int(row["step"]), tag): float(x) for row in csv.DictReader(f) for tag, x in row.items() if x and "/" in tag
        }


def written(run):
    rows = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    return {(row["tokens"], tag): value for row in rows for tag, value in row.items() if tag != "tokens"}


def test_csv_has_every_metric_of_a_run_that_was_stopped(data, tmp_path, monkeypatch):
    plan, run = one_run(data, tmp_path, loggers=["csv"], checkpoint_steps=4)

    def stop_at_12(self, trainer, module, outputs, batch, n):
        if n == 11:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(ShowProgress, "on_train_batch_end", stop_at_12)
        with pytest.raises(Interrupted):
            train(plan, run)
    train(plan, run)
    assert not [*run.directory.glob("events*")]
    found, expected = logged(run.directory / "metrics.csv"), written(run)
    assert found.keys() == expected.keys()
    assert all(value == pytest.approx(expected[key]) for key, value in found.items())
    assert "heads: 2" in (run.directory / "hparams.yaml").read_text()


def test_a_logger_may_be_given_as_a_class_and_changes_no_result(data, tmp_path):
    plain, other = (
        one_run(data, tmp_path / name, **how)
        for name, how in (("a", {}), ("b", {"loggers": ["lightning.pytorch.loggers:CSVLogger", "tensorboard"]}))
    )
    assert plain[1].key == other[1].key
    train(*other)
    (path,) = other[1].directory.rglob("metrics.csv")
    assert logged(path).keys() == written(other[1]).keys()


@pytest.mark.parametrize("name", ["csw", "nowhere:Logger", "json:Logger"])
def test_a_logger_that_is_not_there_is_one_line(data, tmp_path, name):
    message = refusal(train, *one_run(data, tmp_path, loggers=[name]))
    assert message.startswith(f"train.loggers: '{name}' cannot be used")
    assert "tensorboard, csv, wandb" in message


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_wandb_without_its_extra_is_one_line(data, tmp_path):
    assert "--extra wandb" in refusal(train, *one_run(data, tmp_path, loggers=["wandb"]))


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb, an extra, is not installed")
def test_wandb_writes_a_run_offline(data, tmp_path):
    plan, run = one_run(data, tmp_path, loggers=["wandb"])
    train(plan, run)
    (folder,) = run.directory.glob("wandb/offline-run-*")
    assert [*folder.glob("*.wandb")]
