"""lm-eval's tasks on trained runs agree with transformers on exported ones, and with the model itself."""

import json

import pytest
from texts import MINIATURE, evaluated_study, kvf, refused

pytest.importorskip("lm_eval", reason="lm-eval, an extra, is not installed")

import lm_eval
import lm_eval.models
from lm_eval.tasks import TaskManager

import eval.harness  # noqa: F401  the registry then knows runs
from plots import load, tables

STUDY = MINIATURE | {
    "tokenizer": {"name": "bpe", "vocab_size": 300},
    "model": {"width": 32, "layers": 2, "heads": 4, "context": 64},
    "variants": [{"arch": "mla", "kv_rank": 8, "rope_dim": 4}, {"arch": "yoco", "kv_heads": 1, "window": 8}],
    "train": {"tokens": 1280, "batch_tokens": 64, "val_tokens": 64, "val_points": 1, "precision": "fp32"},
    "eval": {"loss_tokens": 64, "decode": {"batch": [1], "context": [8]}},
}
COMMON = "dataset_path: json\ndataset_kwargs: {{data_files: {{test: {path}}}}}\ntest_split: test\n"
TASKS = {
    "choice": 'output_type: multiple_choice\ndoc_to_text: "{{question}}"\ndoc_to_choice: ["self", "return x", "the"]\n'
    "doc_to_target: answer\nmetric_list: [{metric: acc}]\n",
    "text": 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
    "metric_list: [{metric: bits_per_byte}]\n",
    "made": 'output_type: generate_until\ndoc_to_text: "{{question}}"\ndoc_to_target: "self"\n'
    'generation_kwargs: {until: ["\\n"], max_gen_toks: 12}\nmetric_list: [{metric: exact_match}]\n',
}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return evaluated_study(tmp_path_factory, "harness", STUDY)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"question": f"def f{n}(x):\n    ", "answer": n % 3, "text": f"the cat number {n} sat\n" * (9 * n + 1)}
        for n in range(4)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"task: our_{name}\n{COMMON.format(path=folder / 'rows.jsonl')}{text}")
    return folder


def answers(model, arguments, tasks):
    found = lm_eval.simple_evaluate(
        model, arguments, tasks=[f"our_{name}" for name in TASKS], task_manager=TaskManager(include_path=str(tasks))
    )
    return {task: [each["resps"] for each in rows] for task, rows in found["samples"].items()}


def test_it_answers_as_lm_evals_own_model_does_with_the_exported_run(study, tasks, tmp_path):
    pytest.importorskip("accelerate", reason="lm-eval's own model needs it")
    run = study / "runs" / "mla" / "seed-0"
    assert kvf("export", run, tmp_path / "hf") == 0
    ours = answers("kvfrontier", {"run": str(run)}, tasks)
    theirs = answers("hf", {"pretrained": str(tmp_path / "hf"), "device": "cpu", "dtype": "float32"}, tasks)
    assert ours["our_made"] == theirs["our_made"]
    for task in ("our_choice", "our_text"):
        pairs = zip(flat(ours[task]), flat(theirs[task]), strict=True)
        assert all(a == pytest.approx(b, abs=1e-4) for a, b in pairs)


def flat(values):
    return [x for value in values for x in (flat(value) if isinstance(value, list | tuple) else [float(value)])]


def test_under_a_technique_that_keeps_all_it_answers_the_same_and_writes_it_down(study, tasks, capsys):
    run = study / "runs" / "yoco" / "seed-0"
    printed = []
    for how in ((), ("--technique", "streaming-llm", "--budget", "1.0")):
        assert kvf("lm-eval", run, "--tasks", "our_choice,our_text", "--include", tasks, *how) == 0
        printed.append([line.split()[1:] for line in capsys.readouterr().out.splitlines()])
    for (*names, plain), (*same, under) in zip(*printed, strict=True):
        assert names == same
        assert float(plain) == pytest.approx(float(under), rel=1e-4)
    record = json.loads((run / "record.json").read_text())
    assert record["lm_eval"]["our_text"]["bits_per_byte,none"] > 0
    (under,) = record["lm_eval_techniques"].values()
    assert under["our_choice"]["acc,none"] == record["lm_eval"]["our_choice"]["acc,none"]
    assert kvf("eval", study) == 0
    (found,) = (each for each in json.loads((study / "results.json").read_text())["runs"] if each["label"] == "yoco")
    assert found["lm_eval"] == record["lm_eval"]
    table = tables.harness_table(load(study))
    assert table.header == ["variant", "our_choice acc", "our_text bits_per_byte"]
    assert [row[0] for row in table.rows] == ["yoco"]


def test_quantisation_of_nothing_is_one_line(study, tasks, capsys):
    run = study / "runs" / "mla" / "seed-0"
    assert kvf("lm-eval", run, "--tasks", "our_choice", "--include", tasks, "--bits", "8") == 2
    line = capsys.readouterr().err.splitlines()[-1]  # lm-eval's progress is before it
    assert line.startswith("kvfrontier: bits=8 quantised nothing of 64 tokens")


def test_a_task_that_is_not_there_is_one_line(study, tasks, capsys):
    line = refused(capsys, "lm-eval", study / "runs" / "yoco" / "seed-0", "--tasks", "our_chois", "--include", tasks)
    assert "--tasks our_chois: lm-eval knows no such task; --include names a folder of your own" in line
