"""Which device is used, and what is said of one that is not, by pretending other machines."""

import os
import re

import pytest
import torch

from archs.kernels import fused
from train import machine
from train.machine import (
    describe_machine,
    find_device,
    matmul_flops_per_s,
    resolve_dtype,
    resolve_precision,
    unused_gpu,
)

PYTORCH = {
    "cuda.is_available": lambda: False,
    "cuda.get_device_capability": lambda *a: (9, 0),
    "cuda.get_device_name": lambda *a: "a GPU",
    "cuda.get_arch_list": lambda: ["sm_75", "sm_80", "sm_90", "sm_100a", "compute_120"],
    "version.cuda": "13.2",
    "version.hip": None,
    "backends.mps.is_available": lambda: False,
    "xpu.is_available": lambda: False,
}
HERE = {"cuda.is_available": lambda: True}
MACHINES = {
    "no GPU": ({}, "cpu", "fp32", ""),
    "Hopper": (HERE, "cuda", "bf16", ""),
    "Turing": (HERE | {"cuda.get_device_capability": lambda *a: (7, 5)}, "cuda", "fp32", ""),
    "Volta": (HERE | {"cuda.get_device_capability": lambda *a: (7, 0)}, "cpu", "fp32", "a GPU is older than"),
    "ROCm": (HERE | {"version.hip": "7.1", "version.cuda": None}, "cuda", "bf16", ""),
    "an old driver": ({"driver": "535.183.01"}, "cpu", "fp32", r"CUDA 13.2 cannot use .* \(535.183.01\), .* update"),
    "a CPU's PyTorch": ({"driver": "580.1", "version.cuda": None}, "cpu", "fp32", "this PyTorch has no CUDA"),
    "AMD, another PyTorch": ({"paths": ["/dev/kfd"]}, "cpu", "fp32", "an AMD GPU is here, .* no ROCm"),
    "Apple": ({"backends.mps.is_available": lambda: True}, "cpu", "fp32", "Apple's GPU is not supported"),
    "Intel": ({"xpu.is_available": lambda: True}, "cpu", "fp32", "Intel's GPU is not supported"),
}


@pytest.mark.parametrize("name", MACHINES)
def test_a_gpu_is_used_or_one_line_says_why_it_is_not(name, monkeypatch):
    settings, device, dtype, line = MACHINES[name]
    settings = PYTORCH | {"driver": "", "paths": []} | settings
    monkeypatch.setattr(machine, "_nvidia_driver", lambda: settings["driver"])
    monkeypatch.setattr(os.path, "exists", lambda path: path in settings["paths"])
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    for path, value in settings.items():
        if "." in path:
            monkeypatch.setattr(f"torch.{path}", value)
    unused_gpu.cache_clear()
    try:
        assert find_device().type == device
        assert (resolve_dtype("auto"), resolve_precision("auto")) == (dtype, dtype)
        assert (resolve_dtype("fp16"), resolve_precision("fp32")) == ("fp16", "fp32")
        found = unused_gpu()
        assert re.search(line, found) if line else not found
        assert "\n" not in found
        assert ("everything runs on the CPU" in found) == bool(line)
    finally:
        unused_gpu.cache_clear()


def test_a_system_that_does_not_say_how_much_memory_it_has(monkeypatch):
    """Windows has no os.sysconf."""
    monkeypatch.delattr(os, "sysconf")
    assert describe_machine()["machine"]["memory_bytes"] is None


def test_the_peak_of_the_arithmetic_is_measured_for_a_while(monkeypatch):
    """A GPU that was idle has low clocks for the first tenths of a second."""
    clock = iter(range(1000))
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(clock) * 0.01)
    matmul_flops_per_s.cache_clear()
    try:
        assert matmul_flops_per_s("cpu", torch.float32) == pytest.approx(2 * 1024**3 / 0.01)
        assert next(clock) >= 2 * 30
    finally:
        matmul_flops_per_s.cache_clear()


def test_where_torch_compile_fails_training_goes_without_it(monkeypatch):
    """As where Python's headers are missing: one warning, and nothing is compiled."""

    def no_headers(*args, **options):
        def run(*args):
            raise RuntimeError("CppCompileError: fatal error: Python.h: No such file or directory\nmore lines")

        return run

    monkeypatch.setattr(torch, "compile", no_headers)
    monkeypatch.setattr(fused, "compiler", lambda: "c++")
    fused.can_compile.cache_clear()
    try:
        with pytest.warns(
            UserWarning, match=r"goes without torch.compile, more slowly: .*Python\.h.*directory$"
        ) as seen:
            assert not any(fused.gains_by_compiling(torch.device("cpu"), 1e18) for _ in range(2))
        assert len(seen) == 1
    finally:
        fused.can_compile.cache_clear()
