"""Reads a study's `results.json` (the contract in DESIGN.md). Runs of one label are the seeds of one variant: figures,
tables and report work on variants, never on single runs."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from pathlib import Path

from plots import choose
from plots.choose import spread_evenly, without_size
from plots.style import Look, plain_text

FORMAT = 2  # as eval/results.py writes it; a file without the number is read as if it had it
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}
NAMED = 12  # runs without results that are named one by one


class ResultsError(ValueError):
    """A results file that cannot be drawn; the message says in one line what is wrong and what to do."""


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


def is_in_cache(timing: dict) -> bool:
    """True for a decode timing that reads faster than memory can: the model fits into the processor's cache."""
    return (number(timing.get("roof_fraction")) or 0) > 1


def one_line(text: str) -> str:
    return " ".join(text.split())


@dataclass(frozen=True)
class Difference:
    """A COMPARISON: mean over seeds of (label - baseline), paired by seed. Without an interval where there is one seed,
    without a mean where nothing was compared."""

    label: str
    baseline: str
    metric: str
    seeds: int
    mean: float | None
    low: float | None
    high: float | None
    level: float
    verdict: str
    holds_together: bool | None = None  # with all other comparisons

    @classmethod
    def of(cls, entry: dict) -> "Difference":
        middle, low, high = (number(entry.get(key)) for key in ("mean_diff", "ci_low", "ci_high"))
        names = entry["label"], entry["baseline"], entry["metric"]
        level, verdict = entry.get("level", 0.95), entry.get("verdict", "")
        return cls(*names, len(entry["seeds"]), middle, low, high, level, verdict, entry.get("holds_together"))

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
class TechniqueResult:
    """What was measured of one variant's cache under one technique, mean over seeds: an entry of `techniques` or of
    `equal_bytes`."""

    label: str
    settings: dict  # as the study gives them: technique, budget, bits, ...
    kind: str  # the technique and whether the cache is quantised, whatever the other settings
    is_full: bool  # nothing is dropped, merged or quantised
    trained_further: dict  # the training that the model had for this technique after the others; {} for none
    metric: str
    mean: float | None  # of the metric
    not_finite: list[int]  # seeds
    bytes_held: float
    notes_bytes: float
    tokens_per_s: float
    difference: Difference  # to the full cache of `difference.baseline`
    baseline_bytes: float | None = None  # this and what follows: in `equal_bytes` only
    chosen_from: int = 1
    best: bool = False

    @classmethod
    def of(cls, entry: dict) -> "TechniqueResult":
        is_optional = {field.name: field.default is not MISSING for field in fields(cls) if field.name != "difference"}
        known = {name: entry[name] for name, optional in is_optional.items() if not optional or name in entry}
        return cls(**known, difference=Difference.of(entry))

    @property
    def is_unchanged(self) -> bool:
        """True where neither the cache nor the model was changed for a technique."""
        return self.is_full and not self.trained_further

    @property
    def technique(self) -> str:
        """The kind without its quantisation: with and without it a technique has one colour."""
        return self.kind.removesuffix(", quantised")


@dataclass(frozen=True)
class VariantResults:
    label: str
    arch: str
    family: str  # the study's label for it, without what its lists and the sizes add
    size: str  # empty where the study has models of one size
    baseline: str  # the label it is matched to and compared with
    look: Look
    bytes_per_token: int  # these two of the KV cache
    constant_bytes: int
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
        """A value that is the same in every seed: byte counts, parameters, options."""
        return dig(self.runs[0], path)

    def values(self, path: str) -> list[float]:
        return [value for run in self.runs if (value := number(dig(run, path))) is not None]

    def mean(self, path: str) -> float | None:
        return mean(self.values(path))

    @property
    def tuning_seeds(self) -> list[int]:
        """The seeds that each learning rate was tried with, [] where the study gives the rate."""
        tuning = self.first("tuning") or {}
        return tuning.get("seeds") or [tuning[key] for key in ("seed",) if key in tuning]  # once there was one seed

    @property
    def cost_of_sqrt2(self) -> float | None:
        """The bits per byte that a learning rate off by a factor of sqrt(2) costs; None where nothing was fitted."""
        return number(self.first("tuning.cost_of_sqrt2"))

    @cached_property
    def decode(self) -> dict[tuple[int, int], dict]:
        """(batch, context) -> the fastest timing over seeds, as speed depends on the shape and not on the seed.

        `slowest_tokens_per_s` is that of the slowest seed, None where there is one seed. Where a run timed several
        backends, its fastest counts. A timing above the memory roof was served by the processor's cache, so it does
        not count as bound by memory.
        """
        points: dict[tuple[int, int], dict[int, dict]] = {}
        for run in self.runs:
            for entry in run.get("decode") or []:
                if all((number(entry.get(key)) or 0) > 0 for key in ("batch", "context", "token_ms", "tokens_per_s")):
                    seeds = points.setdefault((entry["batch"], entry["context"]), {})
                    seeds[run["seed"]] = max(seeds.get(run["seed"], entry), entry, key=lambda e: e["tokens_per_s"])
        keys = ("token_ms", "token_ms_iqr", "tokens_per_s", "prefill_ms", "roof_fraction", "memory_bound", "backend")
        timings = {}
        for at, seeds in sorted(points.items()):
            speeds = {seed: entry["tokens_per_s"] for seed, entry in seeds.items()}
            fastest = seeds[max(speeds, key=speeds.get)]
            slowest = min(speeds.values()) if len(speeds) > 1 else None
            over_seeds = {"slowest_tokens_per_s": slowest, "seeds": len(speeds)}
            timings[at] = {key: fastest.get(key) for key in keys} | over_seeds
            if is_in_cache(timings[at]):
                timings[at]["memory_bound"] = False
        return timings


