"""Many runs at once: side by side on this machine, or spread over a Ray cluster.

The unit is always the same command, `kvfrontier train DIR --run NAME`: one run, one directory, repeatable, whoever
gives it. What is trained is the same as when the runs go one after the other.
"""

import os
import queue
import signal
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from train.errors import InputError, Interrupted
from train.files import is_finished, read_record
from train.progress import StudyProgress
from train.status import progress_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from train.plan import Plan, Run, Variant

COMMAND = Path(__file__).resolve().parent.parent / "kvfrontier.py"
INTERRUPTED = 130, 143
RETRIES = 3  # of a run whose process or Ray node was killed


class Workers(Protocol):
    """`start` gives a run to the next that is free and answers at once; the future has what `train_process` returns."""

    def start(self, run: "Run") -> Future: ...

    def stop(self) -> None:
        """Has all runs write a checkpoint and end; those that wait are not begun."""

    def close(self) -> None:
        """To be called last."""


def train_by(workers: Workers, plan: "Plan", record_plan: "Callable[[], object]") -> list[str]:
    """Trains what is not trained yet; returns a line for each run that failed. Interrupted if a signal came.

    `record_plan` is called when a learning rate has been tried: there may be more runs then.
    """
    at_work: dict[Future, Run] = {}
    tried: set[Path] = set()
    lost = []
    with StudyProgress("training", 0) as progress:
        try:
            while True:
                for run in plan.ready():
                    if run.directory not in tried:
                        tried.add(run.directory)
                        at_work[workers.start(run)] = run
                if not at_work:
                    return plan.failures() + lost
                left, done = plan.left(), set()
                while not done:
                    done, _ = wait(at_work, timeout=1, return_when=FIRST_COMPLETED)
                    _show(progress, left, list(at_work.values()))
                for future in done:
                    if line := _ended(run := at_work.pop(future), future, progress):
                        lost.append(line)
                        progress.say(line)
                    if run.tunes:
                        record_plan()
        finally:
            if at_work:
                progress.say(f"stopping: {len(at_work)} runs write their checkpoints")
                workers.stop()
                wait(at_work, timeout=60)
            workers.close()


def _ended(run: "Run", future: Future, progress: StudyProgress) -> str | None:
    """Passes on what a run's process said. A line on a run that left no record: what ended it is beyond the run."""
    try:
        status, lines = future.result()
    except Exception as e:  # Ray's: its worker died more often than RETRIES
        status, lines = 1, str(e).strip().splitlines()[:1]
    for line in lines:
        if not line.startswith("kvfrontier: "):
            progress.say(line)
    if is_finished(run) or "failed" in read_record(run):
        return None
    said = lines[-1] if lines else "it said nothing"
    if status == 2:
        raise InputError(said.removeprefix("kvfrontier: "))
    if status in INTERRUPTED:
        raise Interrupted(status - 128)
    how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
    return f"{run.name}: its process {how} ({said}); the same command goes on from its last checkpoint"


def _show(progress: StudyProgress, to_train: "list[Variant]", runs: list["Run"]) -> None:
    """How far they are is told from what they log."""
    begun = {run.name: run.variant.params * tokens for run in runs if (tokens := progress_of(run.directory)[0])}
    left = max(0, sum(variant.work for variant in to_train) - sum(begun.values()))
    done = progress.total - progress.done - left
    if done < 0 or not progress.total:  # the first time, or there are more runs than was known
        progress.left(left)
    else:
        progress.show(", ".join(begun) or "starts", f"{len(to_train)} to go", done)


def train_process(
    directory: Path, name: str, env: dict[str, str], children: set[subprocess.Popen]
) -> tuple[int, list[str]]:
    """(exit status, lines said, but for its progress) of the command that trains one run; it is among `children` while
    it lasts."""
    command = [sys.executable, str(COMMAND), "train", str(directory), "--run", name]
    child = subprocess.Popen(
        command,
        env=os.environ | env,
        text=True,
        errors="replace",
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C comes to this process, which passes it on once
    )
    children.add(child)
    try:
        said = [line for line in child.communicate()[1].splitlines() if line.strip()]
    except BaseException:  # this process is to stop: the child writes a checkpoint
        child.terminate()
        child.communicate()
        raise
    finally:
        children.discard(child)
    return child.returncode, [line for line in said if not line.startswith("training ")]


def threads() -> dict[str, str]:
    """Each run has as many threads as it has in a plain command: sums are rounded otherwise with other numbers."""
    import torch

    return {"OMP_NUM_THREADS": str(torch.get_num_threads())}


