"""results.json and results.csv: the records of a study's evaluated runs, the comparisons, and facts about both."""

import csv
import datetime
import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from archs import VARIANTS
from eval.board import write_board
from eval.compare import compare, gap_changes
from eval.equal_bytes import bytes_for_accuracy, equal_bytes, technique_differences
from eval.frontier import bytes_for_baseline
from eval.scaling import scaling
from train.files import read_json, write_atomic, write_json
from train.meta import on_meta
from train.plan import Plan, Snapshot
from train.store import RESULTS
from train.study import Study
from train.variants import FREE, drafts


def write_results(plan: Plan) -> int:
    """Gathers the records of the study's evaluated runs; returns their number.

    If there are none, or nothing changed, the files stay as they are.
    """
    look = plan.look()
    evaluated = [run for run in look.runs if look.is_evaluated(run)]
    records = [look.record(run) for run in evaluated]
    if not records:
        return 0
    level = plan.study.eval.level
    comparisons, details = compare(records, level)
    results = {
        "format": 2,  # to be raised, here and in plots/results.py, when older readers would fail or misread it
        "study": plan.name,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **_measured_on(records),
        "corpus": plan.data.facts,
        "match": plan.study.match,
        "archs": list(VARIANTS),
        "study_settings": plan.study.model_dump(),
        "runs": records,
        "missing": _missing(look),
        "comparisons": comparisons,
        "bytes_for_baseline": bytes_for_baseline(records, level),
        "gap_changes": gap_changes(records, level),
        "scaling": scaling(records, level),
        "techniques": technique_differences(records, level),
        "equal_bytes": equal_bytes(records, level),
        "bytes_for_accuracy": bytes_for_accuracy(records),
        "details": details,
    }
    path = plan.directory / RESULTS
    table = plan.directory / "results.csv"
    if not _same(read_json(path), results) or not table.exists():
        write_json(path, results | {"matching": matching_tables(plan.study, plan.data.n_vocab, plan.study_file.parent)})
        write_atomic(table, _csv(records).encode())
        write_board(plan.directory, list(zip(evaluated, records, strict=True)))
    return len(records)


def _missing(look: Snapshot) -> list[dict]:
    """The runs of the study that have no record in it, and why: {label, seed, why}."""
    runs, missing = {(run.variant.label, run.seed): run for run in look.runs}, []
    for variant in look.plan.variants:
        for seed in look.plan.study.seeds:
            run = runs.get((variant.label, seed))
            if not (run and look.is_evaluated(run)):
                record = look.record(run) if run else {"failed": "no learning rate is known"}
                why = record.get("failed") or ("not evaluated" if "train" in record else "not trained")
                missing.append({"label": variant.label, "seed": seed, "why": why})
    return missing


def matching_tables(study: Study, vocab_size: int, folder: Path = Path()) -> dict[str, list[dict]]:
    """For each matching rule a row for each variant: the widths and parameters that the rule gives it and what it then
    costs in FLOPs per training token, or the error if it cannot be matched so."""
    tables: dict[str, list[dict]] = {}
    for rule in FREE:
        tables[rule], first = [], {}
        for draft in drafts(study, vocab_size, folder):
            if rule != study.match and draft.size in first:  # the study's own rule alone keeps a variant's own width
                options = {name: value for name, value in draft.options.items() if name != FREE[study.match]}
                draft = replace(draft, options=options)
            try:
                variant = draft.resolve(rule, first.get(draft.size))
            except ValueError as e:
                tables[rule].append({"label": draft.label, "error": str(e)})
                continue
            first.setdefault(draft.size, variant)
            model, context = on_meta(variant.arch, variant.options), variant.options["context"]
            tables[rule].append(
                {
                    "label": variant.label,
                    "size": variant.size,
                    "ffn_width": variant.options["ffn_width"],
                    "heads": variant.options["heads"],
                    "params": variant.params,
                    "train_flops_per_token": 3 * model.flops_per_token(context),
                    "score_flops_per_token": 3 * model.score_flops(context),
                }
            )
    return tables


def _same(written: dict, results: dict) -> bool:
    """True if the results are already written, whenever that was; `matching` follows from the rest."""
    ignored = {"created", "matching"}
    known = {key: value for key, value in written.items() if key not in ignored}
    return known == {key: value for key, value in json.loads(json.dumps(results)).items() if key not in ignored}


def _measured_on(records: Sequence[dict]) -> dict:
    """{machine, versions} of the first record's measurements, and those of runs that were measured elsewhere."""
    first, *others = [record["measured_on"] for record in records]
    different = [other for n, other in enumerate(others) if other != first and other not in others[:n]]
    return first | ({"also_measured_on": different} if different else {})


def _csv(records: Sequence[dict]) -> str:
    """A row for each run; columns are the paths of the record's keys, for decode points with batch and context."""
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
