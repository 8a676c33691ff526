"""A study on a pretended GPU, from the first step to its results."""

import pytest
import torch
from miniature import tiny_study, train_runs
from pretend_gpu import pretended_gpu

from eval.check import checks
from eval.evaluate import evaluate_runs
from eval.results import write_results
from train.files import read_json
from train.plan import Plan
from train.study import parse_study

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: nothing has to be pretended")


def test_a_study_is_trained_and_evaluated(data, tmp_path):
    settings = tiny_study(tokens=128 * 4, val_points=2, precision="auto").model_dump()
    settings["eval"] |= {"loss_tokens": 64, "decode": {"batch": [2], "context": [8]}}
    study = parse_study(settings)
    with pretended_gpu():
        plan = Plan(study, data, tmp_path)
        assert train_runs(plan) == []
        assert evaluate_runs(plan) == []
        assert write_results(plan) == 2
        assert all(check.passed for check in checks(study, tmp_path / "study.yaml"))
    results = read_json(tmp_path / "results.json")
    for run in results["runs"]:
        assert run["precision"] == "bf16"
        assert run["train"]["device"] == "pretended GPU"
        (point,) = run["decode"]
        assert (point["device"], point["backend"]) == ("cuda", "split-kv triton, cuda graph")
