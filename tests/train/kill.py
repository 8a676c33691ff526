"""Kills kvfrontier at random places, repeats the command until it ends, and compares with a straight run.

Weights, metrics.jsonl, TensorBoard's curves and, of a study, results.json must be the same to the bit, times apart.
docs/when-something-goes-wrong.md shows the arguments.

Children are forked from this process, which has imported everything and has one thread."""

import argparse
import itertools
import json
import math
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from train.machine import tune_process

tune_process()

import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from texts import MINIATURE, differ, kvf, without_times, write_texts

import eval.evaluate
import eval.speed
from archs import VARIANTS
from train.callbacks import CheckpointAndStop
from train.checkpoints import checkpoints

BATCH = 128
SETTINGS = MINIATURE | {
    "model": MINIATURE["model"] | {"dropout": 0.1},
    "variants": [{"arch": arch, **variant.examples[0]} for arch, variant in VARIANTS.items()],
    "eval": {"loss_tokens": 256, "decode": {"batch": [1], "context": [8]}},
}


def write_study(folder: Path, name: str, steps: int, **changes) -> Path:
    train = {"tokens": BATCH * steps, "batch_tokens": BATCH, "val_tokens": 64, "val_points": 6, "precision": "fp32"}
    train["checkpoint_seconds"] = 0.02  # some steps go by between two
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(SETTINGS | {"train": train} | changes))
    return path


def in_child(arguments: list, dies_at: float, signum: int) -> int:
    """The exit status of a kvfrontier command, or minus the number of the signal that killed it. It sends itself
    `signum` once `dies_at` batches are done; a half means after a batch and before its checkpoint and validation."""
    whole = CheckpointAndStop.on_train_batch_end

    def on_train_batch_end(self, trainer, *rest):
        early = dies_at % 1 and trainer.global_step > dies_at
        if early:
            os.kill(os.getpid(), signum)
        whole(self, trainer, *rest)
        if trainer.global_step >= dies_at and not early:
            os.kill(os.getpid(), signum)

    CheckpointAndStop.on_train_batch_end = on_train_batch_end
    try:
        return os.waitstatus_to_exitcode(os.waitpid(fork(arguments), 0)[1])
    finally:
        CheckpointAndStop.on_train_batch_end = whole


def fork(arguments: list) -> int:
    """Starts a kvfrontier command, which prints nothing, in a child; returns its process id."""
    if child := os.fork():
        return child
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    try:
        os._exit(kvf(*arguments))
    finally:
        os._exit(70)


def killed_after(arguments: list, seconds: float) -> int:
    """The exit status of a kvfrontier command that is killed after so many seconds, if it has not ended before."""
    child = fork(arguments)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            break
        time.sleep(0.002)
    else:
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def end(run: Path) -> dict:
    """What a run left, times apart: weights, metrics.jsonl, record and TensorBoard's curves."""
    events = EventAccumulator(str(run)).Reload()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    weights = torch.load(checkpoints(run)[0], weights_only=True)["state_dict"]
    tags = events.Tags()["scalars"]
    timed = "train/tokens_per_s", "train/mfu", "final/train_tokens_per_s", "final/decode_tokens_per_s"
    return {
        "weights": {name: tensor.numpy().tobytes() for name, tensor in weights.items()},
        "metrics": [{k: v for k, v in row.items() if k not in timed} for row in rows],
        "record": without_times(json.loads((run / "record.json").read_text())),
        "curves": {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags if tag not in timed},
    }


def compare(straight: Path, killed: Path) -> list[str]:
    """What differs between two directories of a study."""
    differing = []
    for run in sorted(straight.glob("runs/*/*/record.json")):
        here = run.relative_to(straight).parent
        a, b = end(straight / here), end(killed / here)
        differing += [f"{here} {part}" for part in a if a[part] != b[part]]
    return differing


def kill_runs(folder: Path, kills: int, signals: list[signal.Signals]) -> bool:
    """Whether each variant's run ends the same; the signals take turns."""
    steps = 6 * max(5, kills // 3)  # validated six times
    well = True
    for variant in SETTINGS["variants"]:
        arch = variant["arch"]
        study = write_study(folder, arch, steps, variants=[variant])
        straight = folder / "straight" / arch
        well &= kvf("train", study, "--out", straight) == 0
        arguments = ["train", study, "--out", folder / "killed" / arch]
        places = sorted(n / 2 for n in random.Random(arch).sample(range(1, 2 * steps - 12), kills))
        died = []
        for place, signum in zip(places, itertools.cycle(signals), strict=False):
            expected = -signum if signum == signal.SIGKILL else 128 + signum
            died += [signum.name] if in_child(arguments, place, signum) == expected else []
        well &= in_child(arguments, math.inf, signal.SIGKILL) == 0
        differing = compare(straight, folder / "killed" / arch)
        well &= not differing and len(died) == kills
        result = f"not the same: {', '.join(differing)}" if differing else "the same"
        counts = ", ".join(f"{count} {name}" for name, count in Counter(died).items())
        print(f"{arch}: {result} after {counts}", flush=True)
    return well


def kill_study(folder: Path, kills: int) -> bool:
    """Whether a whole study, evaluation and figures included, ends the same."""
    study = write_study(folder, "study", 120)
    straight, killed = folder / "straight", folder / "killed"
    began = time.monotonic()
    well = killed_after(["run", study, "--out", straight], math.inf) == 0
    took, rng, died = time.monotonic() - began, random.Random(0), 0
    while died < kills and killed_after(["run", study, "--out", killed], rng.uniform(0, 2 * took / kills)) != 0:
        died += 1
    well &= killed_after(["run", study, "--out", killed], math.inf) == 0
    differing = differ(straight / "results.json", killed / "results.json") + compare(straight, killed)
    there = {path.name for path in killed.iterdir()} == {path.name for path in straight.iterdir()}
    well &= not differing and there and died == kills
    print(f"a study: {', '.join(differing) or 'the same'} after {died} times SIGKILL ({took:.0f} s when left alone)")
    return well


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=5, help="of each variant's run, or of the study (default: 5)")
    parser.add_argument("--signal", nargs="+", choices=["KILL", "TERM", "INT"], default=["KILL"])
    parser.add_argument("--study", action="store_true", help="the whole study in place of each variant's run")
    args = parser.parse_args()
    eval.speed.SECONDS = 0.02
    torch.set_num_threads(1)  # no threads are left behind by a fork
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["KVFRONTIER_CACHE"] = str(folder / "cache")
        write_texts(folder)
        if args.study:
            well = kill_study(folder, args.kills)
        else:
            well = kill_runs(folder, args.kills, [signal.Signals[f"SIG{name}"] for name in args.signal])
    sys.exit(not well)
