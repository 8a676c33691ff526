"""Train for fewer bytes, or prune and quantise to them? What techniques on the cache cost, and what is best at the
bytes of each architecture's full cache.

Bytes are what one sequence's cache held at the end; quality is bits per byte of the second halves, or for the recall
task the share of queries answered right. Every difference is paired by seed. A model that was trained further for a
technique is compared with one that was trained as much further and keeps its full cache: tokens buy quality, too.
"""

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from archs.techniques import Technique, from_settings
from eval.compare import METRIC, paired

MEASURED = (  # what eval.techniques adds to the settings of an entry
    "prompt", "tokens", "val_nats", "val_bpb", "accuracy", "accuracy_at", "bytes_held", "notes_bytes",
    "tokens_per_s", "skipped",
)  # fmt: skip
TOLERANCE = 0.01  # share of the allowed bytes: slots and groups are whole, so a share of a cache is a little off
ACCURACIES = 0.99, 0.9, 0.5
ANY_PROMPT = 2**31  # tokens; the settings were checked for the study's prompt already


@dataclass
class Point:
    """One variant's cache under one technique."""

    label: str
    size: str
    settings: dict  # as the study gives them: technique, budget, ...
    entries: dict[int, dict] = field(default_factory=dict)  # seed -> what was measured
    skipped: str = ""

    @cached_property
    def technique(self) -> Technique:
        return from_settings(self.settings, ANY_PROMPT)[0]

    @property
    def trained_further(self) -> dict:
        """The training that the model had after the others; {} for none."""
        technique = self.technique
        return {"train_tokens": technique.train_tokens, "lr": technique.lr} if technique.trains else {}

    @property
    def is_full(self) -> bool:
        """True if the cache keeps everything and is not quantised."""
        return self.technique.is_full and not self.settings.get("bits")

    @property
    def kind(self) -> str:
        """The technique without its settings; `full` with bits is quantisation alone."""
        name, bits = self.settings["technique"], self.settings.get("bits")
        return name if not bits else "quantised" if name == "full" else f"{name}, quantised"

    @property
    def bytes_held(self) -> float:
        return statistics.fmean(entry["bytes_held"] for entry in self.entries.values())

    def qualities(self, metric: str) -> dict[int, float]:
        """The finite values of a metric, by seed."""
        values = {seed: entry.get(metric) for seed, entry in self.entries.items()}
        return {seed: value for seed, value in values.items() if value is not None and math.isfinite(value)}

    def names(self) -> dict:
        """The part of an entry in results.json that says what was measured."""
        facts = {"is_full": self.is_full, "kind": self.kind, "trained_further": self.trained_further}
        return {"label": self.label, "size": self.size, "settings": self.settings} | facts

    def facts(self, metric: str) -> dict:
        values, entries = self.qualities(metric), self.entries.values()
        return self.names() | {
            "metric": metric,
            "mean": statistics.fmean(values.values()) if values else None,
            "not_finite": sorted(self.entries.keys() - values.keys()),  # seeds
            "bytes_held": self.bytes_held,
            "notes_bytes": statistics.fmean(entry.get("notes_bytes") or 0.0 for entry in entries),
            "tokens_per_s": max(entry.get("tokens_per_s") or 0.0 for entry in entries),  # depends on no seed
        }


def technique_differences(records: Sequence[dict], level: float = 0.95) -> list[dict]:
    """For each variant and technique the means over seeds, and with `mean_diff` a COMPARISON with the same variant's
    full cache, its `baseline`, after as much training; where a technique was not measured, `Point.names` and
    `skipped`."""
    metric, points = _metric(records), _points(records)
    full, rows = _full_caches(points), []
    for point in points:
        if not point.entries:
            rows.append(point.names() | {"skipped": point.skipped})
            continue
        values, base = point.qualities(metric), full.get(_full_cache_of(point.label, point))
        compared = {} if base is None or base is point else paired(values, base.qualities(metric), level)
        rows.append(point.facts(metric) | {"baseline": point.label, "seeds": sorted(values)} | compared)
    return rows


