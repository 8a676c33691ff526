"""Batch k of seed s is a pure function of (s, k), and validation predicts each token once; also of the recall task."""

import dataclasses
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from texts import byte_tokens, refusal

from train.batches import IGNORED, TrainingBatches
from train.sources.mqar import BLANK, RecallTask
from train.sources.needle import NeedleTask

TOKENS = np.arange(1003, dtype=np.uint16)


@given(seed=st.integers(0, 5), ks=st.lists(st.integers(0, 200), min_size=1, max_size=8))
def test_a_batch_depends_on_seed_and_number_alone(seed, ks):
    used = TrainingBatches(TOKENS, context=16, batch_size=4, seed=seed)
    for k in ks:
        fresh = TrainingBatches(TOKENS, context=16, batch_size=4, seed=seed)
        assert all(map(torch.equal, used[k], fresh[k]))


def test_targets_are_the_next_tokens_and_an_epoch_sees_each_sequence_once():
    data = TrainingBatches(TOKENS, context=10, batch_size=5, seed=3)
    batches = zip(*(data[k] for k in range(20)), strict=True)  # 100 sequences of 10 in 1002 tokens
    inputs, targets = map(torch.cat, batches)
    assert (targets == inputs + 1).all()
    assert len(set(inputs.flatten().tolist())) == 1000
    assert not torch.equal(inputs, torch.cat([data[k][0] for k in range(20, 40)]))
    batches = (TrainingBatches(TOKENS, 16, 4, seed)[k][0] for seed in range(4) for k in range(4))
    assert len({tuple(inputs.flatten().tolist()) for inputs in batches}) == 16


