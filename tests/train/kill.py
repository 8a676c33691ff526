"""Kills a run of each variant (SIGKILL) at random places, goes on with it, and compares its end with a straight run's.

    uv run python tests/train/kill.py --kills 50

Children are forked from this process, which has imported everything and has one thread.
"""

import argparse
import json
import math
import os
import random
import signal
import tempfile
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train.runner
from archs import VARIANTS
from train.checkpoints import newest_whole
from train.corpus import Corpus
from train.files import read_record
from train.plan import Plan
from train.runner import KeepGoing, train_runs
from train.study import parse_study
from train.tokens import prepare

OWN = {"gqa": {"kv_heads": 1}, "mla": {"kv_rank": 8, "rope_dim": 4}, "yoco": {"kv_heads": 1, "window": 8}}
BATCH = 128
TIMED = "train/tokens_per_s", "train/mfu"


def plan_in(directory: Path, arch: str, steps: int, data) -> Plan:
    settings = {
        "tokenizer": {"name": "bytes"},
        "model": {"width": 32, "layers": 2, "heads": 2, "context": 16, "dropout": 0.1},
        "variants": [{"arch": arch, **OWN.get(arch, {})}],
        "train": {
            "tokens": BATCH * steps,
            "batch_tokens": BATCH,
            "val_tokens": 64,
            "val_points": 6,
            "precision": "fp32",
        },
    }
    return Plan(parse_study(settings), data, directory)


def run_in_child(plan: Plan, dies_at: float) -> int:
    """Its status; it kills itself once `dies_at` batches are done, where that is a half before a checkpoint."""
    if child := os.fork():
        return os.waitpid(child, 0)[1]
    whole = KeepGoing.on_train_batch_end

    def on_train_batch_end(self, trainer, *rest):
        if dies_at % 1 and trainer.global_step > dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        whole(self, trainer, *rest)
        if trainer.global_step >= dies_at:
            os.kill(os.getpid(), signal.SIGKILL)

    KeepGoing.on_train_batch_end = on_train_batch_end
    try:
        os._exit(len(train_runs(plan)))
    finally:
        os._exit(70)


def end(plan: Plan) -> dict:
    """What a run left, timings apart: weights, metrics.jsonl, record and TensorBoard's curves."""
    (run,) = plan.runs()
    events = EventAccumulator(str(run.directory)).Reload()
    rows = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    weights = newest_whole(run.directory, print)[1]["state_dict"]
    return {
        "weights": {name: tensor.numpy().tobytes() for name, tensor in weights.items()},
        "metrics": [{k: v for k, v in row.items() if k not in TIMED} for row in rows],
        "record": read_record(run)["curve"],
        "curves": {
            tag: [(e.step, e.value) for e in events.Scalars(tag)]
            for tag in events.Tags()["scalars"]
            if tag not in TIMED
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=5, help="of each variant's run (default: 5)")
    kills = parser.parse_args().kills
    steps = 6 * max(5, kills // 3)  # validated six times
    train.runner.SECONDS_BETWEEN_CHECKPOINTS = 0.02  # some steps go by between two
    torch.set_num_threads(1)  # no threads are left behind by a fork
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        texts = [f"the cat number {n} sat on the mat\n" * 20 for n in range(40)]
        corpus = Corpus("files", texts[:30], texts[30:], sum(map(len, texts)), "0" * 16)
        data = prepare(corpus, "bytes", None, Path(folder) / "cache")
        for arch in VARIANTS:
            straight, killed = (
                plan_in(Path(folder) / name / arch, arch, steps, data) for name in ("straight", "killed")
            )
            failed |= bool(train_runs(straight))
            places = sorted(random.Random(arch).choices([n / 2 for n in range(1, 2 * steps - 2)], k=kills))
            died = [run_in_child(killed, place) for place in places].count(signal.SIGKILL)
            failed |= run_in_child(killed, math.inf) != 0
            a, b = end(straight), end(killed)
            differ = [part for part in a if a[part] != b[part]]
            failed |= bool(differ) or died < kills
            said = f"not the same: {', '.join(differ)}" if differ else "the same"
            print(f"{arch}: {said} after {died} kills", flush=True)
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
