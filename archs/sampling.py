"""Text from a model: one token after the other, each drawn from the distribution that the model gives.

    tokens = model.generate(prompt, max_new_tokens=64, temperature=0.8, top_k=50)   # (B, T) -> (B, T + 64)

Shapes: B batch, T tokens, V vocabulary.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from archs.cache import Cache
from archs.settings import Settings, Size

NOISE = 2**16  # numbers drawn at once
Decoder = Any  # of archs.decoder, which imports this file


class Sampler(Settings):
    """How a token is chosen from logits: at `temperature` 0 the likeliest; else at random by softmax(logits /
    temperature), from the `top_k` likeliest tokens, and of these from the smallest set whose probabilities add up to
    `top_p` (nucleus sampling, arXiv 1904.09751, section 3.1). The same `seed` gives the same tokens.

    The largest of logits plus Gumbel noise falls on each token with its probability (arXiv 1411.0030, section 2), so
    that a step adds and compares; the noise is drawn for many steps at once."""

    model_config = ConfigDict(frozen=True)
    temperature: float = Field(1.0, ge=0, allow_inf_nan=False)
    top_k: Size | None = None
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int = Field(0, ge=0, lt=2**63)

    def noise(self, like_BV: Tensor) -> Iterator[Tensor | None]:
        """The noise (B, V) of one step after the other; None where none is needed."""
        if not self.temperature:
            yield from itertools.repeat(None)
        generator = torch.Generator(like_BV.device).manual_seed(self.seed)
        steps = max(1, NOISE // like_BV.numel())
        while True:
            noise_SBV = like_BV.new_empty(steps, *like_BV.shape, dtype=torch.float32)
            yield from noise_SBV.exponential_(generator=generator).log_().mul_(-self.temperature)

    def choose(self, logits_BV: Tensor, noise_BV: Tensor | None) -> Tensor:
        """(B,) tokens."""
        if not self.temperature:
            return logits_BV.argmax(-1)
        if self.top_k or self.top_p:
            logits_BV = self._likeliest(logits_BV.float())
        return (logits_BV + noise_BV).argmax(-1)

    def _likeliest(self, logits_BV: Tensor) -> Tensor:
        """The logits, -inf for tokens that are left out."""
        sorted_BK, tokens_BK = logits_BV.topk(min(self.top_k or logits_BV.shape[1], logits_BV.shape[1]))
        if self.top_p:
            p_BK = (sorted_BK / self.temperature).softmax(-1)
            before_BK = p_BK.cumsum(-1) - p_BK  # of likelier tokens; the likeliest always stays
            sorted_BK = sorted_BK.masked_fill(before_BK >= self.top_p, -torch.inf)
        return torch.full_like(logits_BV, -torch.inf).scatter(-1, tokens_BK, sorted_BK)


@torch.no_grad()
def stream(model: Decoder, tokens_BT: Tensor, sampler: Sampler, cache: Cache | None = None) -> Iterator[Tensor]:
    """Yields the tokens (B,) that follow the prompt, for as long as the cache has room for them; without a cache all
    tokens go through the model for each further one, without an end."""
    logits_BV = model.prefill(tokens_BT, cache) if cache else _last_logits(model, tokens_BT)
    for noise_BV in sampler.noise(logits_BV):
        token_B = sampler.choose(logits_BV, noise_BV)
        yield token_B
        if cache:
            logits_BV = model.decode(token_B, cache)
        else:
            tokens_BT = torch.cat((tokens_BT, token_B[:, None]), 1)
            logits_BV = _last_logits(model, tokens_BT)


def _last_logits(model: Decoder, tokens_BT: Tensor) -> Tensor:
    return model.unembed(model.last_hidden_state(tokens_BT)[:, -1])


def generate(self: Decoder, tokens_BT: Tensor, max_new_tokens: int, *, cache: Cache | None = None, **how) -> Tensor:
    """The prompt and `max_new_tokens` further tokens (B, T + N). `cache`: an empty one to use, such as one under a
    technique. `how`: the fields of `Sampler`. ValueError if one of them is wrong."""
    B, T = tokens_BT.shape
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: must be at least 1")
    cache = cache or self.new_cache(B, T + max_new_tokens)
    tokens = stream(self, tokens_BT, Sampler(**how), cache)
    return torch.cat([tokens_BT, *(next(tokens)[:, None] for _ in range(max_new_tokens))], 1)