def equal_bytes(records: Sequence[dict], level: float = 0.95) -> list[dict]:
    """For each variant as `baseline`, and for each variant and kind of technique, the setting that is best among those
    that hold at most the bytes of the baseline's full cache: a COMPARISON with that cache, after as much training. The
    best comes first.

    `chosen_from`: the number of settings that it is the best of. `best` marks the best of all for a baseline, if its
    mean is better than the baseline's. Only variants of the same size are compared. A setting that is not finite at
    some seed is no candidate, nor is one that shares a single seed with a baseline that has several.
    """
    metric, points = _metric(records), _points(records)
    better = -1 if metric == METRIC else 1  # the sign of a difference for the better
    rank = lambda entry: (-better * entry["mean_diff"], entry["bytes_held"])  # noqa: E731
    full, rows = _full_caches(points), []
    for label in dict.fromkeys(label for label, _ in full):
        groups: dict[tuple[str, str], list[dict]] = {}
        for point in points:
            base = full.get(_full_cache_of(label, point))
            if base is None:
                continue
            values, base_values = point.qualities(metric), base.qualities(metric)
            other = point.size == base.size and not (point.is_full and point.label == label)
            finite = point.entries and len(values) == len(point.entries)
            enough = len(values.keys() & base_values.keys()) >= max(1, min(2, len(base_values)))
            if other and finite and enough and point.bytes_held <= base.bytes_held * (1 + TOLERANCE):
                entry = {"baseline": label, "baseline_bytes": base.bytes_held} | point.facts(metric)
                groups.setdefault((point.label, point.kind), []).append(entry | paired(values, base_values, level))
        chosen = sorted((min(of, key=rank) | {"chosen_from": len(of)} for of in groups.values()), key=rank)
        rows += [entry | {"best": n == 0 and better * entry["mean_diff"] > 0} for n, entry in enumerate(chosen)]
    return rows


def bytes_for_accuracy(records: Sequence[dict]) -> list[dict]:
    """For each variant, kind of technique and number of pairs of the recall task {label, size, kind, pairs, bytes}: the
    fewest bytes of a sequence's cache, over the settings that were measured, with which at least a share of ACCURACIES
    of the queries is answered right in the mean over seeds; null where no setting is good enough."""
    groups: dict[tuple[str, str, str], list[Point]] = {}
    for point in _points(records):
        if point.entries:
            groups.setdefault((point.label, point.size, "full" if point.is_full else point.kind), []).append(point)
    rows = []
    for (label, size, kind), points in groups.items():
        first = next(iter(points[0].entries.values()))
        for pairs in sorted(first.get("accuracy_at", {}), key=int):
            reached = [
                (statistics.fmean(entry["accuracy_at"][pairs] for entry in point.entries.values()), point.bytes_held)
                for point in points
            ]
            needed = {
                f"{share:g}": min((held for accuracy, held in reached if accuracy >= share), default=None)
                for share in ACCURACIES
            }
            rows.append({"label": label, "size": size, "kind": kind, "pairs": int(pairs), "bytes": needed})
    return rows


def _metric(records: Sequence[dict]) -> str:
    """The metric of the study: accuracy if records have it, as those of the recall task do."""
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


def _full_cache_of(label: str, point: Point) -> tuple[str, str]:
    """The key in `_full_caches` of the cache that a point is compared with: that of `label`, after as much training."""
    return label, json.dumps(point.trained_further)


def _full_caches(points: Iterable[Point]) -> dict[tuple[str, str], Point]:
    """The points that keep a full cache, by label and further training; of several the study's first."""
    full: dict[tuple[str, str], Point] = {}
    for point in points:
        if point.is_full and point.entries:
            full.setdefault(_full_cache_of(point.label, point), point)
    return full
