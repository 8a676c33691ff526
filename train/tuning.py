"""Choice of a variant's learning rate: the best of a list, which is widened until the best lies between two worse ones.

Published differences between variants are as small as what a rate that is off by a fifth costs.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

WIDENED_AT_MOST = 4  # beyond that the loss falls without end, or every rate diverges


def tuning_seed(seeds: Sequence[int]) -> int:
    """A seed that is not among `seeds` and does not change when another one is added to them."""
    return next(seed for seed in itertools.count(1000) if seed not in seeds)


def tried_rates(given: Sequence[float], loss_of: Callable[[float], float | None]) -> dict[float, float]:
    """The loss of each rate that was tried, given ones first. `loss_of` answers None for one that was not tried,
    infinity for one that diverged."""
    losses = {rate: loss for rate in given if (loss := loss_of(rate)) is not None}
    while (rate := next_rate(given, losses)) is not None and (loss := loss_of(rate)) is not None:
        losses[rate] = loss
    return losses


def next_rate(given: Sequence[float], losses: Mapping[float, float]) -> float | None:
    """The rate to try next, when those in `losses` were tried (infinite: diverged); None when the search is over."""
    for rate in given:
        if rate not in losses:
            return rate
    best = best_rate(losses)
    if best is None or len(losses) >= len(given) + WIDENED_AT_MOST:
        return None
    rates = sorted(losses)
    if len(rates) == 1:
        return 2 * best
    for inner, edge in ((rates[1], rates[0]), (rates[-2], rates[-1])):
        if best == edge:
            return float(f"{edge * edge / inner:.4g}")  # one geometric step further
    return None


def best_rate(losses: Mapping[float, float]) -> float | None:
    """The rate of the lowest loss; None if no rate gave a finite one."""
    finite = {rate: loss for rate, loss in losses.items() if math.isfinite(loss)}
    return min(finite, key=finite.get, default=None)


def at_edge(losses: Mapping[float, float]) -> bool:
    """True if the best rate is the lowest or the highest that was tried, so that a better one may lie beyond."""
    return best_rate(losses) in (min(losses), max(losses))
