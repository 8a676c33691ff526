"""Bytes of caches of sequences of different lengths, and the largest batch that fits into memory."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import each_variant
from texts import refusal

from archs import build
from eval import capacity, paging
from eval.memory import BytesDiffer
from train.study import parse_study

SHAPE = {"vocab_size": 64, "width": 32, "layers": 2, "heads": 4, "context": 16}
STUDY = "eval.paging={lengths: uniform, max_tokens: 200, sequences: 9, block_sizes: [8, 32]}"


def subject(model, override, data=None):
    config = parse_study({}, [override]).eval
    return SimpleNamespace(model=model, config=config, dtype=torch.float32, data=data, show=lambda line: None)


@each_variant
def test_every_variant_wastes_what_the_definitions_say(arch, options):
    model = build(arch, **SHAPE, **options).eval()
    rows = paging.measure(subject(model, STUDY))["paging"]
    held = {(row["cache"], row["block_size"]): row["held_bytes"] for row in rows}
    assert list(held) == [("contiguous", None), ("doubling", None), ("paged", 8), ("paged", 32)]
    lengths, per_token = paging.draw_lengths(9, 200), model.kv_bytes_per_token(torch.float32)
    constant = model.kv_constant_bytes(torch.float32)
    needed = sum(model.kv_stored_bytes(length, torch.float32) for length in lengths)
    for row in rows:
        assert (row["tokens"], row["needed_bytes"]) == (sum(lengths), needed)
        assert row["wasted_bytes"] == row["held_bytes"] - needed >= 0
    unfilled = 9 * constant + sum(lengths) * per_token - needed  # windows that short sequences do not fill
    wasted = {key: nbytes - needed - unfilled for key, nbytes in held.items()}
    assert wasted["contiguous", None] == sum(200 - length for length in lengths) * per_token
    for size in (8, 32):
        assert 0 <= wasted["paged", size] <= 9 * (size - 1) * per_token
        assert held["paged", size] <= held["contiguous", None]
    assert held["doubling", None] <= held["contiguous", None]


def test_a_formula_that_is_not_true_is_an_error(monkeypatch):
    model = build("gqa", **SHAPE, kv_heads=2)
    right = model.kv_stored_elements
    monkeypatch.setattr(model, "kv_stored_elements", lambda context: right(context) + 1)
    with pytest.raises(BytesDiffer, match="formula"):
        paging.measure(subject(model, STUDY))
    assert paging.measure(subject(model, "eval.level=0.9")) == {}  # the study does not ask for it


def test_document_lengths_are_the_tokens_between_the_ends_of_text():
    lengths = [3, 0, 250, 7]
    tokens = np.concatenate([np.r_[np.ones(length, dtype=np.uint16), np.uint16(9)] for length in lengths])
    data = SimpleNamespace(train=tokens, tokenizer=SimpleNamespace(eot_token=9))
    assert paging.document_lengths(data).tolist() == lengths
    drawn = paging.draw_lengths(400, 200, np.array(lengths))
    assert [drawn.count(length) for length in (1, 3, 7, 200)] == pytest.approx([67, 133, 133, 67], abs=2)
    rows = paging.measure(subject(build("mha", **SHAPE), "eval.paging={max_tokens: 200}", data))["paging"]
    assert {row["lengths"] for row in rows} == {"documents"}


def test_a_task_without_documents_is_refused():
    task = {"corpus": {"name": "mqar", "pairs": [4]}, "tokenizer": {"name": "ids", "vocab_size": 64}}
    assert "uniform" in refusal(parse_study, task, ["eval.paging={}"])
    assert parse_study(task, ["eval.paging={lengths: uniform}"]).eval.paging.lengths == "uniform"


def test_the_largest_batch_fills_memory_but_not_more():
    model = build("yoco", **SHAPE, kv_heads=2, window=9)
    measured = capacity.measure(subject(model, "eval.decode.context=[64, 16]"))["capacity"]
    weights = sum(p.numel() * 4 for p in model.parameters())
    assert list(measured["largest_batch"]) == ["16", "64"]
    for context, batch in measured["largest_batch"].items():
        each = model.new_cache(1, int(context)).nbytes
        assert weights + batch * each <= measured["memory_bytes"] < weights + (batch + 1) * each
    assert capacity.largest_batch(model, 16, torch.float32, memory=1000) == 0  # the weights do not fit


def test_a_batch_that_cannot_be_allocated_is_lowered_until_it_can(monkeypatch):
    model = build("mha", **SHAPE)
    tried = []

    def new_cache(batch, *_):
        tried.append(batch)
        if batch > 90:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model, "new_cache", new_cache)
    assert capacity.allocated_batch(model, 16, torch.float32, 100) == tried[-1] == 90
    monkeypatch.setattr(model, "new_cache", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        capacity.allocated_batch(model, 16, torch.float32, 100)