@dataclass(frozen=True)
class Results:
    raw: dict
    variants: list[VariantResults]
    comparisons: list[Difference]  # of the metric that the study is about
    details: list[Difference]  # of other metrics
    techniques: list[TechniqueResult]
    equal_bytes: list[TechniqueResult]

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
        """The data type of the caches, such as " (fp32)"."""
        dtypes = {DTYPES.get(str(variant.first("kv.dtype"))) for variant in self.variants} - {None}
        return f" ({', '.join(sorted(dtypes))})" if dtypes else ""

    @property
    def seeds_text(self) -> str:
        low, high = self.seeds
        return "1 seed" if high == 1 else f"mean of {low} seeds" if low == high else f"mean of {low} to {high} seeds"

    @cached_property
    def labels(self) -> dict[str, VariantResults]:
        return {variant.label: variant for variant in self.variants}

    @cached_property
    def sizes(self) -> dict[str, list[VariantResults]]:
        """The variants of each size, smallest first; one entry, "", where the study has one size."""
        sizes: dict[str, list[VariantResults]] = {}
        for variant in self.variants:
            sizes.setdefault(variant.size, []).append(variant)
        return dict(sorted(sizes.items(), key=lambda item: number(item[1][0].first("params")) or 0))

    @property
    def shown_sizes(self) -> dict[str, list[VariantResults]]:
        """At most four sizes: figures with a panel per size have no room for more."""
        return dict(spread_evenly(list(self.sizes.items()), 4))

    @property
    def shown_variants(self) -> list[VariantResults]:
        """The variants of the shown sizes."""
        return [variant for variants in self.shown_sizes.values() for variant in variants]

    @property
    def largest(self) -> list[VariantResults]:
        """The variants of the largest size."""
        return list(self.sizes.values())[-1]

    def size_title(self, size: str) -> str:
        params = number(self.sizes[size][0].first("params"))
        return f"{size} ({plain_text(params, 3)})" if params else size

    @cached_property
    def differences(self) -> dict[tuple[str, str], Difference]:
        """(label, metric) -> its difference to the baseline; a metric is a path in the record's `loss`."""
        return {(each.label, each.metric): each for each in [*self.details, *self.comparisons]}

    @cached_property
    def levels(self) -> list[float]:
        """The levels of all intervals, in per cent."""
        others = [each.difference for each in [*self.techniques, *self.equal_bytes]]
        return sorted({100 * each.level for each in [*self.differences.values(), *others] if each.low is not None})

    @cached_property
    def gaps(self) -> str:
        """A sentence on the runs that the study asked for and that have no record; empty where all have one."""
        gaps = self.raw.get("missing", [])
        if not gaps:
            return ""
        names = [f"{gap['label']} seed {gap['seed']} ({one_line(gap['why'])})" for gap in gaps[:NAMED]]
        if len(gaps) > NAMED:
            names.append(f"and {len(gaps) - NAMED} more")
        return f"Without results: {'; '.join(names)}."

    @property
    def has_tuning_text(self) -> bool:
        """True if curves and tuning are of the split `tune`, and not of the text that the losses are measured on."""
        return dig(self.raw, "corpus.tune_tokens") is not None

    @property
    def tuning_seeds_text(self) -> str:
        counts = sorted({len(variant.tuning_seeds) for variant in self.variants if variant.tuning_seeds})
        seeds = sorted({seed for variant in self.variants for seed in variant.tuning_seeds})
        if len(counts) > 1:
            return f"{counts[0]} to {counts[-1]} seeds, numbered from {seeds[0]}"
        return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"

    def cost_of_rates(self, each: Difference) -> float | None:
        """The bits per byte that a difference may owe to one learning rate that is off by a factor of sqrt(2): the
        larger of the two variants' costs. None for another metric, and where one of the two is not known."""
        pair = [self.labels[label].cost_of_sqrt2 for label in (each.label, each.baseline) if label in self.labels]
        return max(pair) if each.metric == "val_bpb" and len(pair) == 2 and None not in pair else None

    def difference_row(self, variant: VariantResults, metric: str) -> dict:
        if each := self.differences.get((variant.label, metric)):
            return each.row()
        return dict.fromkeys(("difference", "difference_low", "difference_high", "difference_seeds"))

    @cached_property
    def reference(self) -> tuple[int, int] | None:
        """The largest batch x context of those at which the most variants were timed."""
        timed = Counter(at for variant in self.variants for at in variant.decode)
        return max(timed, key=lambda at: (timed[at], at[0] * at[1], at[0]), default=None)


