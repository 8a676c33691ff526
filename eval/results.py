"""results.json and results.csv: the records of a study's finished runs, with what they were made of and on."""

import csv
import datetime
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from archs import VARIANTS
from eval.compare import compare
from train.files import is_evaluated, read_json, read_record, write_atomic, write_json
from train.study import Run, Study, variant_label
from train.tokens import TokenSet


def write_results(name: str, study: Study, runs: Sequence[Run], data: TokenSet, directory: Path) -> int:
    """Gathers the complete records of this study's runs; returns how many there are.

    Without any, and where nothing changed, the files stay as they are.
    """
    records = [read_record(run) for run in runs if is_evaluated(run)]
    if not records:
        return 0
    results = {
        "study": name,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **_measured_on(records),
        "corpus": data.facts,
        "match": study.match,
        "archs": list(VARIANTS),
        "study_settings": study.settings(),
        "runs": records,
        "comparisons": compare(records, [variant_label(v) for v in study.variants]),
    }
    path = directory / "results.json"
    table = directory / "results.csv"
    same = read_json(path) | {"created": None} == json.loads(json.dumps(results)) | {"created": None}
    if not same or not table.exists():
        write_json(path, results)
        write_atomic(table, _csv(records).encode())
    return len(records)


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
