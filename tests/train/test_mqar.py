"""The generated recall task: what a sequence holds, and that it depends on seed and number alone."""

import pytest
import torch

from train.batches import IGNORED
from train.errors import InputError
from train.mqar import BLANK, RecallTask


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
    assert not torch.equal(whole, task.training(context=16, batch_size=8, seed=1)[0][0])


def test_validation_is_the_same_for_all_and_has_every_number_of_pairs_equally_often():
    task = RecallTask([2, 4, 8], 300)
    batches = list(task.validation(context=32, batch_size=7, limit=32 * 29))
    targets = torch.cat([targets for _, targets, _ in batches])
    asked = (targets != IGNORED).sum(1)
    assert [int((asked == n).sum()) for n in (2, 4, 8)] == [10, 10, 10]
    assert sum(n_bytes for *_, n_bytes in batches) == 2 * asked.sum()  # 300 symbols take two bytes each


def test_settings_decide_the_fingerprint_and_what_does_not_fit_is_refused():
    prints = {RecallTask(pairs, size).facts["fingerprint"] for pairs in ([2], [2, 4]) for size in (64, 128)}
    assert len(prints) == 4
    with pytest.raises(InputError, match=r"take 32 tokens, more than model.context=31"):
        RecallTask([8], 64).training(31, 1, 0)
    with pytest.raises(InputError, match="each from 1 to 31"):
        RecallTask([32], 64)
