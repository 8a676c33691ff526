"""results.json and results.csv: the records of a study's finished runs, with what they were made of and on."""

import csv
import datetime
import io
import json
from collections.abc import Sequence
from typing import Any

from archs import VARIANTS
from eval.compare import compare, gap_changes
from eval.equal_bytes import equal_bytes, technique_differences
from eval.frontier import bytes_for_baseline
from train.files import is_evaluated, read_json, read_record, write_atomic, write_json
from train.plan import Plan, Run, matching_tables


def write_results(name: str, plan: Plan) -> int:
    """Gathers the complete records of this study's runs; returns how many there are.

    Without any, and where nothing changed, the files stay as they are.
    """
    records = [read_record(run) for run in plan.runs() if is_evaluated(run)]
    if not records:
        return 0
    level = plan.study.eval.level
    comparisons, details = compare(records, level)
    results = {
        "format": 2,  # to be raised, here and in plots/results.py, when older readers would fail or misread it
        "study": name,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **_measured_on(records),
        "corpus": plan.data.facts,
        "match": plan.study.match,
        "archs": list(VARIANTS),
        "study_settings": plan.study.settings(),
        "runs": records,
        "missing": _missing(plan),
        "comparisons": comparisons,
        "bytes_for_baseline": bytes_for_baseline(records, level),
        "gap_changes": gap_changes(records, level),
        "techniques": technique_differences(records, level),
        "equal_bytes": equal_bytes(records, level),
        "details": details,
    }
    path = plan.directory / "results.json"
    table = plan.directory / "results.csv"
    if not _same(read_json(path), results) or not table.exists():
        write_json(path, results | {"matching": matching_tables(plan.study, plan.data.n_vocab)})
        write_atomic(table, _csv(records).encode())
    return len(records)


def _missing(plan: Plan) -> list[dict]:
    """The runs of the study that have no record in it, and why: {label, seed, why}."""
    planned = [(variant, seed, plan.run(variant, seed)) for variant in plan.variants for seed in plan.study.seeds]
    return [
        {"label": variant.label, "seed": seed, "why": _why_missing(run)}
        for variant, seed, run in planned
        if not (run and is_evaluated(run))
    ]


def _why_missing(run: Run | None) -> str:
    if run is None:
        return "no learning rate is known"
    record = read_record(run)
    if "failed" in record:
        return record["failed"]
    return "not evaluated" if "train" in record else "not trained"


def _same(written: dict, results: dict) -> bool:
    """But for when they were written, and for what follows from the rest."""
    apart = {"created", "matching"}
    known = {key: value for key, value in written.items() if key not in apart}
    return known == {key: value for key, value in json.loads(json.dumps(results)).items() if key not in apart}


def _measured_on(records: Sequence[dict]) -> dict:
    """{machine, versions} of the first record's measurements; others, where runs were measured elsewhere, beside it."""
    first, *others = [record["measured_on"] for record in records]
    different = [other for n, other in enumerate(others) if other != first and other not in others[:n]]
    return first | ({"also_measured_on": different} if different else {})


def _csv(records: Sequence[dict]) -> str:
    """One row a run; columns are the keys' paths in the record, a decode point's with its batch and context."""
    rows = [_flat(record) for record in records]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _flat(record: dict) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for key, value in record.items():
        if key == "decode":
            for point in value:
                where = f"decode.b{point['batch']}.c{point['context']}"
                row |= {f"{where}.{k}": v for k, v in point.items() if k not in ("batch", "context")}
        elif isinstance(value, dict):
            row |= {f"{key}.{k}": v for k, v in _flat(value).items()}
        elif not isinstance(value, list):
            row[key] = value
    return row
