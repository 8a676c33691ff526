"""Runs that are stopped or killed, files that are damaged, disks that are full: the end is the same."""

import gc
import hashlib
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import time
import weakref
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from miniature import metrics, one_run, tiny_study, train, train_runs, weights

from archs import VARIANTS, Decoder
from eval.evaluate import FIRST_ROUND, evaluate_runs
from eval.results import write_results
from train.callbacks import CheckpointAndStop
from train.checkpoints import KEPT, checkpoints, newest_whole
from train.errors import InputError, Interrupted
from train.files import is_locked, lock_path, read_json, write_json
from train.module import LanguageModel
from train.plan import Plan
from train.progress import StudyProgress
from train.runner import failed_records, pieces_needed, train_if_needed
from train.study import parse_study


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX systems")
def test_runs_that_are_killed_end_as_ones_that_are_not():
    """Each variant, killed and then stopped at random places: the same weights, metrics and curves to the last bit."""
    script = [sys.executable, Path(__file__).with_name("kill.py"), "--kills", "2", "--signal", "KILL", "INT"]
    done = subprocess.run(script, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": the same after 1 SIGKILL, 1 SIGINT") == len(VARIANTS)


@pytest.mark.parametrize("broken", [False, True])
def test_a_run_leaves_signals_as_they_were_and_nothing_of_itself(data, tmp_path, monkeypatch, broken):
    plan, run = one_run(data, tmp_path / "run")
    signals = signal.SIGINT, signal.SIGTERM
    before, alive = [signal.getsignal(s) for s in signals], []
    begin = CheckpointAndStop.on_train_start

    def look(self, trainer, module):
        begin(self, trainer, module)
        alive.append(weakref.ref(module))
        if broken:
            raise ZeroDivisionError

    monkeypatch.setattr(CheckpointAndStop, "on_train_start", look)
    with pytest.raises(ZeroDivisionError) if broken else nullcontext():
        train(plan, run)
    assert [signal.getsignal(s) for s in signals] == before
    gc.collect()
    assert [seen() for seen in alive] == [None]


@pytest.fixture
def stopped(data, tmp_path, monkeypatch):
    return stopped_run(data, tmp_path / "stopped", monkeypatch)


def stopped_run(data, directory, monkeypatch, **settings):
    """A run with two checkpoints that was stopped on its way, and how to go on with it."""
    plan, run = one_run(data, directory, checkpoint_steps=1, **settings)
    whole = CheckpointAndStop.on_train_batch_end

    def stop(self, trainer, *rest):
        if trainer.global_step == 11:
            for _ in range(2):  # as to a process and to its group
                signal.raise_signal(signal.SIGTERM)
        whole(self, trainer, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointAndStop, "on_train_batch_end", stop)
        with pytest.raises(Interrupted, match="SIGTERM"):
            train(plan, run)
    steps = [int(path.stem.split("-")[1]) for path in checkpoints(run.directory)]
    assert steps == [11, 10]
    return plan, run


def test_a_finished_run_keeps_its_weights_alone(stopped, capsys):
    """A third of a checkpoint. Without its record it starts over, and says why."""
    plan, run = stopped
    before = max(path.stat().st_size for path in checkpoints(run.directory))
    assert train_runs(plan) == []
    (path,) = checkpoints(run.directory)
    assert path.stat().st_size < before / 2
    expected, record = weights(run), run.record()
    (run.directory / "record.json").unlink()
    assert train_runs(plan) == []
    assert "only weights are left of its checkpoints; the run starts over" in capsys.readouterr().err
    assert all(torch.equal(weight, weights(run)[name]) for name, weight in expected.items())
    assert run.record()["curve"] == record["curve"]


DAMAGES = {
    "truncated": lambda content: content[:-100],
    "empty": lambda content: b"",
    "bit-flipped": lambda content: content[:999] + bytes([content[999] ^ 1]) + content[1000:],
}


