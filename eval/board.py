"""What TensorBoard shows of a whole study: the HParams table, means over seeds, charts with all variants in one.

Events are written when results are: a row of the table into each run's directory; into study/ the table's columns,
which are the options of all variants together, and the charts of the Custom Scalars tab; into mean/<label>/ each
scalar's mean over seeds, and what lies a standard deviation below and above it as <tag>_low and <tag>_high.
"""

import math
import shutil
import statistics
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import api_pb2, metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo, SessionStartInfo
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from torch.utils.tensorboard.summary import custom_scalars

from train.files import read_rows
from train.plan import Run

SUFFIX = ".final"  # of these files' names
CHARTS = {"val/bpb": "validation bits per byte", "train/loss": "training loss"}


def write_board(directory: Path, runs: Sequence[tuple[Run, dict]]) -> None:
    """Writes the events of the study in `directory`, whose evaluated runs these are, each with its record."""
    settings = [run_settings(record) for _, record in runs]
    for (run, record), row in zip(runs, settings, strict=True):
        start = SessionStartInfo(group_name=record["label"])
        for name, value in row.items():
            field = _DATA[_kind(value)][1]
            setattr(start.hparams[name], field, str(value) if field == "string_value" else value)
        end = SessionEndInfo(status=api_pb2.Status.Value("STATUS_SUCCESS"))
        tags = {metadata.SESSION_START_INFO_TAG: {"session_start_info": start}}
        tags |= {metadata.SESSION_END_INFO_TAG: {"session_end_info": end}}
        rows = [(record["train_tokens"], final_metrics(record))]
        _write(run.directory, [_plugin(tag, **data) for tag, data in tags.items()], rows)
    metrics = dict.fromkeys(name for _, record in runs for name in final_metrics(record))
    infos = [api_pb2.MetricInfo(name=api_pb2.MetricName(tag=name)) for name in metrics]
    experiment = api_pb2.Experiment(hparam_infos=_columns(settings), metric_infos=infos)
    layout = {name: {"all runs": ["Multiline", [f"^{tag}$"]]} for tag, name in CHARTS.items()}
    if _write_means(directory / "mean", [run for run, _ in runs]):
        for tag, name in CHARTS.items():
            layout[name]["mean over seeds, one deviation"] = ["Margin", [tag, f"{tag}_low", f"{tag}_high"]]
    _write(directory / "study", [_plugin(metadata.EXPERIMENT_TAG, experiment=experiment), custom_scalars(layout)], [])


def run_settings(record: dict) -> dict[str, Any]:
    """What a run differs in from runs of other variants; its seed is left out, as seeds of a variant are one group."""
    train = {key: value for key, value in record["train"].items() if key in ("lr", "optimizer", "schedule")}
    names = {key: record[key] for key in ("label", "arch", "params", "train_tokens")}
    return {key: value for key, value in (names | train | record["options"]).items() if value is not None}


def final_metrics(record: dict) -> dict[str, float]:
    """All that was measured of a run as one number, decode at the largest point of its grid. HParams shows the first of
    them, which is to be the one that runs are compared by."""
    train = {key: record["train"].get(key) for key in ("tokens_per_s", "seconds", "mfu")}
    kv = {f"kv_{key}": record["kv"].get(key) for key in ("bytes_per_token", "constant_bytes")}
    point = record["decode"][-1] if record.get("decode") else {}
    decode = {key: point.get(key) for key in ("tokens_per_s", "token_ms", "prefill_ms", "roof_fraction")}
    loss = {key: record["loss"].get(key) for key in ("accuracy", "val_bpb")} | record["loss"]
    parts = {"": loss | kv, "train_": train, "decode_": decode}
    found = {f"final/{prefix}{key}": value for prefix, part in parts.items() for key, value in part.items()}
    return {key: float(value) for key, value in found.items() if _kind(value) == "number" and math.isfinite(value)}


_DATA = {
    "bool": ("DATA_TYPE_BOOL", "bool_value"),
    "number": ("DATA_TYPE_FLOAT64", "number_value"),
    "text": ("DATA_TYPE_STRING", "string_value"),
}


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "bool"
    return "number" if isinstance(value, int | float) else "text"


def _columns(settings: Sequence[dict[str, Any]]) -> list[api_pb2.HParamInfo]:
    """A column for each option of any variant; those that differ come first."""
    names = dict.fromkeys(name for row in settings for name in row)
    values = {name: [row.get(name) for row in settings] for name in names}
    infos = []
    for name, column in values.items():
        (kind, *_) = {_kind(value) for value in column if value is not None}
        differs = any(value != column[0] for value in column)
        infos.append(api_pb2.HParamInfo(name=name, type=_DATA[kind][0], differs=differs))
    return sorted(infos, key=lambda info: not info.differs)


def _write_means(folder: Path, runs: Iterable[Run]) -> bool:
    """True if a variant has several seeds, so that there are means."""
    shutil.rmtree(folder, ignore_errors=True)
    logged: dict[str, list[dict[tuple[int, str], float]]] = {}  # label -> for each seed (tokens, tag) -> value
    for run in runs:
        rows = read_rows(run.directory / "metrics.jsonl")
        values = {(row["tokens"], tag): value for row in rows for tag, value in row.items() if tag != "tokens"}
        logged.setdefault(run.variant.label, []).append(values)
    for label, seeds in logged.items():
        if len(seeds) < 2:
            continue
        scalars: dict[int, dict[str, float]] = {}
        for tokens, tag in seeds[0]:
            values = [seed[tokens, tag] for seed in seeds if (tokens, tag) in seed]
            if len(values) == len(seeds) and all(map(math.isfinite, values)):
                mean, deviation = statistics.mean(values), statistics.stdev(values)
                ends = {tag: mean, f"{tag}_low": mean - deviation, f"{tag}_high": mean + deviation}
                scalars.setdefault(tokens, {}).update(ends)
        _write(folder / label, [], scalars.items())
    return any(len(seeds) > 1 for seeds in logged.values())


def _plugin(tag: str, **data: Any) -> Summary:
    about = metadata.create_summary_metadata(HParamsPluginData(**data))
    return Summary(value=[Summary.Value(tag=tag, metadata=about, tensor=metadata.NULL_TENSOR)])


def _write(folder: Path, summaries: Iterable[Summary], scalars: Iterable[tuple[int, dict[str, float]]]) -> None:
    """Writes an event file, and deletes the one of before."""
    before = [*folder.glob(f"events.out.tfevents.*{SUFFIX}")]
    writer = EventFileWriter(str(folder), filename_suffix=SUFFIX)
    for summary in summaries:
        writer.add_event(Event(wall_time=time.time(), summary=summary))
    for step, row in scalars:
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in row.items()]
        writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
    writer.close()
    for old in before:
        old.unlink(missing_ok=True)