@pytest.mark.parametrize("split", ["tune", "test"])
def test_held_out_text_is_predicted_token_by_token_once(data, split):
    batches, tokens = data.held_out(split, context=16, batch_size=3, limit=10**9), getattr(data, split)
    targets = torch.cat([targets.flatten() for _, targets, _ in batches]).tolist()
    assert targets == tokens[1 : (len(tokens) - 1) // 16 * 16 + 1].tolist()


@pytest.mark.parametrize(("limit", "expected"), [(10**9, None), (64, 64), (70, 64), (1, 16)])
def test_a_sample_of_validation_is_spread_out_and_its_bytes_are_counted(data, limit, expected):
    batches = data.held_out("tune", context=16, batch_size=3, limit=limit)
    inputs, targets = (torch.cat([batch[n] for batch in batches]) for n in (0, 1))
    assert targets.numel() == (expected or (len(data.tune) - 1) // 16 * 16)
    assert sum(n for *_, n in batches) == (targets != data.tokenizer.eot_token).sum()  # one byte a token, end none
    if expected == 64:
        quarter = len(data.tune) // 4
        for n, row in enumerate(inputs.tolist()):
            near = range(max(0, n * quarter - 64), n * quarter + 64)
            assert any(data.tune[i : i + 16].tolist() == row for i in near)


def test_too_few_tokens_are_refused(data):
    short = dataclasses.replace(data, tune=data.tune[:16])
    for make in (lambda: TrainingBatches(TOKENS[:16], 16, 1, 0), lambda: short.held_out("tune", 16, 1, 9)):
        with pytest.raises(ValueError, match="too few for context=16"):
            make()


def test_each_key_is_asked_once_and_its_value_is_the_target():
    task = RecallTask([2, 4, 8], 64)
    inputs, targets = task.training(context=32, batch_size=30, seed=3)[2]
    for n, (row, wanted) in enumerate(zip(inputs.tolist(), targets.tolist(), strict=True)):
        pairs = (2, 4, 8)[n % 3]
        keys, values = row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2]
        assert len(set(keys)) == pairs
        assert all(0 < key < 32 <= value < 64 for key, value in zip(keys, values, strict=True))
        asked = {row[t]: wanted[t] for t in range(32) if wanted[t] != IGNORED}
        assert asked == dict(zip(keys, values, strict=True))
        assert all(row[t] == BLANK for t in range(2 * pairs, 32) if wanted[t] == IGNORED)


def test_a_sequence_depends_on_seed_and_number_alone():
    task = RecallTask([2, 4], 64)
    whole, _ = task.training(context=16, batch_size=8, seed=0)[0]
    halves = [task.training(context=16, batch_size=4, seed=0)[k][0] for k in (0, 1)]
    assert torch.equal(whole, torch.cat(halves))
    others = [task.training(context=16, batch_size=8, seed=1)[0][0]]
    others += [task.held_out(split, context=16, batch_size=8, limit=128)[0][0] for split in ("tune", "test")]
    assert len({tuple(inputs.flatten().tolist()) for inputs in (whole, *others)}) == 4


def test_a_curriculum_begins_with_few_pairs_and_ends_with_all_of_them():
    task = RecallTask([2, 3, 4, 6, 8], 64, curriculum=30)
    inputs, targets = task.training(context=32, batch_size=120, seed=0)[0]
    asked = (targets != IGNORED).sum(1)
    sets = [set(part.tolist()) for part in asked.split(30)]
    assert sets == [{2, 3, 4}, {2, 3, 4, 6}, {2, 3, 4, 6, 8}, {2, 3, 4, 6, 8}]
    held_out = task.held_out("tune", context=32, batch_size=10, limit=320)[0][1]
    assert set((held_out != IGNORED).sum(1).tolist()) == {2, 3, 4, 6, 8}
    without = RecallTask([2, 3, 4, 6, 8], 64)
    assert task.facts["fingerprint"] != without.facts["fingerprint"]
    assert torch.equal(inputs[:3], without.training(context=32, batch_size=3, seed=0)[0][0])


def test_needles_lie_in_the_first_half_of_a_text_and_are_asked_for_in_the_second(tmp_path):
    texts = byte_tokens(tmp_path)
    task = NeedleTask(texts, needles=3, symbols=20, curriculum=4)
    assert (task.n_vocab, task.facts["text"]) == (27 + 20, texts.facts["name"])
    batches = task.training(context=256, batch_size=2, seed=0)
    shapes = [tuple(batches[k][0].shape) for k in range(7)]
    assert shapes == [(8, 64)] * 4 + [(4, 128)] + [(2, 256)] * 2
    seen, text = [], re.sub("[^a-z]", "_", "".join(map(chr, texts.train[:])).lower())
    for inputs, targets in (batches[k] for k in range(7)):
        for row, wanted in zip(inputs.tolist(), targets.tolist(), strict=True):
            at_first = len(row) == 64  # they stand where recall has them, with nothing between
            asked = {row[t]: wanted[t] for t in range(len(row)) if wanted[t] != IGNORED}
            half, seen = 2 * len(asked) if at_first else len(row) // 2, [*seen, tuple(row)]
            held = {row[t]: row[t + 1] for t in range(half) if row[t] in asked}
            assert held == asked
            assert len(held) in ((2, 3) if at_first else (3,))
            assert all(27 <= key < 37 <= value < 47 for key, value in held.items())
            assert not any(wanted[t] != IGNORED for t in range(half))
            letters = "".join("abcdefghijklmnopqrstuvwxyz_"[i] if i < 27 else " " for i in row)
            assert all(set(part) <= {"_"} if at_first else part in text for part in letters.split())
    assert len(set(seen)) == len(seen)
    assert torch.equal(batches[4][0], task.training(context=256, batch_size=2, seed=0)[4][0])
    held_out = [task.held_out(split, context=256, batch_size=2, limit=512)[0] for split in ("tune", "test")]
    assert all(inputs.shape == (2, 256) for inputs, *_ in held_out)
    assert "at most 8 needles" in refusal(NeedleTask(texts, 9, 64).training, 256, 1, 0)
    assert "give 64 tokens or more" in refusal(NeedleTask(texts, 2, 64).training, 32, 1, 0)
    for context in (64, 255):
        assert "64 doubled once or more" in refusal(task.training, context, 1, 0)
        assert NeedleTask(texts, 2, 64).training(context, 1, 0)[0][0].shape == (1, context)


def test_validation_is_the_same_for_all_and_has_every_number_of_pairs_equally_often():
    task = RecallTask([2, 4, 8], 300)
    batches = list(task.held_out("test", context=32, batch_size=7, limit=32 * 29))
    targets = torch.cat([targets for _, targets, _ in batches])
    asked = (targets != IGNORED).sum(1)
    assert [int((asked == n).sum()) for n in (2, 4, 8)] == [10, 10, 10]
    assert sum(n_bytes for *_, n_bytes in batches) == 2 * asked.sum()  # 300 symbols take two bytes each


def test_settings_decide_the_fingerprint_and_what_does_not_fit_is_refused():
    prints = {RecallTask(pairs, size).facts["fingerprint"] for pairs in ([2], [2, 4]) for size in (64, 128)}
    assert len(prints) == 4
    assert "take 32 tokens, more than model.context=31" in refusal(RecallTask([8], 64).training, 31, 1, 0)
    assert "each from 1 to 31" in refusal(RecallTask, [32], 64)
