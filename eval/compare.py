"""Differences between variants: means over seeds of (variant - baseline), with Student's t interval.

Seeds are the unit, paired: with the same seed both variants saw the same tokens in the same order.
"""

import math
import statistics
from collections.abc import Sequence

METRIC = "val_bpb"
LEVEL = 0.95


def compare(records: Sequence[dict], labels: Sequence[str]) -> list[dict]:
    """A COMPARISON of each label with the first, over the seeds that both have."""
    losses = {label: {r["seed"]: r["loss"][METRIC] for r in records if r["label"] == label} for label in labels}
    baseline, *others = labels
    comparisons = []
    for label in others:
        seeds = sorted(losses[label].keys() & losses[baseline].keys())
        if not seeds:
            continue
        differences = [losses[label][seed] - losses[baseline][seed] for seed in seeds]
        low, high = t_interval(differences, LEVEL) if len(seeds) > 1 else (None, None)
        comparisons.append(
            {
                "label": label,
                "baseline": baseline,
                "metric": METRIC,
                "seeds": seeds,
                "mean_diff": statistics.fmean(differences),
                "ci_low": low,
                "ci_high": high,
                "level": LEVEL,
                "verdict": verdict(low, high),
            }
        )
    return comparisons


def verdict(low: float | None, high: float | None) -> str:
    """`lower` or `higher` when the interval leaves out zero; one seed gives no interval and separates nothing."""
    if high is not None and high < 0:
        return "lower"
    if low is not None and low > 0:
        return "higher"
    return "not separable"


def t_interval(values: Sequence[float], level: float) -> tuple[float, float]:
    """Student's interval for the mean of at least two values."""
    mean = statistics.fmean(values)
    half = t_quantile((1 + level) / 2, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


def t_quantile(probability: float, df: int) -> float:
    """The quantile, for a probability of at least a half, of Student's t with `df` degrees of freedom, by bisection."""
    low, high = 0.0, 1.0
    while t_cdf(high, df) < probability:
        high *= 2
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, df) < probability else (low, middle)
    return high


def t_cdf(t: float, df: int) -> float:
    """For t >= 0 and whole `df`: the finite series of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan2(t, math.sqrt(df))
    cos2 = math.cos(angle) ** 2
    term = total = 1.0 if df % 2 == 0 else math.cos(angle)
    for k in range(2 + df % 2, df - 1, 2):
        term *= (k - 1) / k * cos2
        total += term
    if df % 2 == 0:
        inside = math.sin(angle) * total
    else:
        inside = 2 / math.pi * (angle + (math.sin(angle) * total if df > 1 else 0.0))
    return 0.5 + inside / 2
