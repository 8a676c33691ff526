"""This machine: its device, the precision and dtype it runs in, its name and versions, and how its processes are set.

torch is imported inside the functions, because `tune_process` has to run before torch is imported anywhere.
"""

import contextlib
import functools
import gc
import importlib.metadata
import os
import platform
import shutil
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PACKAGES = "kvfrontier", "torch", "lightning", "tiktoken", "tokenizers", "numpy"


def tune_process() -> None:
    """Sets how long idle OpenMP threads spin and how often Python collects garbage. Call it before torch is imported.

    Idle threads spin for about 0.5 ms before they sleep. Longer spinning slows steps down by up to 50x where cores are
    shared; without any, each of the hundreds of operators in a decode step would have to wake the threads.
    """
    gc.set_threshold(100_000)  # what imports make stays: looking for garbage there takes a quarter of a command's start
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def find_device() -> "torch.device":
    """The device that trains and measures: the first GPU of NVIDIA or AMD that PyTorch can use, else the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() and not unused_gpu() else "cpu")


@functools.cache
def unused_gpu() -> str:
    """A line that says why the GPU of this machine is not used; empty if it is used or none is here."""
    import torch

    cpu = "so everything runs on the CPU"
    if torch.cuda.is_available():
        if torch.version.hip:
            return ""
        chip, built = torch.cuda.get_device_capability(), torch.cuda.get_arch_list()
        known = [int(arch.rpartition("_")[2].rstrip("af")) for arch in built]  # sm_120, compute_90, sm_100a
        if not known or 10 * chip[0] + chip[1] >= min(known):
            return ""
        name = torch.cuda.get_device_name()
        return f"{name} is older than what this PyTorch was built for ({' '.join(built)}), {cpu}: install an older one"
    install = (
        "install PyTorch for it (https://pytorch.org/get-started) and run without `uv run`, which puts this one back"
    )
    if _nvidia_driver():
        if torch.version.cuda:
            needs = f"PyTorch for CUDA {torch.version.cuda} cannot use NVIDIA's driver ({_nvidia_driver()})"
            return f"{needs}, {cpu}: update the driver, or {install}"
        return f"an NVIDIA GPU is here, but this PyTorch has no CUDA, {cpu}: {install}"
    if os.path.exists("/dev/kfd") and not torch.version.hip:
        return f"an AMD GPU is here, but this PyTorch has no ROCm, {cpu}: {install}"
    for name, backend in (("Apple's", torch.backends.mps), ("Intel's", torch.xpu)):
        if backend.is_available():
            return f"{name} GPU is not supported, {cpu}"
    return ""


def _nvidia_driver() -> str:
    """What says that an NVIDIA driver is installed: its version, or the path of nvidia-smi; empty if there is none."""
    with contextlib.suppress(OSError), open("/proc/driver/nvidia/version", encoding="utf-8") as f:
        return next((word for word in f.readline().split() if word[:1].isdigit()), "of unknown version")
    return shutil.which("nvidia-smi") or ""


def resolve_precision(precision: str) -> str:
    """The precision of training: `auto` is bf16 on GPUs from Ampere on and on CPUs with AMX tiles, else fp32."""
    import torch

    if precision != "auto":
        return precision
    on_gpu = find_device().type == "cuda"
    fast = torch.cuda.get_device_capability() >= (8, 0) if on_gpu else torch.cpu._is_amx_tile_supported()
    return "bf16" if fast else "fp32"


def resolve_dtype(dtype: str) -> str:
    """The dtype of weights and cache while decoding: `auto` is bf16 on a GPU from Ampere on, else fp32."""
    import torch

    if dtype != "auto":
        return dtype
    return "bf16" if find_device().type == "cuda" and torch.cuda.get_device_capability() >= (8, 0) else "fp32"


def cores() -> int:
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_name(device: "torch.device") -> str:
    """The model name of a GPU or of this machine's CPU."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo", encoding="utf-8") as f:
        return next(line.partition(":")[2].strip() for line in f if line.startswith("model name"))
    return device.type


def describe_machine() -> dict:
    """{machine, versions}: the hardware and the package versions that a measurement was made with."""
    import torch

    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):  # Windows
        memory = None
    machine = {
        "device": device_name(find_device()),
        "cpu": device_name(torch.device("cpu")),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "memory_bytes": memory,
        "system": f"{platform.system()} {platform.machine()}",
    }
    versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"machine": machine, "versions": versions}


@functools.cache
def matmul_flops_per_s(device_type: str, dtype: "torch.dtype") -> float:
    """FLOPs per second of a large matrix product, the best of several: the measured arithmetic roof."""
    import torch

    n, times = {"cuda": 8192}.get(device_type, 1024), []
    generator = torch.Generator(device_type)  # the global generator keeps its state
    a, b = (torch.randn(n, n, device=device_type, generator=generator).to(dtype) for _ in range(2))
    # a GPU needs some tenths of a second to raise its clocks, and a CPU without bf16 seconds for one product
    while sum(times) < 1 and (len(times) < 10 or sum(times) < 0.3):
        start = time.perf_counter()
        a @ b
        if device_type != "cpu":
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times)