@pytest.mark.parametrize(("damage", "many"), [*((damage, 1) for damage in DAMAGES), ("empty", KEPT)])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_used(damage, many, stopped, data, tmp_path, capsys):
    plan, run = stopped
    for path in checkpoints(run.directory)[:many]:
        path.write_bytes(DAMAGES[damage](path.read_bytes()))
    assert train_runs(plan) == []
    messages = capsys.readouterr().err
    assert messages.count("is damaged and not used") == many
    assert ("no checkpoint is whole; the run starts over" in messages) == (many == KEPT)
    straight, expected = one_run(data, tmp_path / "straight")
    train_runs(straight)
    assert (metrics(run.directory), run.record()["curve"]) == (metrics(expected.directory), expected.record()["curve"])
    assert all(torch.equal(a, b) for a, b in zip(weights(run).values(), weights(expected).values(), strict=True))


def test_a_run_of_two_optimizers_goes_on_to_the_same_weights(data, tmp_path, monkeypatch):
    recipe = {"optimizer": "muon", "schedule": "wsd"}
    plan, run = stopped_run(data, tmp_path / "stopped", monkeypatch, **recipe)
    straight, expected = one_run(data, tmp_path / "straight", **recipe)
    assert [train_runs(plan), train_runs(straight)] == [[], []]
    assert run.record()["train"]["optimizer"] == "muon"
    assert run.record()["curve"] == expected.record()["curve"]
    assert all(torch.equal(a, b) for a, b in zip(weights(run).values(), weights(expected).values(), strict=True))


class Evil:
    def __reduce__(self):
        return os.mkdir, (os.environ["EVIL"],)


def test_a_pickle_in_place_of_a_checkpoint_is_not_executed(stopped, tmp_path, monkeypatch, capsys):
    plan, run = stopped
    monkeypatch.setenv("EVIL", str(tmp_path / "evil"))
    content = pickle.dumps(Evil())
    digest = hashlib.sha256(content).hexdigest()[:16]  # even where its hash is right
    (run.directory / "checkpoints" / f"step-000012-{digest}.ckpt").write_bytes(content)
    assert newest_whole(run.directory, print)[0].name.startswith("step-000011")
    assert "damaged" in capsys.readouterr().out
    assert train_runs(plan) == []
    assert not (tmp_path / "evil").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="limits of POSIX systems")
def test_a_full_disk_is_named_and_nothing_is_lost(stopped, capsys):
    """A limit on the size of files stands for it: the checkpoint does not fit any more. A line of metrics is torn."""
    plan, run = stopped
    with (run.directory / "metrics.jsonl").open("a") as f:
        f.write('{"tokens": 1408, "train/lo')
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(InputError, match=r"cannot write .*make room"):
            train_runs(plan)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert [int(path.stem.split("-")[1]) for path in checkpoints(run.directory)] == [11, 10]
    assert not list(run.directory.rglob("*.tmp"))
    assert train_runs(plan) == []
    assert metrics(run.directory)[-1]["tokens"] == 128 * 24


def break_step(monkeypatch, broken, on_gpu=True):
    """Makes the loss of one step not finite; returns the list of the weights before that step and each later one. On a
    GPU, for which another device than the CPU stands, the run looks for such a loss only where it logs."""
    step, clip, seen = LanguageModel.training_step, LanguageModel.configure_gradient_clipping, []

    def training_step(self, batch, batch_idx):
        if batch_idx >= broken:
            seen.append([p.detach().clone() for p in self.parameters()])
        return step(self, batch, batch_idx) * (float("nan") if batch_idx == broken else 1)

    def clip_elsewhere(self, optimizer, *rest, **options):
        with monkeypatch.context() as patch:
            patch.setattr(LanguageModel, "device", property(lambda self: torch.device("meta")))
            clip(self, optimizer, *rest, **options)

    monkeypatch.setattr(LanguageModel, "training_step", training_step)
    if on_gpu:
        monkeypatch.setattr(LanguageModel, "configure_gradient_clipping", clip_elsewhere)
    return seen


