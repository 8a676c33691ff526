"""The headline number of the memory-quality plane: how many KV bytes a token a family needs for the baseline's loss.

Along a family's curve, over log2 of its bytes, the seed-paired difference to the baseline is interpolated, and the
number is where its mean comes down to zero. Its interval is where a Student t interval of the interpolated difference
still holds zero. Nothing is extrapolated: beyond the variants that were measured there is "not reached" or "at most".
"""

import itertools
import math
import statistics
from collections.abc import Sequence

from eval.compare import METRIC, t_quantile

Curve = list[tuple[int, list[float]]]  # (bytes, the difference of each seed), by rising bytes


def bytes_for_baseline(records: Sequence[dict], level: float = 0.95) -> list[dict]:
    """An entry for each family of each size: what it is made of, what it is compared with, and its `crossing`."""
    families: dict[tuple[str, str], dict[str, dict[int, dict]]] = {}  # -> label -> seed -> record
    for record in records:
        if math.isfinite(record["loss"][METRIC]):
            family = families.setdefault((record["size"], record["family"]), {})
            family.setdefault(record["label"], {})[record["seed"]] = record
    by_label = {label: runs for family in families.values() for label, runs in family.items()}
    found = []
    for (size, family), labels in families.items():
        of = {label: next(iter(runs.values())) for label, runs in labels.items()}
        baseline = by_label.get(next(iter(of.values()))["baseline"])
        if not baseline:
            continue
        seeds = sorted(set(baseline).intersection(*labels.values()))
        sizes = {label: record["kv"]["bytes_per_token"] for label, record in of.items()}
        if not seeds or min(sizes.values()) <= 0:  # a cache that does not grow has no place on the axis
            continue
        curve: Curve = []
        for label in sorted(labels, key=sizes.get):
            if sizes[label] not in [n_bytes for n_bytes, _ in curve]:  # the study's first: none is chosen by its loss
                losses = [(labels[label][seed]["loss"][METRIC], baseline[seed]["loss"][METRIC]) for seed in seeds]
                curve.append((sizes[label], [own - base for own, base in losses]))
        first = next(iter(baseline.values()))
        found.append(
            {
                "family": family,
                "size": size,
                "baseline": first["label"],
                "baseline_bytes_per_token": first["kv"]["bytes_per_token"],
                "labels": sorted(labels, key=sizes.get),
                "seeds": seeds,
                "level": level,
                **crossing(curve, level),
            }
        )
    return found


def crossing(curve: Curve, level: float) -> dict:
    """{bytes_per_token, low, high, verdict}: where the curve comes down to zero, and the t interval of that place.

    low is None where the interval goes on below the smallest variant, and the largest variant's bytes where all of it
    lies beyond; high is None where it goes on beyond the largest. One seed gives neither.
    """
    (start, first), (end, _) = curve[0], curve[-1]
    at = _first_at_zero(curve, 0.0)
    low = high = None
    if len(first) > 1:
        half_widths = t_quantile((1 + level) / 2, len(first) - 1) / math.sqrt(len(first))
        low, high = _first_at_zero(curve, -half_widths), _first_at_zero(curve, half_widths)
        low = end if low is None else None if low == start else low
    return {
        "bytes_per_token": at,
        "low": low,
        "high": high,
        "verdict": "not reached" if at is None else "at most" if at == start else "reached",
    }


def _first_at_zero(curve: Curve, widths: float) -> float | None:
    """The first bytes at which mean + widths * deviation of the interpolated differences is zero or below."""
    bound = lambda values: statistics.fmean(values) + widths * _deviation(values)  # noqa: E731
    if bound(curve[0][1]) <= 0:
        return curve[0][0]
    for (x0, before), (x1, after) in itertools.pairwise(curve):
        # mean(t)^2 = widths^2 var(t), in t from 0 at x0 to 1 at x1, is a quadratic equation; of its roots those count
        # where the mean has the sign that makes the bound zero.
        step = [b - a for a, b in zip(before, after, strict=True)]
        m0, m1 = statistics.fmean(before), statistics.fmean(step)
        w2 = widths * widths
        a = m1 * m1 - w2 * _covariance(step, step)
        b = 2 * (m0 * m1 - w2 * _covariance(before, step))
        c = m0 * m0 - w2 * _covariance(before, before)
        for t in _roots(a, b, c) if widths else _roots(0.0, m1, m0):
            if 0 < t <= 1 and (m0 + m1 * t) * widths <= 1e-12 * abs(widths):
                return x0 * (x1 / x0) ** t if t < 1 else x1
        if bound(after) <= 0:  # a root that rounding has put past 1
            return x1
    return None


def _roots(a: float, b: float, c: float) -> list[float]:
    if a == 0:
        return [] if b == 0 else [-c / b]
    inside = b * b - 4 * a * c
    if inside < 0:
        inside = 0.0 if inside > -1e-12 * b * b else inside
    if inside < 0:
        return []
    q = -0.5 * (b + math.copysign(math.sqrt(inside), b))
    return sorted({q / a, c / q if q else q / a})


def _covariance(a: Sequence[float], b: Sequence[float]) -> float:
    return statistics.covariance(a, b) if len(a) > 1 else 0.0


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0
