"""The scheduling of a study's runs, and two back ends that train many at once: side by side here, or on a Ray cluster.

Both start the same command for a run, `kvfrontier train DIR --run NAME`, which gives the same weights wherever it runs.
train/runner.py has a third back end, `InProcess`, which trains one run after the other.
"""

import os
import queue
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

import torch

from train.errors import InputError, Interrupted
from train.machine import cores, find_device
from train.plan import Plan, Run, Snapshot
from train.progress import StudyProgress
from train.store import logged_progress

ROOT = Path(__file__).resolve().parent.parent
COMMAND = next(path for name in ("kvfrontier.py", "__main__.py") if (path := ROOT / name).exists())  # __main__: a wheel
INTERRUPTED = 130, 143
RETRIES = 3  # on Ray, of a run whose process or node was killed

Outcome = tuple[int, list[str]]  # exit status of a run's process, and the lines that it printed


class Workers(ABC):
    """Where runs are trained."""

    @abstractmethod
    def start(self, run: Run) -> Future[Outcome] | None:
        """Takes on a run, to be trained as soon as a worker is free. None if another process is at work on it."""

    def stop(self) -> None:  # noqa: B027
        """Has all runs write a checkpoint and end; those that wait are not begun."""

    def close(self) -> None:  # noqa: B027
        """Frees what the workers use; called last."""


def train_with(workers: Workers, plan: Plan, progress: StudyProgress) -> list[str]:
    """Trains every run that is not trained yet, and waits for those that another process trains. Returns a line for
    each that failed. Updates plan.json, as a tuning run that ends may make more runs known."""
    running: dict[Future, Run] = {}
    tried, lost, announced = set(), [], False
    try:
        while True:
            look = plan.look()
            ready = [run for run in look.ready if run.directory not in tried]
            progress.note = f"({len(look.variants_to_train)} to go)"
            if not running:
                progress.set_left(sum(variant.work for variant in look.variants_to_train))
            for run in ready:
                if future := workers.start(run):
                    tried.add(run.directory)
                    running[future] = run
                    if future.done():  # trained in this process: look again, as more may be ready now
                        break
            if not running and not ready:
                return look.failures + lost
            if not running:
                if not announced:
                    names = ", ".join(run.name for run in ready)
                    progress.say(f"waiting for another kvfrontier process in {plan.directory}, at work on {names}")
                announced = True
                time.sleep(1)
                continue
            while not (done := wait(running, timeout=1, return_when=FIRST_COMPLETED).done):
                _show(progress, look, list(running.values()))
            for future in done:
                run = running.pop(future)
                if line := _ended(run, future, progress):
                    lost.append(line)
                    progress.say(line)
                if run.kind == "tuning":
                    plan.save()
    finally:
        if running:
            progress.say("stopping: runs write their checkpoints")
            workers.stop()
            wait([future for future in running if not future.done()], timeout=60)  # wait() waits for cancelled ones
        workers.close()


def _ended(run: Run, future: Future[Outcome], progress: StudyProgress) -> str | None:
    """Shows the lines of a run's process; returns a line if the run neither finished nor recorded a failure. Raises
    InputError (exit status 2) or Interrupted (130, 143)."""
    try:
        status, lines = future.result()
    except Exception as e:  # Ray gave the run up
        status, lines = 1, str(e).strip().splitlines()[:1]
    for line in lines:
        if not line.startswith("kvfrontier: "):
            progress.say(line)
    record = run.record()
    if run.is_finished(record) or "failed" in record:
        return None
    message = lines[-1] if lines else "it printed nothing"
    if status == 2:
        raise InputError(message.removeprefix("kvfrontier: "))
    if status in INTERRUPTED:
        raise Interrupted(status - 128)
    how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
    return f"{run.name}: its process {how} ({message}); the same command goes on from its last checkpoint"


def _show(progress: StudyProgress, look: Snapshot, running: list[Run]) -> None:
    """Shows how far the running processes are, by what they have logged."""
    own = [run for run in running if not look.plan.stale_because(run)]  # of others the directory has an earlier run
    begun = {run.name: run.variant.params * tokens for run in own if (tokens := logged_progress(run.directory)[0])}
    left = max(0, sum(variant.work for variant in look.variants_to_train) - sum(begun.values()))
    done = progress.total - progress.done - left
    if done < 0:  # there are more runs than were known
        progress.set_left(left)
    else:
        progress.show(", ".join(begun) or "starts", "", done)