@pytest.mark.parametrize("on_gpu", [False, True])
def test_nothing_of_a_step_that_is_not_finite_is_applied(on_gpu, data, tmp_path, monkeypatch):
    """On a CPU the run stops before it; on a GPU, where looking would be to wait, the optimizer does nothing after."""
    plan, run = one_run(data, tmp_path)
    seen = break_step(monkeypatch, 9, on_gpu)
    monkeypatch.setattr("train.runner.LOG_POINTS", 8)  # looks every third step
    (failure,) = train_runs(plan)
    assert "mha seed 0 failed: the loss is" in failure
    assert run.record()["diverged"]
    assert len(seen) == (3 if on_gpu else 1)
    assert all(torch.equal(a, b) for later in seen for a, b in zip(seen[0], later, strict=True))


@pytest.mark.parametrize(("broken", "kept"), [(23, []), (9, [9, 8])], ids=["last step", "just before a checkpoint"])
def test_what_is_not_finite_is_never_a_checkpoint_or_a_record(broken, kept, data, tmp_path, monkeypatch):
    plan, run = one_run(data, tmp_path, **({"checkpoint_seconds": 1e-6} if kept else {}))
    break_step(monkeypatch, broken)
    monkeypatch.setattr("train.runner.LOG_POINTS", 4)  # looks every sixth step
    (failure,) = train_runs(plan)
    assert "gradient's norm nan" in failure
    assert run.record()["diverged"]
    assert [int(path.stem.split("-")[1]) for path in checkpoints(run.directory)] == kept


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU; there is none here")
def test_a_gpus_memory_that_does_not_hold_a_batch(data, tmp_path, capsys):
    """It is given a half of what the whole batch took at its peak."""
    train = {"tokens": 2**19, "batch_tokens": 2**18, "val_tokens": 64, "val_points": 1}
    plans = [one_run(data, tmp_path / name, **train)[0] for name in ("whole", "small")]
    torch.cuda.reset_peak_memory_stats()
    assert train_runs(plans[0]) == []
    share = torch.cuda.max_memory_allocated() / 2 / torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(share)
    try:
        assert train_runs(plans[1]) == []
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "out of memory; each batch now goes through the model in" in capsys.readouterr().err
    whole, small = (metrics(plan.look().runs[0].directory) for plan in plans)
    assert [row["tokens"] for row in whole] == [row["tokens"] for row in small]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_batch_that_memory_does_not_hold_goes_through_in_pieces(dropout, data, tmp_path, monkeypatch, capsys):
    """The same steps at the same places, and up to rounding the same losses (with dropout: other masks)."""
    settings = tiny_study().model_dump() | {"variants": [{"arch": "mha"}]}
    settings["model"] |= {"dropout": dropout}
    whole, plan = (Plan(parse_study(settings), data, tmp_path / name) for name in ("whole", "small"))
    train_runs(whole)
    last_hidden_state = Decoder.last_hidden_state

    def limited(model, tokens, documents):
        if len(tokens) > 2:
            raise RuntimeError("CUDA error: out of memory\nGPU 0 ...")
        return last_hidden_state(model, tokens, documents)

    monkeypatch.setattr(Decoder, "last_hidden_state", limited)
    assert train_runs(plan) == []
    assert "out of memory; each batch now goes through the model in 4 pieces" in capsys.readouterr().err
    (run,), (expected,) = plan.look().runs, whole.look().runs
    assert [run.record()["train"]["pieces"], expected.record()["train"]["pieces"]] == [4, 1]
    assert pieces_needed(plan, run.variant) == 4  # from which the variant's further runs begin
    for a, b in zip(metrics(run.directory), metrics(expected.directory), strict=True):
        assert a.keys() == b.keys()
        assert a["tokens"] == b["tokens"]
        for tag in {"train/loss", "train/grad_norm", "val/loss"} & a.keys():
            assert a[tag] == pytest.approx(b[tag], rel=0.1 if dropout else 1e-5)


def test_a_run_that_another_process_saw_fail_is_not_tried_again(data, tmp_path):
    plan, run = one_run(data, tmp_path)
    failed = {"key": run.key, "failed": "x", "diverged": True, "failed_at": 1.0}
    with StudyProgress("training", 1) as progress:
        write_json(run.directory / "record.json", failed)
        train_if_needed(plan, run, progress, {})
        assert run.record() == failed
        train_if_needed(plan, run, progress, failed_records(plan))  # it had failed before the command
        assert "train" in run.record()


