"""Reads a study's `results.json` (the contract in DESIGN.md): checked once here, so that figures, tables and report can
trust it. Runs of one label are seeds of one variant; everything downstream works on variants, never on single runs."""

import json
import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from plots.style import Look, plain_text

DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}
NAMED = 12  # runs without results that are named one by one


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


def tidy(label) -> str:
    return " ".join(str(label).split())


@dataclass(frozen=True)
class Difference:
    """A COMPARISON: mean over seeds of (label - baseline), paired by seed; no ends where there is one seed."""

    label: str
    baseline: str
    metric: str
    seeds: int
    mean: float | None
    low: float | None
    high: float | None
    level: float
    verdict: str

    @classmethod
    def of(cls, entry: dict) -> "Difference":
        seeds, ends = entry.get("seeds"), [number(entry.get(key)) for key in ("mean_diff", "ci_low", "ci_high")]
        count = len(seeds) if isinstance(seeds, list) else int(number(seeds) or 0)
        names = tidy(entry.get("label")), tidy(entry.get("baseline")), str(entry.get("metric"))
        if None in ends:
            ends[1:] = None, None
        return cls(*names, count, *ends, number(entry.get("level")) or 0.95, str(entry.get("verdict")))

    @property
    def separable(self) -> bool:
        return self.low is not None and self.verdict in ("lower", "higher")

    @property
    def interval(self) -> str:
        if self.low is None:
            return f"n = {self.seeds}"
        return f"{100 * self.level:g} % interval {self.low:+.4f} to {self.high:+.4f}, n = {self.seeds}"

    def row(self) -> dict:
        """The columns of a figure's CSV that hold a difference."""
        ends = {"difference": self.mean, "difference_low": self.low, "difference_high": self.high}
        return ends | {"difference_seeds": self.seeds}


@dataclass(frozen=True)
class Variant:
    label: str
    arch: str
    family: str  # what the study calls it, before its lists are written out: gqa for gqa-4 and gqa-2
    size: str  # empty where the study has models of one size
    baseline: str  # the label it is matched to and compared with
    look: Look
    runs: list[dict]  # one record a seed

    @property
    def short(self) -> str:
        """The label without the size."""
        return without_size(self.label, self.size)

    @property
    def value(self) -> str:
        """What tells it from the rest of its family."""
        return self.short.removeprefix(self.family).lstrip("-")

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
        """(batch, context) -> the fastest timing, as speed depends on the shape and not on the seed.

        `slowest_tokens_per_s` is that of the slowest seed, where there are several. Where a run timed several backends,
        its fastest stands.
        """
        points: dict[tuple[int, int], dict[int, dict]] = {}
        for run in self.runs:
            for entry in run.get("decode") or []:
                if all((number(entry.get(key)) or 0) > 0 for key in ("batch", "context", "token_ms", "tokens_per_s")):
                    seeds = points.setdefault((entry["batch"], entry["context"]), {})
                    seeds[run["seed"]] = max(seeds.get(run["seed"], entry), entry, key=lambda e: e["tokens_per_s"])
        fields = ("token_ms", "token_ms_iqr", "tokens_per_s", "prefill_ms", "roof_fraction", "memory_bound", "backend")
        found = {}
        for at, seeds in sorted(points.items()):
            speeds = {seed: entry["tokens_per_s"] for seed, entry in seeds.items()}
            fastest = seeds[max(speeds, key=speeds.get)]
            slowest = min(speeds.values()) if len(speeds) > 1 else None
            of_seeds = {"slowest_tokens_per_s": slowest, "seeds": len(speeds)}
            found[at] = {field: fastest.get(field) for field in fields} | of_seeds
        return found


def spread_evenly(items: list, most: int) -> list:
    """At most `most` of the items, the first and the last among them."""
    last = min(len(items), most) - 1
    return [items[round(index * (len(items) - 1) / last)] for index in range(last + 1)] if last > 0 else items[:1]