def train_process(directory: Path, name: str, env: dict[str, str], began=lambda child: None) -> Outcome:
    """Trains one run in a process of its own; `began` is called with it."""
    command = [sys.executable, str(COMMAND), "train", str(directory), "--run", name]
    output = {"text": True, "errors": "replace", "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    # In a session of its own: Ctrl-C reaches this process alone, which passes it on once.
    child = subprocess.Popen(command, env=os.environ | env, start_new_session=True, **output)
    began(child)
    try:
        lines = [line for line in child.communicate()[1].splitlines() if line.strip()]
    except BaseException:  # this process is to stop: the child writes a checkpoint
        child.terminate()
        child.communicate()
        raise
    return child.returncode, [line for line in lines if not line.startswith("training ")]


def thread_env() -> dict[str, str]:
    """An environment that gives a process as many threads as this one: other numbers round sums differently."""
    return {"OMP_NUM_THREADS": str(torch.get_num_threads())}


class SideBySide(Workers):
    """Trains `count` runs at a time on this machine, each on its own GPU where there are enough."""

    def __init__(self, plan: Plan, count: int):
        self.directory = plan.directory.resolve()
        self.pool, self.free = ThreadPoolExecutor(count), queue.SimpleQueue()
        self.children: list[subprocess.Popen] = []
        self.stopped = False
        env = thread_env()
        if count * int(env["OMP_NUM_THREADS"]) > cores():
            env["GOMP_SPINCOUNT"] = "0"  # a spinning thread would keep another from a core
        for number in range(count):
            self.free.put(env | _gpus(plan, number, count))

    def start(self, run: Run) -> Future[Outcome]:
        return self.pool.submit(self._train, run.name)

    def _train(self, name: str) -> Outcome:
        env = self.free.get()
        try:
            return train_process(self.directory, name, env, self._began)
        finally:
            self.free.put(env)

    def _began(self, child: subprocess.Popen) -> None:
        self.children.append(child)
        if self.stopped:  # by a signal that came while it was started
            child.terminate()

    def stop(self) -> None:
        self.stopped = True
        self.pool.shutdown(wait=False, cancel_futures=True)
        for child in [*self.children]:
            child.terminate()  # nothing, where it has ended

    def close(self) -> None:
        self.pool.shutdown(wait=False)


def _gpus(plan: Plan, number: int, count: int) -> dict[str, str]:
    """CUDA_VISIBLE_DEVICES for worker `number` of `count`. With too few GPUs, workers that need one GPU share."""
    if find_device().type != "cuda":
        return {}
    each, gpus = plan.study.train.devices, torch.cuda.device_count()
    if each > 1 and each * count > gpus:
        raise InputError(f"--workers {count}: train.devices={each} each, and this machine has {gpus} GPUs")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(index) for index in range(gpus)]
    return {"CUDA_VISIBLE_DEVICES": ",".join(names[(number * each + i) % gpus] for i in range(each))}


class OnRay(Workers):
    """Trains each run as a Ray task, on any node that sees the study's directory under the same path. A run whose node
    died continues on another one. An empty `address` means $RAY_ADDRESS or, without it, this machine."""

    def __init__(self, plan: Plan, address: str):
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
            signal.signal(signal.SIGTERM, handler)  # Ray sets its own
        self.tasks: list = []
        self.remote_train, self.env = ray.remote(train_process_on_ray), thread_env()
        try:
            self.share = self._share(plan.study.train.devices, int(self.env["OMP_NUM_THREADS"]))
        except InputError:
            self.close()
            raise

    def _share(self, devices: int, threads: int) -> dict[str, int]:
        """The resources of a task: a GPU for each device or, where no node has a GPU, a core for each thread."""
        resources = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        gpus, cpus = (int(max((node.get(kind, 0) for node in resources), default=0)) for kind in ("GPU", "CPU"))
        if not cpus or 0 < gpus < devices:
            raise InputError(f"--ray: a run needs a CPU and train.devices={devices}; no node has more than {gpus} GPUs")
        return {"num_gpus": devices, "num_cpus": 1} if gpus else {"num_cpus": min(cpus, devices * threads)}

    def start(self, run: Run) -> Future[Outcome]:
        env = self.env | {name: value for name, value in os.environ.items() if name.startswith("KVFRONTIER_")}
        options = {"name": run.name, "max_retries": RETRIES, "retry_exceptions": [Killed], **self.share}
        task = self.remote_train.options(**options).remote(str(self.directory), run.name, env)
        self.tasks.append(task)
        return task.future()

    def stop(self) -> None:
        for task in self.tasks:
            self.ray.cancel(task)

    def close(self) -> None:
        self.ray.shutdown()


class Killed(RuntimeError):
    """A signal ended a run's process on Ray, as for lack of memory; Ray tries the run again."""


def train_process_on_ray(directory: str, name: str, env: dict[str, str]) -> Outcome:
    """Trains one run in a Ray worker."""
    for _ in range(100):  # a shared directory may show the plan a moment later on other machines
        if (Path(directory) / "plan.json").exists():
            status, lines = train_process(Path(directory), name, env)
            if status < 0:
                raise Killed(f"its process was killed by signal {-status}")
            return status, lines
        time.sleep(0.1)
    return 2, [f"{directory} is missing on a node: all nodes of the Ray cluster must share it"]
