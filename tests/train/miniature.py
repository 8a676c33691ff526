"""What several test files use: a miniature study, and training it."""

import json

import pytest

from train.checkpoints import newest_whole
from train.plan import Plan
from train.progress import StudyProgress
from train.runner import InProcess, train_run
from train.study import parse_study
from train.workers import train_with


def tiny_study(**train):
    """An MHA and an MQA that train for 24 steps."""
    return parse_study(
        {
            "tokenizer": {"name": "bytes"},
            "model": {"width": 32, "layers": 2, "heads": 2, "context": 16, "dropout": 0.1},
            "variants": [{"arch": "mha"}, {"arch": "mqa"}],
            "train": {"tokens": 128 * 24, "batch_tokens": 128, "val_tokens": 64, "val_points": 4, "precision": "fp32"}
            | {"warmup_tokens": 128, **train},
        }
    )


def one_run(data, directory, **train):
    """(plan, run) of a miniature study of the MHA alone."""
    plan = Plan(parse_study(tiny_study(**train).model_dump() | {"variants": [{"arch": "mha"}]}), data, directory)
    return plan, plan.look().runs[0]


def train_runs(plan):
    """Trains a plan in this process; returns the failures."""
    with StudyProgress("training", 0) as progress:
        return train_with(InProcess(plan, progress), plan, progress)


def train(plan, run):
    with StudyProgress("training", 1) as progress:
        train_run(plan, run, progress)


def weights(run):
    return newest_whole(run.directory, pytest.fail)[1]["state_dict"]


def metrics(directory):
    """The lines of metrics.jsonl, times left out."""
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("train/tokens_per_s", "train/mfu")} for row in rows]
