"""Batch k of seed s is a pure function of (s, k), and validation predicts each token once."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from texts import byte_tokens

from train.batches import TrainingBatches

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


@pytest.fixture
def text(tmp_path):
    return byte_tokens(tmp_path)


def test_validation_predicts_each_token_once(text):
    data = text.validation(context=16, batch_size=3, limit=10**9)
    targets = torch.cat([targets.flatten() for _, targets, _ in data]).tolist()
    assert targets == text.val[1 : (len(text.val) - 1) // 16 * 16 + 1].tolist()


@pytest.mark.parametrize(("limit", "expected"), [(10**9, None), (64, 64), (70, 64), (1, 16)])
def test_a_sample_of_validation_is_spread_out_and_its_bytes_are_counted(text, limit, expected):
    data = text.validation(context=16, batch_size=3, limit=limit)
    inputs, targets = (torch.cat([batch[n] for batch in data]) for n in (0, 1))
    assert targets.numel() == (expected or (len(text.val) - 1) // 16 * 16)
    assert sum(n for *_, n in data) == (targets != text.tokenizer.eot_token).sum()  # one byte a token, end none
    if expected == 64:
        quarter = len(text.val) // 4
        for n, row in enumerate(inputs.tolist()):
            near = range(max(0, n * quarter - 64), n * quarter + 64)
            assert any(text.val[i : i + 16].tolist() == row for i in near)


def test_too_few_tokens_are_refused(text):
    short = dataclasses.replace(text, val=text.val[:16])
    for make in (lambda: TrainingBatches(TOKENS[:16], 16, 1, 0), lambda: short.validation(16, 1, 9)):
        with pytest.raises(ValueError, match="too few for context=16"):
            make()
