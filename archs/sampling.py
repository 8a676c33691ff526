"""Text from a model: one token after the other, each drawn from the distribution that the model gives.

    tokens = model.generate(prompt, max_new_tokens=64, temperature=0.8, top_k=50)   # (B, T) -> (B, T + 64)

Shapes: B batch, T tokens, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from archs import ops
from archs.cache import Cache
from archs.settings import Settings, Size

DRAWN = 256  # steps whose random numbers are drawn at once
Decoder = Any  # of archs.decoder, which imports this file


class Sampler(Settings):
    """How a token is chosen from logits: at `temperature` 0 the likeliest; else at random by softmax(logits /
    temperature), from the `top_k` likeliest tokens, and of these from the smallest set whose probabilities add up to
    `top_p` (nucleus sampling, arXiv 1904.09751, section 3.1). The same `seed` gives the same tokens."""

    model_config = ConfigDict(frozen=True)
    temperature: float = Field(1.0, ge=0, allow_inf_nan=False)
    top_k: Size | None = None
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int = Field(0, ge=0, lt=2**63)

    def places(self, logits_BV: Tensor) -> Iterator[Tensor]:
        """Random numbers (B, 1) from 0 to 1 of one step after the other, drawn for many steps at once."""
        generator = torch.Generator(logits_BV.device).manual_seed(self.seed)
        while True:
            yield from torch.rand(DRAWN, len(logits_BV), 1, device=logits_BV.device, generator=generator)

    def choose(self, logits_BV: Tensor, place_B1: Tensor) -> Tensor:
        """The tokens (B,) at these places of the cumulative distribution."""
        if self.temperature and (self.top_k or self.top_p):
            logits_BV = self._likeliest(logits_BV.float())
        return ops.draw(logits_BV, place_B1, self.temperature)

    def _likeliest(self, logits_BV: Tensor) -> Tensor:
        """The logits, -inf for tokens that are left out."""
        sorted_BK, tokens_BK = logits_BV.topk(min(self.top_k or logits_BV.shape[1], logits_BV.shape[1]))
        if self.top_p:
            p_BK = (sorted_BK / self.temperature).softmax(-1)
            before_BK = p_BK.cumsum(-1) - p_BK  # of likelier tokens; the likeliest always stays
            sorted_BK = sorted_BK.masked_fill(before_BK >= self.top_p, -torch.inf)
        return torch.full_like(logits_BV, -torch.inf).scatter(-1, tokens_BK, sorted_BK)


def stream(model: Decoder, tokens_BT: Tensor, sampler: Sampler, cache: Cache | None = None) -> Iterator[Tensor]:
    """Yields the tokens (B,) that follow the prompt, for as long as the cache has room for them; without a cache all
    tokens go through the model for each further one, without an end."""
    logits_BV = model.prefill(tokens_BT, cache) if cache else _last_logits(model, tokens_BT)
    places = sampler.places(logits_BV)
    choose = ops.repeated(sampler.choose, logits_BV, next(places))
    for place_B1 in places:
        token_B = choose(logits_BV, place_B1)
        yield token_B
        if cache:
            logits_BV = model.decode(token_B, cache)
        else:
            tokens_BT = torch.cat((tokens_BT, token_B[:, None]), 1)
            logits_BV = _last_logits(model, tokens_BT)


@torch.no_grad()
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
