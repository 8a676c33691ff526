"""What tests of models share: the cases that laws run over, models whose attention is far from uniform, cached logits.
The cases are those of one variant in a file of its own where `--variant file.py:Class` is given."""

import contextlib
import os

import pytest
import torch

from archs import VARIANTS, build, find_variant

CHOSEN = {arch: find_variant(arch) for arch in filter(None, [os.environ.get("KVFRONTIER_VARIANT")])} or VARIANTS
CASES = [(arch, options) for arch, variant in CHOSEN.items() for options in variant.examples]


def each_of(cases):
    ids = [f"{arch.rpartition(':')[2]}-{n}" for n, (arch, _) in enumerate(cases)]
    return pytest.mark.parametrize(("arch", "options"), cases, ids=ids)


each_variant = each_of(CASES)
SHAPE = {"vocab_size": 97, "width": 64, "layers": 2, "heads": 4, "context": 64}
ATTENDING = [case for case in CASES if not build(case[0], **SHAPE, **case[1]).attends_itself]
each_attending = each_of(ATTENDING)


def make(arch, options, seed=0, **shape):
    torch.manual_seed(seed)
    model = build(arch, **SHAPE | shape, **options).eval()
    with torch.no_grad():  # weights large enough that attention is far from uniform
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model


@contextlib.contextmanager
def threads(number):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_near(logits, expected):
    """To 1e-5 of the largest."""
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def cached_logits(model, tokens, chunks, cache):
    """Position -> logits: prefill in `chunks`, then decode to the end."""
    logits, start = {}, 0
    for chunk in chunks:
        logits[start + chunk - 1] = model.prefill(tokens[:, start : start + chunk], cache)
        start += chunk
    for t in range(start, tokens.shape[1]):
        logits[t] = model.decode(tokens[:, t], cache)
    return logits
