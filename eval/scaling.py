"""How the loss falls with size, and what a gap to the baseline is worth in training compute and in bytes of cache.

Over a study's sizes each seed of a variant gets its own line, ln(loss) = a - slope ln(x), x the training FLOPs or the
parameters; every number here is a mean over seeds with Student's t interval. With the baseline's slope a gap becomes a
compute-equivalent: how many times its training FLOPs the baseline needs for the variant's loss. Along the baseline's
sizes its cache grows too, so that at equal loss it keeps a number of bytes, the variant's bytes-equivalent.
"""

import itertools
import math
import statistics
from collections.abc import Iterator, Sequence

from eval.compare import METRIC, short, t_interval

LEAST_SIZES = 3
APART = 1.5  # times the training FLOPs of the next smaller size, at least
FURTHEST = 100.0  # no gap is worth more than e to this: there the slope is none
BEYOND = 2.0  # nothing is said beyond the trained sizes by more than this factor

AXES = {
    "train_flops": lambda record: record["train"]["flops_per_token"] * record["train_tokens"],
    "params": lambda record: record["params"],
}
Runs = dict[str, dict[int, dict]]  # size -> seed -> record


def scaling(records: Sequence[dict], level: float = 0.95) -> list[dict]:
    """An entry for each variant of a study with three sizes or more: its slopes, and `at`, where at each size it is
    compared with the baseline. Empty where sizes are too near to each other, as recipes of one size are."""
    sizes = _sizes(records)
    if not sizes:
        return []
    variants: dict[str, Runs] = {}
    for record in records:
        runs = variants.setdefault(short(record), {}).setdefault(record["size"], {})
        if math.isfinite(record["loss"][METRIC]):
            runs[record["seed"]] = record
    baseline = next(iter(variants))
    entries = []
    for name, runs in variants.items():
        seeds = _seeds(runs, sizes)
        if seeds:
            slopes = {
                f"{axis}_slope": _with_interval([_slope(runs, sizes, seed, axis) for seed in seeds], level)
                for axis in AXES
            }
            entry = {"label": name, "baseline": baseline, "sizes": sizes, "seeds": seeds, "level": level, **slopes}
            compared = [] if name == baseline else _equivalents(runs, variants[baseline], sizes, level)
            entries.append(entry | {"at": list(compared)})
    return entries


def _sizes(records: Sequence[dict]) -> list[str]:
    """The sizes by rising training FLOPs of their first variant; [] if they are too few or too near."""
    flops: dict[str, float] = {}
    for record in records:
        flops.setdefault(record["size"], AXES["train_flops"](record))
    sizes = sorted(flops, key=flops.get)
    apart = all(flops[b] >= APART * flops[a] for a, b in itertools.pairwise(sizes))
    return sizes if len(sizes) >= LEAST_SIZES and apart else []


def _seeds(runs: Runs, sizes: Sequence[str]) -> list[int]:
    """The seeds that every size has."""
    return sorted(set.intersection(*(set(runs.get(size, ())) for size in sizes)))


def _slope(runs: Runs, sizes: Sequence[str], seed: int, axis: str) -> float:
    xs = [math.log(AXES[axis](runs[size][seed])) for size in sizes]
    return -statistics.linear_regression(xs, [math.log(runs[size][seed]["loss"][METRIC]) for size in sizes]).slope


def _equivalents(own: Runs, base: Runs, sizes: Sequence[str], level: float) -> Iterator[dict]:
    """For each size {size, bytes_per_token, compute, bytes}. `compute` is null, and so is `bytes`, where the baseline
    would have to be trained for more than BEYOND times its largest FLOPs, or less than that part of its smallest, and
    where its own loss does not fall with its FLOPs at every seed; `bytes` too where its cache does not grow."""
    common = sorted(set(_seeds(own, sizes)) & set(_seeds(base, sizes)))
    if not common:
        return
    first = {size: base[size][common[0]] for size in sizes}
    flops = {size: AXES["train_flops"](record) for size, record in first.items()}
    held = {size: record["kv"]["bytes_per_token"] for size, record in first.items()}
    slopes = [_slope(base, sizes, seed, "train_flops") for seed in common]
    for size in sizes:
        losses = [[runs[size][seed]["loss"][METRIC] for seed in common] for runs in (own, base)]
        gaps = [math.log(b / a) for a, b in zip(*losses, strict=True)]
        falls = all(slope > abs(gap) / FURTHEST for gap, slope in zip(gaps, slopes, strict=True))
        times = [gap / slope for gap, slope in zip(gaps, slopes, strict=True)] if falls else []  # logarithms
        needed = flops[size] * math.exp(statistics.fmean(times)) if falls else 0.0
        inside = flops[sizes[0]] / BEYOND <= needed <= flops[sizes[-1]] * BEYOND
        found = {"size": size, "seeds": common, "bytes_per_token": own[size][common[0]]["kv"]["bytes_per_token"]}
        found |= {"compute": _as_factors(times, level) if inside else None, "bytes": None}
        if inside and min(held.values()) > 0:
            xs, ys = ([math.log(value) for value in of.values()] for of in (flops, held))
            growth = statistics.linear_regression(xs, ys).slope  # of the baseline's bytes with its FLOPs
            found["bytes"] = _as_factors([math.log(held[size]) + growth * t for t in times], level)
        yield found


def _as_factors(logarithms: Sequence[float], level: float) -> dict[str, float]:
    return {key: math.exp(value) for key, value in _with_interval(logarithms, level).items()}


def _with_interval(values: Sequence[float], level: float) -> dict[str, float]:
    """{mean, low, high}; the mean alone where there is one seed."""
    ends = dict(zip(("low", "high"), t_interval(values, level), strict=True)) if len(values) > 1 else {}
    return {"mean": statistics.fmean(values), **ends}