def without_size(label: str, size: str) -> str:
    return label.removesuffix(f"-{size}") if size else label


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
    def cache_text(self) -> str:
        """What caches' bytes are of, such as " (fp32)"."""
        dtypes = {DTYPES.get(str(variant.first("kv.dtype"))) for variant in self.variants} - {None}
        return f" ({', '.join(sorted(dtypes))})" if dtypes else ""

    @property
    def seeds_text(self) -> str:
        low, high = self.seeds
        return "1 seed" if high == 1 else f"mean of {low} seeds" if low == high else f"mean of {low} to {high} seeds"

    @cached_property
    def labels(self) -> dict[str, Variant]:
        return {variant.label: variant for variant in self.variants}

    @cached_property
    def sizes(self) -> dict[str, list[Variant]]:
        """The variants of each size, smallest first; one entry, "", where the study has one size."""
        sizes: dict[str, list[Variant]] = {}
        for variant in self.variants:
            sizes.setdefault(variant.size, []).append(variant)
        return dict(sorted(sizes.items(), key=lambda item: number(item[1][0].first("params")) or 0))

    @property
    def shown_sizes(self) -> dict[str, list[Variant]]:
        """At most four sizes: what figures with a panel a size have room for."""
        return dict(spread_evenly(list(self.sizes.items()), 4))

    @property
    def largest(self) -> list[Variant]:
        return list(self.sizes.values())[-1]

    def size_title(self, size: str) -> str:
        params = number(self.sizes[size][0].first("params"))
        return f"{size} ({plain_text(params, 3)})" if params else size

    @cached_property
    def comparisons(self) -> list[Difference]:
        return [Difference.of(entry) for entry in self.raw.get("comparisons") or []]

    @cached_property
    def differences(self) -> dict[tuple[str, str], Difference]:
        """(label, metric) -> its difference to the baseline; a metric is a path in the record's `loss`."""
        details = [Difference.of(entry) for entry in self.raw.get("details") or []]
        return {(each.label, each.metric): each for each in [*details, *self.comparisons]}

    @cached_property
    def levels(self) -> list[float]:
        """Of the intervals, in per cent."""
        others = [Difference.of(entry) for key in ("techniques", "equal_bytes") for entry in self.raw.get(key) or []]
        return sorted({100 * each.level for each in [*self.differences.values(), *others] if each.low is not None})

    @cached_property
    def gaps(self) -> str:
        """A sentence on the runs that the study asked for and that have no record; empty where all have."""
        gaps = self.raw.get("missing") or []
        named = [f"{tidy(gap.get('label'))} seed {gap.get('seed')} ({tidy(gap.get('why'))})" for gap in gaps[:NAMED]]
        more = [f"and {len(gaps) - NAMED} more"] if len(gaps) > NAMED else []
        return f"Without results: {'; '.join(named + more)}." if gaps else ""

    def difference_row(self, variant: Variant, metric: str) -> dict:
        none = dict.fromkeys(("difference", "difference_low", "difference_high", "difference_seeds"))
        found = self.differences.get((variant.label, metric))
        return found.row() if found else none

    @cached_property
    def reference(self) -> tuple[int, int] | None:
        """The largest batch x context of those at which the most variants were timed."""
        timed = Counter(at for variant in self.variants for at in variant.decode)
        return max(timed, key=lambda at: (timed[at], at[0] * at[1], at[0]), default=None)


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
    for key in ("comparisons", "details", "bytes_for_baseline", "missing", "techniques", "equal_bytes"):
        if not _objects(raw.get(key)):
            raise ResultsError(f'{path}: "{key}" is not a list of objects; {again}')
    matching = raw.get("matching") or {}
    if not isinstance(matching, dict) or not all(map(_objects, matching.values())):
        raise ResultsError(f'{path}: "matching" does not map rules to lists of objects; {again}')
    if not runs:
        raise ResultsError(f"{path}: no finished runs in it; train first with `kvfrontier run` or `kvfrontier train`")
    for index, run in enumerate(runs):
        if problem := _problem(run):
            raise ResultsError(f"{path}: runs[{index}] {problem}; {again}")
    labels = {tidy(run["label"]) for run in runs}
    for key in ("techniques", "equal_bytes"):
        for index, entry in enumerate(raw.get(key) or []):
            if problem := _technique_problem(entry, labels, key == "equal_bytes"):
                raise ResultsError(f"{path}: {key}[{index}] {problem}; {again}")
    study_wide = {"corpus_fingerprint": dig(raw, "corpus.fingerprint"), "match": raw.get("match"), "tokenizer": None}
    for key, value in study_wide.items():
        values = {json.dumps(each, sort_keys=True): None for each in (*(run.get(key) for run in runs), value) if each}
        if len(values) > 1:
            raise ResultsError(
                f'{path}: runs that differ in "{key}" ({" and ".join(values)}) cannot be drawn together; evaluate each '
                "on its own"
            )
    return Study(raw, _variants(raw, runs, path))