class SideBySide:
    """On this machine, `count` at a time, where there are GPUs each with its own."""

    def __init__(self, plan: "Plan", count: int):
        self.directory = plan.directory.resolve()
        self.pool, self.free = ThreadPoolExecutor(count), queue.SimpleQueue()
        self.children: set[subprocess.Popen] = set()
        env = threads()
        if count * int(env["OMP_NUM_THREADS"]) > cores():
            env["GOMP_SPINCOUNT"] = "0"  # a thread that waits awake keeps another from a core
        for number in range(count):
            self.free.put(env | _gpus(plan, number, count))

    def start(self, run: "Run") -> Future:
        return self.pool.submit(self._train, run.name)

    def _train(self, name: str) -> tuple[int, list[str]]:
        env = self.free.get()
        try:
            return train_process(self.directory, name, env, self.children)
        finally:
            self.free.put(env)

    def stop(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)
        for child in [*self.children]:
            child.terminate()

    def close(self) -> None:
        self.pool.shutdown(wait=False)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpus(plan: "Plan", number: int, count: int) -> dict[str, str]:
    """Which GPUs worker `number` of `count` sees; they share them where there are fewer. {} without GPUs."""
    import torch

    from train.plan import find_device

    if find_device().type != "cuda":
        return {}
    each, there = plan.study.train.devices, torch.cuda.device_count()
    if each > 1 and each * count > there:
        raise InputError(f"--workers {count}: train.devices={each} each, and this machine has {there} GPUs")
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = listed.split(",") if listed else [str(index) for index in range(there)]
    return {"CUDA_VISIBLE_DEVICES": ",".join(names[(number * each + i) % there] for i in range(each))}


class OnRay:
    """A Ray task for each run, on any node that sees the study's directory under the same path.

    A task takes as many GPUs as a run has devices, or, where no node has any, a core for each thread of a run (all of a
    node that has fewer). A run whose node died goes on from its last checkpoint on another one. `address` is the
    cluster's; empty: $RAY_ADDRESS, or this machine.
    """

    def __init__(self, plan: "Plan", address: str):
        os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # else each worker installs a copy of the project
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        try:
            import ray
        except ImportError:
            raise InputError("--ray needs Ray: uv run --extra ray kvfrontier run ... --ray") from None
        self.ray, self.directory = ray, plan.directory.resolve()
        handler = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(address=address or None, log_to_driver=False, logging_level="error", include_dashboard=False)
        except (ConnectionError, ValueError, RuntimeError) as e:
            raise InputError(f"--ray {address}: no Ray cluster answers there: {str(e).splitlines()[0]}") from None
        finally:
            signal.signal(signal.SIGTERM, handler)  # Ray puts its own there
        self.tasks: list = []
        self.task, self.env = ray.remote(train_process_on_ray), threads()
        try:
            self.share = self._share(plan.study.train.devices, int(self.env["OMP_NUM_THREADS"]))
        except InputError:
            self.close()
            raise

    def _share(self, devices: int, threads: int) -> dict[str, int]:
        resources = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        gpus, cpus = (int(max((node.get(kind, 0) for node in resources), default=0)) for kind in ("GPU", "CPU"))
        if not cpus or 0 < gpus < devices:
            raise InputError(f"--ray: a run needs a CPU and train.devices={devices}; no node has more than {gpus} GPUs")
        return {"num_gpus": devices, "num_cpus": 1} if gpus else {"num_cpus": min(cpus, devices * threads)}

    def start(self, run: "Run") -> Future:
        env = self.env | {name: value for name, value in os.environ.items() if name.startswith("KVFRONTIER_")}
        of_task = {"name": run.name, "max_retries": RETRIES, "retry_exceptions": [Killed], **self.share}
        task = self.task.options(**of_task).remote(str(self.directory), run.name, env)
        self.tasks.append(task)
        return task.future()

    def stop(self) -> None:
        for task in self.tasks:
            self.ray.cancel(task)

    def close(self) -> None:
        self.ray.shutdown()


class Killed(RuntimeError):
    """From outside: for want of memory, or with its node. Ray tries again."""


def train_process_on_ray(directory: str, name: str, env: dict[str, str]) -> tuple[int, list[str]]:
    """In a Ray worker, which has told its children how many threads and which GPUs are theirs."""
    for _ in range(100):  # a shared directory may show the plan a moment later on other machines
        if (Path(directory) / "plan.json").exists():
            status, said = train_process(Path(directory), name, env, set())
            if status < 0:
                raise Killed(f"its process was killed by signal {-status}")
            return status, said
        time.sleep(0.1)
    return 2, [f"{directory} is not to be seen on every node: Ray's nodes must share it"]
