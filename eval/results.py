"""results.json and results.csv: the records of a study's finished runs, with what they were made of and on."""

import csv
import datetime
import importlib.metadata
import io
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from archs import VARIANTS
from eval.compare import compare
from train.files import device_name, is_evaluated, read_json, read_record, write_atomic, write_json
from train.study import Run, Study, variant_label
from train.tokens import TokenSet

PACKAGES = "kvfrontier", "torch", "lightning", "tiktoken", "tokenizers", "numpy"


def write_results(name: str, study: Study, runs: Sequence[Run], data: TokenSet, directory: Path) -> int:
    """Gathers the complete records of this study's runs; returns how many. Unchanged results keep their files."""
    records = [read_record(run) for run in runs if is_evaluated(run)]
    results = {
        "study": name,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": _machine(),
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in PACKAGES},
        "corpus": data.facts,
        "match": study.match,
        "archs": list(VARIANTS),
        "study_settings": study.settings(),
        "runs": records,
        "comparisons": compare(records, [variant_label(v) for v in study.variants]),
    }
    path = directory / "results.json"
    if read_json(path) | {"created": None} != json.loads(json.dumps(results)) | {"created": None}:
        write_json(path, results)
        write_atomic(directory / "results.csv", _csv(records).encode())
    return len(records)


def _machine() -> dict:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "device": device_name(device),
        "cpu": device_name(torch.device("cpu")),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "system": f"{platform.system()} {platform.machine()}",
    }


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
