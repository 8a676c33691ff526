"""The learning rate of each variant: the best of a list, which is widened until the best lies between two worse ones.

It is tried with a seed that no comparison uses. Published differences between variants are as small as what a rate that
is a fifth off costs.
"""

import itertools
import math
from collections.abc import Mapping, Sequence

WIDENED_AT_MOST = 4  # beyond that the loss falls without end, or everything diverges


def tuning_seed(seeds: Sequence[int]) -> int:
    """A seed that is none of the comparison's, and stays the same when one is added to them."""
    return next(seed for seed in itertools.count(1000) if seed not in seeds)


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
    if best == rates[0]:
        return _one_further(rates[1], rates[0])
    if best == rates[-1]:
        return _one_further(rates[-2], rates[-1])
    return None


def _one_further(inner: float, edge: float) -> float:
    return float(f"{edge * edge / inner:.4g}")


def best_rate(losses: Mapping[float, float]) -> float | None:
    """None when no rate gave a finite loss."""
    finite = {rate: loss for rate, loss in losses.items() if math.isfinite(loss)}
    return min(finite, key=finite.get, default=None)


def at_edge(losses: Mapping[float, float]) -> bool:
    """Whether the best rate is the lowest or the highest that was tried, so that a better one may lie beyond."""
    return best_rate(losses) in (min(losses), max(losses))