def test_where_not_even_one_sequence_fits_the_run_ends_with_advice_and_the_study_goes_on(data, tmp_path, monkeypatch):
    plan = Plan(tiny_study(), data, tmp_path)
    first, second = plan.look().runs
    whole = LanguageModel.training_step

    def training_step(self, batch, batch_idx):
        if self.hparams.arch == first.variant.arch:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
        return whole(self, batch, batch_idx)

    monkeypatch.setattr(LanguageModel, "training_step", training_step)
    (failure,) = train_runs(plan)
    assert failure.startswith(f"{first.name} failed: out of memory even with one sequence at a time")
    assert "lower model.width" in failure
    assert first.record()["oom"]
    assert "train" in second.record()
    monkeypatch.undo()
    assert train_runs(plan) == []  # tried again
    assert "train" in first.record()


def test_the_gap_that_a_failed_run_leaves_stands_in_the_results(data, tmp_path):
    plan = Plan(tiny_study(), data, tmp_path)
    first, second = plan.look().runs
    train_runs(plan)
    assert evaluate_runs(plan) == []
    write_json(second.directory / "record.json", {"key": second.key, "failed": "the loss is nan", "diverged": True})
    assert write_results(plan) == 1
    results = read_json(tmp_path / "results.json")
    assert [run["label"] for run in results["runs"]] == [first.variant.label]
    assert results["missing"] == [{"label": second.variant.label, "seed": 0, "why": "the loss is nan"}]


@pytest.mark.parametrize("moved", [False, True])
def test_an_evaluation_goes_on_where_it_was_begun_and_elsewhere_begins_anew(data, tmp_path, monkeypatch, moved):
    plan, run = one_run(data, tmp_path)
    train_runs(plan)
    roofs = iter([10.0])
    monkeypatch.setattr("eval.evaluate.measure_roof", lambda device: next(roofs))
    with pytest.raises(StopIteration):  # between the rounds
        evaluate_runs(plan)
    found = read_json(run.directory / FIRST_ROUND)
    write_json(run.directory / FIRST_ROUND, found | {"measured": found["measured"] | {"mark": 1}})
    monkeypatch.undo()
    if moved:
        monkeypatch.setattr("eval.evaluate.describe_machine", lambda: {"machine": {"device": "another"}})
    assert evaluate_runs(plan) == []
    assert ("mark" in run.record()) == (not moved)


def test_a_run_whose_settings_changed_says_what_was_and_what_is(data, tmp_path, capsys):
    plan, run = one_run(data, tmp_path)
    train_runs(plan)
    changed, _ = one_run(data, tmp_path, lr=5e-4)
    train_runs(changed)
    assert f"mha seed 0 starts over: train.lr was {run.lr}, is 0.0005" in capsys.readouterr().err
    assert json.loads((run.directory / "config.json").read_text())["train"]["lr"] == 5e-4
    assert changed.look().runs[0].record()["train"]["lr"] == 5e-4


def test_a_run_that_another_process_holds_is_left_to_it_and_waited_for(data, tmp_path, capsys):
    plan = Plan(tiny_study(), data, tmp_path)
    first, second = plan.look().runs
    pipes = {"stdout": subprocess.PIPE, "stdin": subprocess.PIPE, "text": True}
    holder = subprocess.Popen([sys.executable, "-c", HOLD, lock_path(first.directory)], **pipes)
    assert holder.stdout.readline() == "locked\n"
    assert is_locked(first.directory)
    seen = []

    def release():
        while "train" not in second.record():
            time.sleep(0.1)
        time.sleep(1)
        seen.extend("train" in run.record() for run in (first, second))
        holder.communicate("")  # it ends, and with it its lock

    threading.Thread(target=release, daemon=True).start()
    assert train_runs(plan) == []
    assert seen == [False, True]
    assert "waiting for another kvfrontier process in" in capsys.readouterr().err
    assert not is_locked(first.directory)
    assert "train" in first.record()


HOLD = """
import os, sys
from filelock import FileLock
os.makedirs(os.path.dirname(sys.argv[1]), exist_ok=True)
with FileLock(sys.argv[1]):
    print("locked", flush=True)
    sys.stdin.read()
"""
