"""Runs side by side, on a Ray cluster and on two devices: the same results as one after the other."""

import contextlib
import os
import re
import signal
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from miniature import metrics, one_run
from texts import MINIATURE, differ, kvf, refused, user_folder

from train import workers as workers_module
from train.files import write_json
from train.progress import StudyProgress
from train.store import states
from train.workers import SideBySide, train_with

STUDY = MINIATURE | {
    "variants": [{"arch": "mha"}, {"arch": "yoco", "kv_heads": 1, "window": 8}],
    "train": {"tokens": 9600, "batch_tokens": 64, "val_tokens": 64, "val_points": 3, "precision": "fp32"},
    "eval": {"loss_tokens": 128, "decode": {"batch": [1], "context": [8]}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return user_folder(tmp_path_factory, "workers", STUDY)


@pytest.fixture(scope="module")
def plain(folder):
    return evaluated(folder, "plain")


def evaluated(folder, name, *how):
    """Trained and evaluated; nothing is drawn, which takes long."""
    for command in (["train", *how], ["eval"]):
        assert kvf(*command, folder / "study.yaml", "--out", folder / name) == 0
    return folder / name


def test_runs_side_by_side_give_the_same_results_and_stop_on_sigterm(plain, folder, capsys):
    out = folder / "two"
    with sigterm_when(lambda: running(out)):
        assert kvf("train", folder / "study.yaml", "--out", out, "--workers", 2) == 143
    assert "stopped by SIGTERM" in capsys.readouterr().err
    assert not any(state.startswith(("running", "failed")) for state in states(out).values())
    assert any("interrupted: step" in state for state in states(out).values())
    evaluated(folder, "two", "--workers", "2")
    assert differ(plain / "results.json", out / "results.json") == []


def test_a_process_that_starts_while_all_are_stopped_is_stopped(data, tmp_path, monkeypatch):
    plan, run = one_run(data, tmp_path)
    plan.save()
    began, workers = SideBySide._began, SideBySide(plan, 1)
    monkeypatch.setattr(SideBySide, "_began", lambda self, child: self.stop() or began(self, child))
    assert workers.start(run).result(timeout=60)[0] in (-signal.SIGTERM, 128 + signal.SIGTERM)
    workers.close()


def test_a_stop_does_not_wait_for_runs_that_have_not_begun(data, tmp_path, monkeypatch):
    """Cancelled futures are done, but `concurrent.futures.wait` waits for those that no executor has looked at."""
    plan, _ = one_run(data, tmp_path)
    workers = SideBySide(plan, 1)
    monkeypatch.setattr(SideBySide, "start", lambda self, run: queued.append(Future()) or queued[-1])
    monkeypatch.setattr(SideBySide, "stop", lambda self: [future.cancel() for future in queued])
    monkeypatch.setattr(workers_module, "_show", lambda *_: signal.raise_signal(signal.SIGINT))
    queued, began = [], time.monotonic()
    with StudyProgress("training", 1) as progress, pytest.raises(KeyboardInterrupt):
        train_with(workers, plan, progress)
    assert queued
    assert time.monotonic() - began < 20


def test_what_an_earlier_run_has_logged_is_not_shown_as_progress(data, tmp_path):
    plan, run = one_run(data, tmp_path)
    run.directory.mkdir(parents=True)
    (run.directory / "metrics.jsonl").write_text('{"tokens": 512}\n')
    shown = []
    progress = SimpleNamespace(total=10**12, done=0, show=lambda *what: shown.append(what[0]))
    for key in ("other settings", run.key):
        write_json(run.directory / "config.json", {"key": key})
        workers_module._show(progress, plan.look(), [run])
    assert shown == ["starts", run.name]


@contextlib.contextmanager
def sigterm_when(condition):
    """To this process, which trains meanwhile, as soon as the condition holds."""
    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(lambda: wait_for(condition) or os.kill(os.getpid(), signal.SIGTERM))
        yield
        sent.result()


def wait_for(condition, seconds=200):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if condition():
                return
        except ValueError:  # no plan yet
            pass
        time.sleep(0.05)
    raise TimeoutError


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for a node's processes in /proc")
def test_a_ray_cluster_gives_the_same_results_though_a_node_is_killed(plain, folder):
    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"  # as the command does before it imports Ray
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    out = folder / "ray"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})  # this process's own
    other = cluster.add_node(num_cpus=1)

    def other_dies():
        """While it trains a run; its processes end as they would with a machine."""
        wait_for(lambda: any(processes_on(other, name) for name in running(out)))
        pids = [pid for name in running(out) for pid in processes_on(other, name)]
        cluster.remove_node(other, allow_graceful=False)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    try:
        with ThreadPoolExecutor(1) as pool:
            died = pool.submit(other_dies)
            assert kvf("train", folder / "study.yaml", "--out", out, "--ray", cluster.address) == 0
            died.result()
    finally:
        cluster.shutdown()
    assert set(states(out).values()) == {"trained, not evaluated"}
    evaluated(folder, "ray")
    assert differ(plain / "results.json", out / "results.json") == []


def running(out):
    """The names of runs that are on their way."""
    return [name for name, state in states(out).items() if re.match(r"running: step [1-9]", state)]


def processes_on(node, name):
    """Ray's worker and the process that trains a run in it, if they are this node's."""
    (raylet,) = node.all_processes["raylet"]
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if b"--run\0" + name.encode() in (process / "cmdline").read_bytes():
                worker = parent(int(process.name))
                return [worker, int(process.name)] if parent(worker) == raylet.process.pid else []
    return []


def parent(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_two_devices_train_as_one_does(plain, folder, capsys):
    """Lightning's ddp: each process has half of the batch, and only the first one writes."""
    out = folder / "ddp"
    settings = "train.devices=2", "train.strategy=ddp", "variants=[{arch: mha}]"
    overrides = [word for setting in settings for word in ("--set", setting)]
    train = ["train", folder / "study.yaml", "--out", out, *overrides]
    with sigterm_when(lambda: running(out)):
        assert kvf(*train) == 143
    assert "stopped by SIGTERM" in capsys.readouterr().err
    assert "interrupted: step" in states(out)["mha seed 0"]
    assert kvf(*train) == 0
    one, two = (metrics(directory / "runs" / "mha" / "seed-0") for directory in (plain, out))
    assert [row["tokens"] for row in one] == [row["tokens"] for row in two]
    for a, b in zip(one, two, strict=True):
        for tag in {"train/loss", "train/grad_norm", "train/lr", "val/loss", "val/bpb"} & a.keys():
            assert b[tag] == pytest.approx(a[tag], rel=1e-4)


def test_a_run_by_name_is_the_unit(plain, folder, capsys):
    out = folder / "one"
    assert kvf("train", folder / "study.yaml", "--out", out, "--run", "yoco seed 0") == 0
    assert states(out) == {"mha seed 0": "missing", "yoco seed 0": "trained, not evaluated"}
    for arguments, message in (
        (["--run", "yoco seed 1"], "there are mha seed 0, yoco seed 0"),
        (["--set", "train.lr=1e-3", "--run", "yoco seed 0"], "has other settings here than in"),
        (["--set", "train.num_nodes=2"], "train.num_nodes=2: runs on several machines are started one by one"),
    ):
        assert message in refused(capsys, "train", out, *arguments)
