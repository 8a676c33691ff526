"""A run that was exported, in transformers: the same logits, the same greedy tokens, the same ids."""

import pytest
import tiktoken
import torch
from texts import MINIATURE, kvf, refused, user_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval.evaluate import load_model
from train.hf_tokenizer import as_hf
from train.plan import Plan
from train.sections import TokenizerConfig
from train.store import read_plan
from train.study import load_data, parse_study
from train.tokenizer import load_tokenizer

VARIANTS = [
    {"arch": "mha"},
    {"arch": "mqa"},
    {"arch": "mla", "kv_rank": 16, "rope_dim": 6},
    {"label": "mla-q", "arch": "mla", "kv_rank": 16, "rope_dim": 6, "q_rank": 12, "nope_dim": 10, "v_dim": 14},
    {"label": "untied", "arch": "gqa", "kv_heads": 1, "tie_embeddings": False, "rope_base": 500.0},
    {"arch": "yoco", "kv_heads": 1, "window": 8},
]
TEXT = "def f(x_1):\n    return [1234567, 'caf\xe9 \u4e2d', \"  \"]  # the quick <|endo of it\n\n\tif x:\r\n"


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    settings = MINIATURE | {
        "tokenizer": {"name": "bpe", "vocab_size": 300},
        "model": {"width": 48, "layers": 2, "heads": 4, "context": 32},
        "variants": VARIANTS,
        "train": {"tokens": 1280, "batch_tokens": 64, "val_tokens": 64, "val_points": 2, "precision": "fp32"},
    }
    folder = user_folder(tmp_path_factory, "export", settings)
    assert kvf("train", folder / "study.yaml", "--out", folder / "out") == 0
    return folder / "out"


@pytest.mark.parametrize("label", [v.get("label", v["arch"]) for v in VARIANTS if v["arch"] != "yoco"])
def test_transformers_computes_the_same(study, label, tmp_path):
    parsed = parse_study(read_plan(study)["settings"])
    data = load_data(parsed, study.parent / "study.yaml", study)
    run = next(run for run in Plan(parsed, data, study).look().runs if run.variant.label == label)
    ours = load_model(run)
    assert kvf("export", run.directory, tmp_path / "hf") == 0
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert sum(p.numel() for p in theirs.parameters()) == ours.count_params()
    tokens = torch.randint(300, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = ours(tokens)
        assert (theirs(tokens).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    cache, greedy = ours.new_cache(2, 96), []
    logits = ours.prefill(tokens, cache)
    for _ in range(64):
        greedy.append(logits.argmax(-1))
        logits = ours.decode(greedy[-1], cache)
    how = {"max_new_tokens": 64, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    made = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), **how)
    assert torch.equal(made[:, 32:], torch.stack(greedy, 1))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in (TEXT, *["".join(map(chr, range(n, n + 50))) for n in range(0, 1500, 50)]):
        ids = data.tokenizer.encode_ordinary(text)
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids
        assert tokenizer.decode(ids) == text
    assert tokenizer("a<|endoftext|>")["input_ids"][-1] == 299 == tokenizer.eos_token_id


def test_what_cannot_be_exported_is_one_line(study, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    for run, out, message in (
        ("runs/yoco/seed-0", "new", "yoco cannot be exported: transformers has no class that computes YOCO"),
        ("runs/mha", "new", "is no run's directory"),
        ("runs/mha/seed-0", "full", "is there already: give an empty or a new directory"),
    ):
        assert message in refused(capsys, "export", study / run, tmp_path / out)
    assert not (tmp_path / "new").exists()


def test_tokenizers_without_merges_and_with_ids_that_are_not_in_use():
    encoding = load_tokenizer(TokenizerConfig(name="bytes"), None)
    assert as_hf(encoding).encode(TEXT).ids == encoding.encode_ordinary(TEXT)
    ranks, end = {"mergeable_ranks": encoding._mergeable_ranks}, {"special_tokens": {"<|endoftext|>": 300}}
    holes = tiktoken.Encoding("x", pat_str=encoding._pat_str, **ranks, **end)
    assert as_hf(holes).encode("a<|endoftext|>").ids == [ord("a"), 300]
