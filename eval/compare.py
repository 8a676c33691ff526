"""Differences between variants: means over seeds of (variant - baseline), with Student's t interval.

Seeds are the unit, paired: with the same seed both variants saw the same tokens in the same order.
"""

import itertools
import json
import math
import statistics
from collections.abc import Iterator, Sequence

from train.errors import InputError

METRIC = "val_bpb"
METRICS = METRIC, "accuracy"  # what a study is about; whatever else stands in a record's loss is detail
SAME = "corpus_fingerprint", "tokenizer", "match"  # what two records must share to be compared


class NotComparable(InputError):
    """Records that differ in more than their variant; the message names the field and both values."""


def compare(records: Sequence[dict], level: float = 0.95) -> tuple[list[dict], list[dict]]:
    """A COMPARISON of each label with its baseline, over the seeds that both have: first those of METRICS, then, as
    details, those of every other number in the records' loss, named by its path. The first have `holds_together`."""
    check_comparable(records)
    values: dict[str, dict[str, dict[int, float]]] = {}  # metric -> label -> seed
    for record in records:
        for metric, value in qualities(record["loss"]):
            values.setdefault(metric, {}).setdefault(record["label"], {})[record["seed"]] = value
    baselines = {record["label"]: record["baseline"] for record in records}
    comparisons = {
        metric: [
            found
            for label, baseline in baselines.items()
            if label != baseline and (found := _comparison(of_label, metric, label, baseline, level))
        ]
        for metric, of_label in values.items()
    }
    for metric in METRICS:
        _mark_those_that_hold_together(comparisons.get(metric, []))
    details = [found for metric in values if metric not in METRICS for found in comparisons[metric]]
    return [found for metric in METRICS for found in comparisons.get(metric, [])], details


def _mark_those_that_hold_together(comparisons: list[dict]) -> None:
    """`holds_together`: separable also at a level at which all of these are to hold at once (Holm 1979); None without
    an interval."""
    known = sorted((each for each in comparisons if each["ci_low"] is not None), key=_p_value)
    holds = True
    for rank, each in enumerate(known):
        holds = holds and _p_value(each) <= (1 - each["level"]) / (len(known) - rank)
        each["holds_together"] = holds
    for each in comparisons:
        each.setdefault("holds_together", None)


def _p_value(comparison: dict) -> float:
    """Of Student's test, two-sided."""
    df, half = len(comparison["seeds"]) - 1, (comparison["ci_high"] - comparison["ci_low"]) / 2
    if not half:
        return float(comparison["mean_diff"] == 0)
    return 2 - 2 * t_cdf(abs(comparison["mean_diff"]) / half * t_quantile((1 + comparison["level"]) / 2, df), df)


def check_comparable(records: Sequence[dict]) -> None:
    for field in SAME:
        found = {json.dumps(record[field], sort_keys=True): record for record in records}
        if len(found) > 1:
            (a, first), (b, second) = list(found.items())[:2]
            raise NotComparable(
                f"runs cannot be compared: {field} is {a} for {first['label']} and {b} for {second['label']}; "
                "give them one study, or compare each within its own"
            )


def qualities(loss: dict, path: str = "") -> Iterator[tuple[str, float]]:
    """(dotted path, value) of what is measured; whole numbers are counts."""
    for key, value in loss.items():
        if isinstance(value, dict):
            yield from qualities(value, f"{path}{key}.")
        elif isinstance(value, float) and math.isfinite(value):
            yield path + key, value


def _comparison(
    values: dict[str, dict[int, float]], metric: str, label: str, baseline: str, level: float
) -> dict | None:
    found = paired(values.get(label, {}), values.get(baseline, {}), level)
    return {"label": label, "baseline": baseline, "metric": metric} | found if found else None


def paired(own: dict[int, float], base: dict[int, float], level: float) -> dict:
    """The part of a COMPARISON that follows from the values of each seed, over those that both have; {} without any."""
    seeds = sorted(own.keys() & base.keys())
    return {"seeds": seeds} | mean_and_interval([own[seed] - base[seed] for seed in seeds], level) if seeds else {}


def gap_changes(records: Sequence[dict], level: float = 0.95) -> list[dict]:
    """How each variant's gap to the baseline changes from the study's first size to each of the others: the mean over
    seeds of (gap there - gap here), with its interval."""
    first, *others = dict.fromkeys(record["size"] for record in records)
    losses: dict[tuple[str, str], dict[int, float]] = {}  # (size, label without it) -> seed
    for record in records:
        if math.isfinite(record["loss"][METRIC]):
            losses.setdefault((record["size"], short(record)), {})[record["seed"]] = record["loss"][METRIC]
    baseline = short(records[0], "baseline")
    changes = []
    for other, name in itertools.product(others, dict.fromkeys(name for _, name in losses if name != baseline)):
        here, base_here, there, base_there = (losses.get((s, n), {}) for s in (first, other) for n in (name, baseline))
        seeds = sorted(set(here).intersection(base_here, there, base_there))
        if seeds:
            changed = [there[seed] - base_there[seed] - (here[seed] - base_here[seed]) for seed in seeds]
            what = {"label": name, "baseline": baseline, "metric": METRIC, "sizes": [first, other], "seeds": seeds}
            changes.append(what | mean_and_interval(changed, level))
    return changes


def short(record: dict, key: str = "label") -> str:
    """A record's label without its size."""
    return record[key].removesuffix(f"-{record['size']}")


def mean_and_interval(differences: Sequence[float], level: float) -> dict:
    """The part of a COMPARISON that follows from the difference of each seed."""
    low, high = t_interval(differences, level) if len(differences) > 1 else (None, None)
    mean = statistics.fmean(differences)
    return {"mean_diff": mean, "ci_low": low, "ci_high": high, "level": level, "verdict": verdict(low, high)}


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
