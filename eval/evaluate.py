"""The eval stage: from each trained run's checkpoint to its record's loss, cache bytes and decode speed."""

import functools
import operator
from collections.abc import Callable, Sequence
from pathlib import Path

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
ROUNDS = 2  # of timing, all runs in each: a machine that is slow for a minute then does not decide between variants


def evaluate_runs(runs: Sequence[Run], config: EvalConfig, data: TokenSet) -> list[str]:
    """Evaluates what is trained and not evaluated with these settings yet; returns a line for each run that failed."""
    device, dtype = find_device(), DTYPES[resolve_dtype(config.dtype)]
    pending = [run for run in runs if "train" in read_record(run) and not is_evaluated(run)]
    measured: dict[Path, dict] = {run.directory: {} for run in pending}
    failures = []
    work = 2 + ROUNDS * (1 + len(config.decode.batch) * len(config.decode.context))
    with StudyProgress("evaluating", len(pending) * work) as progress:
        roof = 0.0
        for turn in range(ROUNDS):
            roof = max(roof, measure_roof(device))
            for number, run in enumerate(pending, 1):
                if run.directory not in measured:
                    continue
                show = functools.partial(progress.show, f"{number}/{len(pending)} {run.label} seed {run.seed}", work=1)
                try:
                    model = load_model(run).to(device)
                    if turn == 0:
                        measured[run.directory] = measure_quality(model, config, data, dtype, show)
                    measured[run.directory] |= measure_speed(
                        model.to(dtype), config, roof, show, measured[run.directory]
                    )
                except (RuntimeError, OSError) as e:  # no memory, bytes that differ, a broken file: the others go on
                    del measured[run.directory]
                    failures.append(f"{run.label} seed {run.seed} could not be evaluated: {str(e).splitlines()[0]}")
                    progress.say(failures[-1])
                    continue
                if turn == ROUNDS - 1:
                    facts = run.settings() | {"eval_key": run.eval_key, "measured_on": describe_machine()}
                    record = read_record(run) | measured[run.directory] | facts
                    _log_hyperparameters(run, record)
                    write_json(run.directory / "record.json", record)
    return failures


def measure_quality(
    model: Decoder, config: EvalConfig, data: TokenSet, dtype: torch.dtype, show: Callable[[str], None]
) -> dict:
    """A record's `loss`, in fp32, and its `kv`, for a cache of `dtype`; `show` is told of each."""
    loss = measure_loss(model, data, config.loss_tokens, model.embed.weight.device)
    show(f"{loss['val_bpb']:.3f} bits per byte")
    kv = measure_memory(model, dtype, config.decode.context)
    show(f"{kv['bytes_per_token']:,} cache bytes a token")
    return {"loss": loss, "kv": kv}


def measure_speed(
    model: Decoder, config: EvalConfig, roof_gb_s: float, show: Callable[[str], None], before: dict
) -> dict:
    """A record's `decode`, `decode_skipped` and `recompute`; of what was timed `before` too, the faster."""
    known = {(point["batch"], point["context"]): point for point in before.get("decode", [])}
    measured: dict = {"decode": [], "decode_skipped": []}
    for point in measure_decode(model, config.decode.batch, sorted(config.decode.context), roof_gb_s):
        if "skipped" in point:
            measured["decode_skipped"].append(point)
            show(f"batch {point['batch']} context {point['context']}: {point['skipped']}")
        else:
            rounds = point, known.get((point["batch"], point["context"]), point)
            steps, prefill = (min(rounds, key=operator.itemgetter(name)) for name in ("token_ms", "prefill_ms"))
            measured["decode"].append(steps | {name: prefill[name] for name in ("prefill_ms", "prefill_ms_iqr")})
            show(f"batch {point['batch']} context {point['context']}: {point['tokens_per_s']:,.0f} tokens/s")
    if measured["decode"]:
        recompute = measure_recompute(model, max(point["context"] for point in measured["decode"]))
        known = before.get("recompute", recompute)
        times = {name: min(recompute[name], known[name]) for name in ("cached_ms", "recomputed_ms")}
        measured["recompute"] = recompute | times
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
