"""What is drawn of one or several results files: which variants, in which order, under which names.

Functions take the content of results.json and return a new one. A variant is named by its label, or by that without the
size for all sizes of it. ChoiceError says in one line what does not fit.
"""

from collections.abc import Mapping, Sequence
from typing import Any

TIMED = "decode", "recompute", "paging"  # in a record: comparable on one machine alone
COMPARED = "comparisons", "details", "techniques", "equal_bytes", "bytes_for_baseline", "bytes_for_accuracy"
COMPARED += "gap_changes", "scaling"
NAMES = "label", "baseline", "family", "labels"

Raw = dict[str, Any]


class ChoiceError(ValueError):
    pass


def without_size(label: str, size: str) -> str:
    return label.removesuffix(f"-{size}") if size else label


def spread_evenly(items: list, most: int) -> list:
    """At most `most` of the items, the first and the last among them."""
    last = min(len(items), most) - 1
    return [items[round(index * (len(items) - 1) / last)] for index in range(last + 1)] if last > 0 else items[:1]


def names(run: Raw) -> tuple[str, str]:
    return run["label"], without_size(run["label"], run["size"])


def present(raw: Raw) -> Raw:
    """Without what was compared of variants that have no runs (any longer), as somebody removed or renamed them."""
    known = {name for run in raw["runs"] for name in names(run)}
    planned = known | {entry["label"] for entry in raw.get("missing", [])}

    def all_known(entry: Raw) -> bool:
        return {entry[key] for key in NAMES[:2] if key in entry} | {*entry.get("labels", [])} <= known

    kept = {key: [entry for entry in raw[key] if all_known(entry)] for key in COMPARED if key in raw}
    if "missing" in raw and "matching" in raw:  # once a variant without results was nowhere named
        shown = {rule: [row for row in rows if row["label"] in planned] for rule, rows in raw["matching"].items()}
        same_first = {rule for rule, rows in raw["matching"].items() if rows[:1] == shown[rule][:1]}
        kept["matching"] = {rule: rows for rule, rows in shown.items() if rule in same_first}  # all are against it
    return raw | kept


def subset(raw: Raw, variants: Sequence[str]) -> Raw:
    """The named variants in this order."""
    _check_known(raw, variants)
    places = {name: place for place, name in enumerate(variants)}
    found = [(place, run) for run in raw["runs"] if (place := _place(run, places)) is not None]
    runs = [run for _, run in sorted(found, key=lambda pair: pair[0])]
    return present(raw | {"runs": runs, "missing": []})


def _place(run: Raw, places: Mapping[str, int]) -> int | None:
    return next((places[name] for name in names(run) if name in places), None)


def renamed(raw: Raw, labels: Mapping[str, str]) -> Raw:
    """With other names for some variants, and for families that are called like one."""
    _check_known(raw, labels)
    new = dict(labels)
    for run in raw["runs"]:
        label, short = names(run)
        if label not in labels and short in labels:
            new[label] = f"{labels[short]}-{run['size']}"
    shown = [new.get(label, label) for label in dict.fromkeys(run["label"] for run in raw["runs"])]
    if len({*shown}) < len(shown):
        raise ChoiceError(f"two variants would be called {max(shown, key=shown.count)!r}: give each its own name")
    parts = {
        key: _rename(value, new) for key, value in raw.items() if key in (*COMPARED, "runs", "missing", "matching")
    }
    return raw | parts


def _rename(value: Any, new: Mapping[str, str]) -> Any:
    if isinstance(value, list):
        return [_rename(item, new) for item in value]
    if not isinstance(value, dict):
        return value
    result = {key: _rename(item, new) for key, item in value.items()}
    for key in NAMES & value.keys():
        old = value[key]
        result[key] = [new.get(name, name) for name in old] if isinstance(old, list) else new.get(old, old)
    return result


def _check_known(raw: Raw, chosen: Sequence[str] | Mapping[str, str]) -> None:
    known = dict.fromkeys(name for run in raw["runs"] for name in names(run))
    if unknown := [name for name in chosen if name not in known]:
        raise ChoiceError(f"no variant {unknown[0]!r} in these results; there are {', '.join(known)}")


def combined(raws: Sequence[Raw]) -> Raw:
    """Several studies as one, on one plane: they must be of the same text and loss. Where machines differ, what was
    timed is left out. A label that stands in two studies gets the study's name before it."""
    first = raws[0]
    for what, of in (("the corpus", _corpus), ("the measure", _measure)):
        texts = list(dict.fromkeys(map(of, raws)))
        if len(texts) > 1:
            raise ChoiceError(f"studies that differ in {what} ({' and '.join(texts)}) cannot be drawn together")
    studies = [str(raw.get("study", n)) for n, raw in enumerate(raws, 1)]
    if len({*studies}) < len(studies):
        studies = [f"{study} {n}" for n, study in enumerate(studies, 1)]
    labels = [{run["label"] for run in raw["runs"]} for raw in raws]
    parts = []
    for n, raw in enumerate(raws):
        others = set().union(*labels[:n], *labels[n + 1 :])
        short = {f for run in raw["runs"] for f in (run["family"], *names(run))}
        new = {name: f"{studies[n]} {name}" for name in short} if labels[n] & others else {}
        flat = [run | {"size": ""} for run in raw["runs"]]  # sizes are in the labels
        if any(raw.get("machine") != first.get("machine") for raw in raws):
            flat = [{key: value for key, value in run.items() if key not in TIMED} for run in flat]
        kept = {key: raw[key] for key in ("comparisons", "details", "techniques", "missing") if key in raw}
        parts.append(_rename({"runs": flat, **kept}, new))
    keys = dict.fromkeys(key for part in parts for key in part)
    merged = {key: [entry for part in parts for entry in part.get(key, [])] for key in keys}
    rest = {key: first[key] for key in ("format", "created", "machine", "versions", "corpus", "archs") if key in first}
    return rest | merged | {"study": " and ".join(studies)}


def _corpus(raw: Raw) -> str:
    return str(raw["corpus"]["fingerprint"])


def _measure(raw: Raw) -> str:
    loss = raw["runs"][0].get("loss", {})
    return f"{'accuracy' if 'accuracy' in loss else 'bits per byte'} of {loss.get('tokens')} tokens"
