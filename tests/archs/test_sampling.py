"""Tokens that a model makes: the same with and without a cache, drawn from the distribution that was asked for."""

from itertools import islice

import pytest
import torch
from helpers import each_variant, make
from transformers import TopKLogitsWarper, TopPLogitsWarper

from archs.sampling import Sampler, stream
from archs.techniques import compressed_cache, technique


@each_variant
@pytest.mark.parametrize("how", [{"temperature": 0}, {"seed": 3}], ids=["greedy", "drawn"])
def test_text_is_the_same_with_a_cache_without_one_and_under_a_technique_that_keeps_all(arch, options, how):
    model, prompt = make(arch, options), torch.randint(97, (2, 5))
    made = model.generate(prompt, 30, **how)
    assert torch.equal(made[:, :5], prompt)
    recomputed = torch.stack([*islice(stream(model, prompt, Sampler(**how)), 30)], 1)
    others = [recomputed, model.generate(prompt, 30, **how)[:, 5:]]
    if not model.attends_itself:
        kept = compressed_cache(model, technique("full"), 2, 35)
        others.append(model.generate(prompt, 30, cache=kept, **how)[:, 5:])
    for other in others:
        assert torch.equal(other, made[:, 5:])
    if how.get("seed"):
        assert not torch.equal(model.generate(prompt, 30, seed=4), made)
        assert not torch.equal(made[0, 5:], made[1, 5:])  # each sequence has random numbers of its own


def drawn_from(logits, draws, **how):
    """Half of the tokens as one batch, half one after the other."""
    sampler, half = Sampler(**how), logits.expand(-(-draws // 2), -1)
    places, one = sampler.places(half), Sampler(**how | {"seed": 1}).places(logits)
    return torch.cat(
        [sampler.choose(half, next(places)), *(sampler.choose(logits, next(one)) for _ in range(draws // 2))]
    )


@pytest.mark.parametrize("how", [{}, {"temperature": 0.5}, {"top_k": 5}, {"top_p": 0.7}, {"top_k": 9, "top_p": 0.6}])
def test_tokens_are_drawn_as_often_as_their_probability_says(how):
    """What is left out is what transformers' warpers leave out."""
    logits = 2 * torch.randn(1, 23)
    warped = logits / how.get("temperature", 1.0)
    for name, warper in (("top_k", TopKLogitsWarper), ("top_p", TopPLogitsWarper)):
        if name in how:
            warped = warper(how[name])(None, warped)
    p, draws = warped.softmax(-1)[0], 40_000
    drawn = drawn_from(logits, draws, **how)
    counts = drawn.bincount(minlength=23)
    assert counts[p == 0].sum() == 0
    deviations = (counts - draws * p)[p > 0] / (draws * p * (1 - p) + 1e-9)[p > 0].sqrt()
    assert deviations.abs().max() < 4.5


def test_half_precision_leaves_out_what_full_precision_does():
    logits, sampler = torch.randn(1, 5000).bfloat16().expand(300, -1), Sampler(top_p=0.9)
    assert torch.equal(sampler.choose(logits, place := torch.rand(300, 1)), sampler.choose(logits.float(), place))


def test_a_token_without_probability_is_never_drawn_and_ties_go_to_the_first():
    logits = torch.full((1, 8), -torch.inf)
    logits[0, [2, 5]] = 1.0
    assert set(drawn_from(logits, 1000).tolist()) == {2, 5}
    assert drawn_from(logits, 1, temperature=0).tolist() == [2]
    assert drawn_from(logits.index_fill(1, torch.tensor([5]), 1.1), 1, top_p=1e-9).tolist() == [5]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0: must be a number of at least 0"),
        ({"top_p": 0.0}, "top_p=0.0: must be a number above 0 and up to 1"),
        ({"top_k": 0}, "top_k=0: must be a whole number of at least 1"),
        ({"top": 3}, "unknown option 'top'; allowed: temperature, top_k, top_p, seed; did you mean 'top_p'?"),
    ],
)
def test_a_wrong_way_to_choose_is_refused(how, message):
    with pytest.raises(ValueError, match="^" + message.replace("?", r"\?")):
        make("mha", {}).generate(torch.zeros(1, 1, dtype=torch.long), 1, **how)


def test_generate_needs_a_token_to_make():
    with pytest.raises(ValueError, match="max_new_tokens=0: must be at least 1"):
        make("mha", {}).generate(torch.zeros(1, 1, dtype=torch.long), 0)
