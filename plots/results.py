"""Reads a study's `results.json` (the contract in DESIGN.md): checked once here, so that figures, tables and report can
trust it. Runs of one label are seeds of one variant; everything downstream works on variants, never on single runs."""

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from plots.style import Look


class ResultsError(ValueError):
    """A results file that cannot be drawn; the message says what is wrong and what to do, in one line."""


def number(value) -> float | int | None:
    """`value` if it is a finite number, else None: a diverged loss is NaN, what was not measured is missing or null."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) else None


def dig(record: dict, path: str):
    """The value at a dotted path, None where any part of it is missing."""
    for key in path.split("."):
        record = record.get(key) if isinstance(record, dict) else None
    return record


def mean(values) -> float | None:
    known = [value for value in map(number, values) if value is not None]
    return sum(known) / len(known) if known else None


@dataclass(frozen=True)
class Variant:
    label: str
    arch: str
    look: Look
    runs: list[dict]  # one record a seed

    @property
    def seeds(self) -> int:
        return len({run["seed"] for run in self.runs})

    def first(self, path: str):
        """What is the same in every seed: byte counts, parameters, options."""
        return dig(self.runs[0], path)

    def values(self, path: str) -> list[float]:
        return [value for run in self.runs if (value := number(dig(run, path))) is not None]

    def mean(self, path: str) -> float | None:
        return mean(self.values(path))

    @cached_property
    def decode(self) -> dict[tuple[int, int], dict]:
        """(batch, context) -> means over seeds. Where one run timed several backends, the fastest one stands."""
        points: dict[tuple[int, int], list[dict]] = {}
        for run in self.runs:
            fastest = {}
            for entry in run.get("decode") or []:
                if all((number(entry.get(key)) or 0) > 0 for key in ("batch", "context", "token_ms", "tokens_per_s")):
                    at = entry["batch"], entry["context"]
                    fastest[at] = max(fastest.get(at, entry), entry, key=lambda e: e["tokens_per_s"])
            for at, entry in fastest.items():
                points.setdefault(at, []).append(entry)
        fields = ("token_ms", "token_ms_iqr", "tokens_per_s", "prefill_ms", "roof_fraction")
        return {
            at: {field: mean(entry.get(field) for entry in entries) for field in fields}
            | {"memory_bound": all_or_none([entry.get("memory_bound") for entry in entries])}
            | {"backend": ", ".join(sorted({str(entry.get("backend", "")) for entry in entries}))}
            for at, entries in sorted(points.items())
        }


def all_or_none(flags: list) -> bool | None:
    """True if every seed says so, False if one denies it, None if a file does not say."""
    return None if any(flag is None for flag in flags) else all(flags)


@dataclass(frozen=True)
class Study:
    raw: dict
    variants: list[Variant]

    @property
    def name(self) -> str:
        return str(self.raw.get("study") or "study")

    @property
    def seeds(self) -> tuple[int, int]:
        """Fewest and most seeds of a variant."""
        counts = [variant.seeds for variant in self.variants]
        return min(counts), max(counts)

    @property
    def seeds_text(self) -> str:
        low, high = self.seeds
        return "1 seed" if high == 1 else f"mean of {low} seeds" if low == high else f"mean of {low} to {high} seeds"

    @cached_property
    def reference(self) -> tuple[int, int] | None:
        """The largest batch x context that every variant was timed at."""
        common = set.intersection(*(set(variant.decode) for variant in self.variants))
        return max(common, key=lambda at: (at[0] * at[1], at[0]), default=None)


def load(directory: Path) -> Study:
    path = Path(directory) / "results.json"
    again = f"run `kvfrontier eval {directory}` to write it again"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ResultsError(f"{path}: no such file; `kvfrontier run` or `kvfrontier eval` writes it") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ResultsError(f"{path}: cannot be read as JSON ({reason}); {again}") from None
    runs = raw.get("runs") if isinstance(raw, dict) else None
    if not isinstance(runs, list):
        raise ResultsError(f'{path}: no list "runs" in it; {again}')
    if not _objects(raw.get("comparisons")):
        raise ResultsError(f'{path}: "comparisons" is not a list of objects; {again}')
    if not runs:
        raise ResultsError(f"{path}: no finished runs in it; train first with `kvfrontier run` or `kvfrontier train`")
    for index, run in enumerate(runs):
        if problem := _problem(run):
            raise ResultsError(f"{path}: runs[{index}] {problem}; {again}")
    prints = {run.get("corpus_fingerprint") for run in runs} | {dig(raw, "corpus.fingerprint")}
    if len(prints - {None}) > 1:
        raise ResultsError(f"{path}: runs on different corpora cannot be drawn together; evaluate each on its own")

    archs = list(dict.fromkeys([*map(str, raw.get("archs") or []), *(run["arch"] for run in runs)]))
    by_label: dict[str, list[dict]] = {}
    for run in runs:
        by_label.setdefault(" ".join(run["label"].split()), []).append(run)
    variants: list[Variant] = []
    for label, group in by_label.items():
        arch = group[0]["arch"]
        if any(run["arch"] != arch for run in group):
            raise ResultsError(f"{path}: label {label!r} stands for two architectures; give each variant its own label")
        siblings = sum(other.arch == arch for other in variants)
        variants.append(Variant(label, arch, Look.of(archs.index(arch), siblings), group))
    return Study(raw, variants)


def _problem(run) -> str | None:
    if not isinstance(run, dict):
        return "is not an object"
    for key, kind in {"label": str, "arch": str, "seed": int}.items():
        if not isinstance(run.get(key), kind) or run[key] == "":
            return f'has no valid "{key}"'
    for path in ("kv.bytes_per_token", "kv.constant_bytes"):
        if number(dig(run, path)) is None:
            return f'has no number "{path}"'
    if not isinstance(dig(run, "loss.val_bpb"), int | float | None):
        return 'has no number "loss.val_bpb"'
    if not all(
        str(key).isdigit() and number(value) is not None for key, value in (dig(run, "kv.stored_bytes") or {}).items()
    ):
        return 'has a "kv.stored_bytes" that does not map contexts to bytes'
    if not isinstance(run.get("options") or {}, dict):
        return 'has "options" that are not an object'
    if not (_objects(run.get("decode")) and _objects(run.get("curve"))):
        return 'has a "decode" or "curve" that is not a list of objects'
    return None


def _objects(items) -> bool:
    return items is None or (isinstance(items, list) and all(isinstance(item, dict) for item in items))
