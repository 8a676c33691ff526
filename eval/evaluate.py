"""The eval stage: from each trained run's checkpoint to its record's loss, cache bytes and decode speed."""

import functools
from collections.abc import Callable, Sequence

import torch
from lightning.pytorch.loggers import TensorBoardLogger

from archs import Decoder, build
from eval.loss import measure_loss
from eval.memory import measure_memory
from eval.speed import measure_decode, measure_recompute, measure_roof
from train.files import describe_machine, is_evaluated, read_record, write_json
from train.progress import StudyProgress
from train.study import EvalConfig, Run, find_device, resolve_dtype
from train.tokens import TokenSet

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def evaluate_runs(runs: Sequence[Run], config: EvalConfig, data: TokenSet) -> list[str]:
    """Evaluates what is trained and not evaluated with these settings yet; returns a line for each run that failed."""
    device = find_device()
    pending = [run for run in runs if "train" in read_record(run) and not is_evaluated(run)]
    if not pending:
        return []
    failures = []
    points = len(config.decode.batch) * len(config.decode.context)
    with StudyProgress("evaluating", len(pending) * (points + 3)) as progress:
        roof = measure_roof(device)
        for number, run in enumerate(pending, 1):
            name = f"{number}/{len(pending)} {run.label} seed {run.seed}"
            try:
                measured = measure(run, config, data, device, roof, functools.partial(progress.show, name, work=1))
            except (RuntimeError, OSError) as e:  # out of memory, bytes that differ, a broken file: the others go on
                failures.append(f"{run.label} seed {run.seed} could not be evaluated: {str(e).splitlines()[0]}")
                progress.say(failures[-1])
                continue
            record = (
                read_record(run)
                | run.settings()
                | measured
                | {"eval_key": run.eval_key, "measured_on": describe_machine()}
            )
            _log_hyperparameters(run, record)
            write_json(run.directory / "record.json", record)
    return failures


def measure(
    run: Run, config: EvalConfig, data: TokenSet, device: torch.device, roof_gb_s: float, show: Callable[[str], None]
) -> dict:
    """The measured part of a run's record; `show` is told of each quantity."""
    dtype = DTYPES[resolve_dtype(config.dtype)]
    contexts = sorted(config.decode.context)
    model = load_model(run).to(device)
    measured = {"loss": measure_loss(model, data, config.loss_tokens, device)}
    show(f"{measured['loss']['val_bpb']:.3f} bits per byte")
    model = model.to(dtype)
    measured["kv"] = measure_memory(model, dtype, contexts)
    show(f"{measured['kv']['bytes_per_token']:,} cache bytes a token")
    measured |= {"decode": [], "decode_skipped": []}
    for point in measure_decode(model, config.decode.batch, contexts, roof_gb_s):
        measured["decode_skipped" if "skipped" in point else "decode"].append(point)
        result = point.get("skipped") or f"{point['tokens_per_s']:,.0f} tokens/s"
        show(f"batch {point['batch']} context {point['context']}: {result}")
    if measured["decode"]:
        measured["recompute"] = measure_recompute(model, max(point["context"] for point in measured["decode"]))
        show("recomputing the prefix")
    return measured


def load_model(run: Run) -> Decoder:
    """The trained model on the CPU, in evaluation mode."""
    path = run.directory / "checkpoints" / "last.ckpt"
    weights = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    model = build(run.arch, **run.options)
    model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in weights.items()})
    return model.eval()


def _log_hyperparameters(run: Run, record: dict) -> None:
    """What was built and how it came out, as a row of TensorBoard's HParams table."""
    for old in run.directory.glob("*.final"):
        old.unlink()
    logger = TensorBoardLogger(run.directory, name="", version="", default_hp_metric=False, filename_suffix=".final")
    settings = {name: record[name] for name in ("label", "arch", "seed", "params")} | {"lr": record["train"]["lr"]}
    metrics = {
        "final/val_bpb": record["loss"]["val_bpb"],
        "final/val_nats": record["loss"]["val_nats"],
        "final/kv_bytes_per_token": record["kv"]["bytes_per_token"],
        "final/train_tokens_per_s": record["train"]["tokens_per_s"],
    }
    if record["decode"]:
        metrics["final/decode_tokens_per_s"] = record["decode"][-1]["tokens_per_s"]
    logger.log_hyperparams(settings | run.options, metrics, step=record["train_tokens"])
    logger.finalize("success")
