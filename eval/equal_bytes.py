"""Train for fewer bytes, or prune and quantise to them? What techniques on the cache cost, and what is best at the
bytes of each architecture's full cache.

Bytes are what one sequence's cache held at the end; quality is bits per byte of the second halves, or for the recall
task the share of queries answered right. Every difference is paired by seed. What was trained further (DMC) is compared
with what was trained as much further and merges nothing: tokens buy quality, too.
"""

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from eval.compare import METRIC, paired

MEASURED = (  # what eval.techniques adds to the settings of an entry
    "prompt", "tokens", "val_nats", "val_bpb", "accuracy", "bytes_held", "notes_bytes", "tokens_per_s", "skipped",
)  # fmt: skip
TOLERANCE = 0.01  # of the bytes allowed: slots and groups are whole, so that a share of a cache is a little off


@dataclass
class Point:
    """One variant's cache under one technique."""

    label: str
    size: str
    settings: dict  # as the study gives them: technique, budget, ...
    entries: dict[int, dict] = field(default_factory=dict)  # seed -> what was measured
    skipped: str = ""

    @property
    def trained_further(self) -> dict:
        """The training that it had after the others; {} for none."""
        names = ("train_tokens", "lr") if self.settings["technique"] == "dmc" else ()
        return {name: self.settings.get(name) for name in names}

    @property
    def further(self) -> str:
        return json.dumps(self.trained_further)

    @property
    def is_full(self) -> bool:
        whole = self.settings["technique"] == "full" or (
            self.settings["technique"] == "dmc" and self.settings.get("budget", 1.0) == 1.0
        )
        return whole and not self.settings.get("bits")

    @property
    def kind(self) -> str:
        """The technique, whatever its settings; `full` packed is quantisation alone."""
        name, bits = self.settings["technique"], self.settings.get("bits")
        return name if not bits else "quantised" if name == "full" else f"{name}, quantised"

    @property
    def bytes_held(self) -> float:
        return statistics.fmean(entry["bytes_held"] for entry in self.entries.values())

    def qualities(self, metric: str) -> dict[int, float]:
        """The finite ones, by seed."""
        values = {seed: entry.get(metric) for seed, entry in self.entries.items()}
        return {seed: value for seed, value in values.items() if value is not None and math.isfinite(value)}

    def facts(self, metric: str) -> dict:
        found, entries = self.qualities(metric), self.entries.values()
        return {
            "label": self.label,
            "size": self.size,
            "settings": self.settings,
            "kind": self.kind,
            "is_full": self.is_full,
            "trained_further": self.trained_further,
            "metric": metric,
            "mean": statistics.fmean(found.values()) if found else None,
            "not_finite": sorted(self.entries.keys() - found.keys()),  # seeds
            "bytes_held": self.bytes_held,
            "notes_bytes": statistics.fmean(entry.get("notes_bytes") or 0.0 for entry in entries),
            "tokens_per_s": max(entry.get("tokens_per_s") or 0.0 for entry in entries),  # depends on no seed
        }


def technique_differences(records: Sequence[dict], level: float = 0.95) -> list[dict]:
    """For each variant and technique the means over seeds, and with `mean_diff` a COMPARISON with the same variant's
    full cache, its `baseline`, after as much training; where a technique was not measured {label, size, settings, kind,
    is_full, trained_further, skipped}."""
    metric, points = _metric(records), _points(records)
    full = _full_caches(points)
    found = []
    for point in points:
        if not point.entries:
            facts = {"label": point.label, "size": point.size, "settings": point.settings, "kind": point.kind}
            facts |= {"is_full": point.is_full, "trained_further": point.trained_further}
            found.append(facts | {"skipped": point.skipped})
            continue
        own, base = point.qualities(metric), full.get((point.label, point.further))
        compared = {} if base is None or base is point else paired(own, base.qualities(metric), level)
        what = {"baseline": point.label, "seeds": sorted(own)}
        found.append(point.facts(metric) | what | compared)
    return found


def equal_bytes(records: Sequence[dict], level: float = 0.95) -> list[dict]:
    """For each variant as `baseline`, for each variant and kind of technique the setting that is best against it among
    those that hold at most the bytes of the baseline's full cache: a COMPARISON with that, after as much training; the
    best first.

    `chosen_from` says of how many it is the best; `best` marks the best of all for a baseline, where its mean is better
    than the baseline's. Only variants of one size meet. What is not finite at some seed is no candidate, nor is what
    shares one seed alone with a baseline that has several.
    """
    metric, points = _metric(records), _points(records)
    better = -1 if metric == METRIC else 1  # the sign of a difference for the better
    rank = lambda entry: (-better * entry["mean_diff"], entry["bytes_held"])  # noqa: E731
    found = []
    full = _full_caches(points)
    for label in dict.fromkeys(label for label, _ in full):
        groups: dict[tuple[str, str], list[dict]] = {}
        for point in points:
            base = full.get((label, point.further))
            if base is None:
                continue
            own, wanted = point.qualities(metric), base.qualities(metric)
            other = point.size == base.size and not (point.is_full and point.label == label)
            whole = point.entries and len(own) == len(point.entries)
            enough = len(own.keys() & wanted.keys()) >= max(1, min(2, len(wanted)))
            if other and whole and enough and point.bytes_held <= base.bytes_held * (1 + TOLERANCE):
                entry = {"baseline": label, "baseline_bytes": base.bytes_held} | point.facts(metric)
                groups.setdefault((point.label, point.kind), []).append(entry | paired(own, wanted, level))
        chosen = sorted((min(of, key=rank) | {"chosen_from": len(of)} for of in groups.values()), key=rank)
        found += [entry | {"best": n == 0 and better * entry["mean_diff"] > 0} for n, entry in enumerate(chosen)]
    return found


def _metric(records: Sequence[dict]) -> str:
    """Accuracy where it is what the study is about: on text every record's loss is without it."""
    return "accuracy" if any("accuracy" in record["loss"] for record in records) else METRIC


def _points(records: Sequence[dict]) -> list[Point]:
    points: dict[tuple[str, str], Point] = {}
    for record in records:
        for entry in record.get("techniques") or []:
            settings = {key: value for key, value in entry.items() if key not in MEASURED}
            at = record["label"], json.dumps(settings, sort_keys=True)
            point = points.setdefault(at, Point(record["label"], record["size"], settings))
            if "skipped" in entry:
                point.skipped = entry["skipped"]
            else:
                point.entries[record["seed"]] = entry
    return list(points.values())


def _full_caches(points: Iterable[Point]) -> dict[tuple[str, str], Point]:
    """By label and further training; of several the study's first."""
    found: dict[tuple[str, str], Point] = {}
    for point in points:
        if point.is_full and point.entries:
            found.setdefault((point.label, point.further), point)
    return found