def load(
    *directories: str | Path, variants: Sequence[str] | None = None, labels: Mapping[str, str] | None = None
) -> Results:
    """The results in a study's directory; or in several, on one plane. `variants`: these alone, in this order.
    `labels`: what some of them are to be called. ResultsError says in one line why they cannot be drawn."""
    raws = [_read(Path(directory)) for directory in directories]
    where = ", ".join(str(Path(directory) / "results.json") for directory in directories)
    try:
        raw = choose.present(raws[0]) if len(raws) == 1 else choose.combined([*map(choose.present, raws)])
        raw = choose.subset(raw, variants) if variants else raw
        raw = choose.renamed(raw, labels) if labels else raw
        _check_is_one_study(raw, where)
        return Results(
            raw,
            _variants(raw),
            [Difference.of(entry) for entry in raw.get("comparisons", [])],
            [Difference.of(entry) for entry in raw.get("details", [])],
            [TechniqueResult.of(entry) for entry in raw.get("techniques", []) if "skipped" not in entry],
            [TechniqueResult.of(entry) for entry in raw.get("equal_bytes", [])],
        )
    except choose.ChoiceError as error:
        raise ResultsError(f"{where}: {error}") from None
    except (AttributeError, KeyError, TypeError) as error:
        raise _not_drawable(where, directories[0], error) from error


def _read(directory: Path) -> dict:
    path = directory / "results.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ResultsError(f"{path}: no such file; `kvfrontier run` or `kvfrontier eval` writes it") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ResultsError(f"{path}: cannot be read as JSON ({reason}); {_again(directory)}") from None
    try:
        if raw.get("format", FORMAT) != FORMAT:
            known = f"only format {FORMAT} can be drawn; {_again(directory)}"
            raise ResultsError(f"{path}: has format {raw['format']}, and {known}")
        if not raw["runs"]:
            raise ResultsError(f"{path}: no finished runs; train first with `kvfrontier run` or `kvfrontier train`")
    except (AttributeError, KeyError, TypeError) as error:
        raise _not_drawable(path, directory, error) from error
    return raw


def _again(directory: str | Path) -> str:
    return f"run `kvfrontier eval {directory}` to write it again"


def _not_drawable(where: str | Path, directory: str | Path, error: Exception) -> ResultsError:
    reason = f"no {error}" if isinstance(error, KeyError) else error
    return ResultsError(f"{where}: not in the form that can be drawn ({reason}); {_again(directory)}")


def _check_is_one_study(raw: dict, where: str) -> None:
    whole = {"corpus_fingerprint": dig(raw, "corpus.fingerprint"), "match": raw.get("match"), "tokenizer": None}
    for key, value in whole.items():
        values = [each for each in (*(run.get(key) for run in raw["runs"]), value) if each]
        texts = dict.fromkeys(json.dumps(each, sort_keys=True) for each in values)
        if len(texts) > 1:
            raise ResultsError(
                f'{where}: runs that differ in "{key}" ({" and ".join(texts)}) cannot be drawn together; evaluate each '
                "on its own"
            )


def _variants(raw: dict) -> list[VariantResults]:
    archs = list(dict.fromkeys([*raw.get("archs", []), *(run["arch"] for run in raw["runs"])]))
    by_label: dict[str, list[dict]] = {}
    for run in raw["runs"]:
        by_label.setdefault(run["label"], []).append(run)
    variants: list[VariantResults] = []
    siblings: dict[str, list[str]] = {}  # of each architecture: a variant looks the same at every size
    for label, runs in by_label.items():
        run, arch = runs[0], runs[0]["arch"]
        short, known = without_size(label, run["size"]), siblings.setdefault(arch, [])
        if short not in known:
            known.append(short)
        look = Look.of(archs.index(arch), known.index(short))
        names = label, arch, run["family"], run["size"], run["baseline"]
        variants.append(VariantResults(*names, look, run["kv"]["bytes_per_token"], run["kv"]["constant_bytes"], runs))
    return variants
