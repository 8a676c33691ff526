"""`kvfrontier sample`: the text that the model makes, and one line for what cannot be."""

import io
import re
import shutil

import pytest
import torch
from texts import MINIATURE, kvf, refused, user_folder

from eval.sample import Text
from train.trained import load

STUDY = MINIATURE | {
    "tokenizer": {"name": "bpe", "vocab_size": 300},
    "model": {"width": 32, "layers": 2, "heads": 4, "context": 32},
    "variants": [{"arch": "mha"}, {"arch": "yoco", "kv_heads": 1, "window": 8}],
    "train": {"tokens": 1280, "batch_tokens": 64, "val_tokens": 64, "val_points": 2, "precision": "fp32"},
}
PROMPT = "d\xe9f "


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = user_folder(tmp_path_factory, "sample", STUDY)
    assert kvf("train", folder / "study.yaml", "--out", folder / "out") == 0
    shutil.rmtree(folder / "texts", ignore_errors=True)  # a run's directory and its study's vocabulary are enough
    return folder / "out"


def said(capsys, *arguments) -> tuple[str, list[str]]:
    capsys.readouterr()
    assert kvf("sample", *arguments) == 0
    out, err = capsys.readouterr()
    return out, err.splitlines()


@pytest.mark.parametrize("label", ["mha", "yoco"])
def test_the_text_is_what_generate_makes(study, capsys, label):
    run = load(study / "runs" / label / "seed-0")
    ids = torch.tensor([run.tokenizer.encode_ordinary(PROMPT)] * 2)
    texts = [run.tokenizer.decode(made.tolist()) for made in run.model.generate(ids, 20, seed=5, top_k=9)]
    how = study / "runs" / label / "seed-0", "--prompt", PROMPT, "--tokens", 20, "--seed", 5, "--top-k", 9
    out, err = said(capsys, *how, "--samples", 2)
    assert out == f"{texts[0]}\n--- sample 2 ---\n{texts[1]}\n"
    nbytes = 2 * run.model.kv_stored_bytes(ids.shape[1] + 20, torch.float32)
    assert err[-1].endswith(f"the cache holds {nbytes:,} bytes, a full one {nbytes:,}")
    out, err = said(capsys, *how, "--no-cache", "--samples", 2)
    assert out.startswith(texts[0])
    assert [line.split(":")[0] for line in err[-2:]] == ["without a cache", "with one"]


def test_a_prompt_from_a_file_techniques_and_what_lies_beyond_the_context(study, capsys, tmp_path, monkeypatch):
    run = study / "runs" / "mha" / "seed-0"
    (tmp_path / "prompt").write_text(PROMPT * 3, encoding="utf-8")
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT * 3))
    for source in (tmp_path / "prompt", "-"):
        out, err = said(capsys, run, "--prompt-file", source, "--tokens", 40, "--technique", "h2o", "--budget", "0.5")
        assert out.startswith(PROMPT * 3)
        assert "text gets worse beyond 32 tokens" in err[0]
        held, full = (
            int(n.replace(",", "")) for n in re.search(r"holds ([\d,]+) bytes, a full one ([\d,]+)", err[-1]).groups()
        )
        assert held < 0.6 * full
    _, err = said(capsys, run, "--bits", "4", "--option", "residual=8", "--option", "group=8", "--tokens", 30)
    assert "quantised nothing" not in "".join(err)
    _, err = said(capsys, run, "--bits", "4", "--tokens", 20)
    assert "bits=4 quantised nothing of 21 tokens" in err[-2]
    assert said(capsys, run)[0] == said(capsys, run, "--prompt", "")[0]


def test_a_character_is_written_once_all_its_bytes_are_there(study, capsys):
    run = load(study / "runs" / "mha" / "seed-0")
    text, written = Text(run, ""), []
    for token in run.tokenizer.encode_ordinary("\u4e2d!"):
        text.write([token])
        written.append(capsys.readouterr().out)
    assert "".join(written) == "\u4e2d!"
    assert written[0] == ""


def test_samples_of_each_validation_are_text_in_tensorboard(study):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(study / "runs" / "mha" / "seed-0"))
    events.Reload()
    tensors = events.Tensors("sample/text_summary")
    assert [event.step for event in tensors] == [event.step for event in events.Scalars("val/bpb")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--technique", "h3o"], "unknown technique 'h3o'; allowed are full, "),
        (["--technique", "h2o", "--budget", "-1"], "budget=-1: must be a share above 0.0"),
        (["--bits", "3"], "bits=3"),
        (["--option", "budget"], "--option budget: must be KEY=VALUE"),
        (["--temperature", "-1"], "temperature=-1.0: must be a number of at least 0"),
        (["--top-p", "2"], "top_p=2.0: must be a number above 0 and up to 1"),
        (["--tokens", "0"], "argument --tokens"),
        (["--prompt-file", "not-there"], "not-there: No such file"),
    ],
)
def test_what_cannot_be_sampled_is_one_line(study, capsys, arguments, message):
    assert message in refused(capsys, "sample", study / "runs" / "mha" / "seed-0", *arguments)


def test_a_directory_that_is_no_runs_is_refused(study, capsys):
    assert "is no run's directory, like runs/quick/runs/mha/seed-0" in refused(capsys, "sample", study)