def _variants(raw: dict, runs: list[dict], path: Path) -> list[Variant]:
    archs = list(dict.fromkeys([*map(str, raw.get("archs") or []), *(run["arch"] for run in runs)]))
    planned = dig(raw, "study_settings.variants") or [{}]
    first = tidy(planned[0].get("label") or planned[0].get("arch") or runs[0]["label"])
    by_label: dict[str, list[dict]] = {}
    for run in runs:
        by_label.setdefault(tidy(run["label"]), []).append(run)
    variants: list[Variant] = []
    siblings: dict[str, list[str]] = {}  # of an architecture: a variant looks the same at every size
    for label, group in by_label.items():
        run, arch = group[0], group[0]["arch"]
        if any(other["arch"] != arch for other in group):
            raise ResultsError(f"{path}: label {label!r} stands for two architectures; give each variant its own label")
        size = tidy(run.get("size") or "")
        short, known = without_size(label, size), siblings.setdefault(arch, [])
        if short not in known:
            known.append(short)
        look = Look.of(archs.index(arch), known.index(short))
        family, baseline = tidy(run.get("family") or short), tidy(run.get("baseline") or first)
        variants.append(Variant(label, arch, family, size, baseline, look, group))
    return variants


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
    rates = dig(run, "tuning.rates")
    if run.get("tuning") and not (isinstance(run["tuning"], dict) and rates and _objects(rates)):
        return 'has a "tuning" without a list of objects "rates"'
    for key in ("nats_at", "accuracy_at"):
        if not all(str(at).isdigit() for at in dig(run, f"loss.{key}") or {}):
            return f'has a "loss.{key}" whose keys are not counts'
    if not (_objects(run.get("decode")) and _objects(run.get("curve"))):
        return 'has a "decode" or "curve" that is not a list of objects'
    return None


def _technique_problem(entry: dict, labels: set[str], at_equal_bytes: bool) -> str | None:
    for key in ("label", "baseline") if at_equal_bytes else ("label",):
        if tidy(entry.get(key)) not in labels:
            return f'has a "{key}" that is none of the runs\''
    settings = entry.get("settings")
    if not (isinstance(settings, dict) and isinstance(settings.get("technique"), str) and settings["technique"]):
        return 'has no "settings" that name a "technique"'
    if "skipped" in entry and not at_equal_bytes:
        return None
    if entry.get("metric") not in ("val_bpb", "accuracy"):
        return 'has a "metric" that is neither val_bpb nor accuracy'
    for key in ("bytes_held", *(["baseline_bytes", "mean", "mean_diff"] if at_equal_bytes else [])):
        if number(entry.get(key)) is None:
            return f'has no number "{key}"'
    return None


def _objects(items) -> bool:
    return items is None or (isinstance(items, list) and all(isinstance(item, dict) for item in items))
