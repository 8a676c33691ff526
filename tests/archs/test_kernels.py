"""How kernels are built: once for all processes, for any processor, or not at all; and Triton's without a GPU."""

import contextlib
import json
import os
import random
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from operators import (
    CACHE_DTYPES,
    CASES,
    DEVICE,
    OnGPU,
    assert_equals_formula,
    decode_inputs,
    needs_compiler,
    retention_inputs,
    without_compiler,
)

from archs import ops
from archs.kernels import replay, triton
from archs.kernels.cpu import attention, layers
from archs.kernels.cpu import build as building
from archs.kernels.cpu.build import build, compiler

QKV = torch.randn(3, 2, 4, 9, 16).unbind()


@pytest.fixture
def cache_cleared():
    build.cache_clear()
    yield
    build.cache_clear()


def test_a_compiler_that_fails_is_warned_of_once(monkeypatch, tmp_path, cache_cleared):
    (tmp_path / "c++").write_text("#!/bin/sh\necho 'no such flag' >&2\nexit 1\n")
    (tmp_path / "c++").chmod(0o755)
    monkeypatch.setenv("CXX", str(tmp_path / "c++"))
    with pytest.warns(UserWarning, match="without the C\\+\\+ kernel, more slowly: no such flag") as warnings:
        results = [ops.attention(*QKV, 0.2) for _ in range(2)]
    assert len(warnings) == 1
    torch.testing.assert_close(results[1], ops.attention.formula(*QKV, 0.2))


def test_without_a_compiler_the_loss_has_the_same_gradients(monkeypatch):
    arguments = torch.randn(2, 9, 8), torch.randn(30, 8), torch.randint(30, (2, 9))
    with without_compiler(monkeypatch):
        assert build() is None
        assert_equals_formula(layers.unembed_cross_entropy, arguments)


@needs_compiler
def test_a_library_is_built_once_for_all_processes(monkeypatch, tmp_path, cache_cleared):
    """Again for other flags; for this process alone in a folder that cannot be made."""
    builds, wrapped = tmp_path / "builds", tmp_path / "c++"
    wrapped.write_text(f'#!/bin/sh\ncase "$*" in *-dM*) ;; *) echo one >> {builds};; esac\nexec {compiler()} "$@"\n')
    wrapped.chmod(0o755)
    monkeypatch.setenv("CXX", str(wrapped))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def count_builds() -> int:
        build.cache_clear()
        torch.testing.assert_close(attention.causal(*QKV, 0.2), ops.attention.formula(*QKV, 0.2))
        return builds.read_text().count("one")

    assert [count_builds(), count_builds()] == [1, 1]
    monkeypatch.setattr(building, "FLAGS", [*building.FLAGS, "-DOTHER"])
    assert [count_builds(), count_builds()] == [2, 2]
    assert len(list((tmp_path / "cache").rglob("*.so"))) == len(list((tmp_path / "cache").rglob("*"))) - 2 == 2
    monkeypatch.setenv("XDG_CACHE_HOME", str(builds / "below a file"))
    assert count_builds() == 3


SANITIZED = ["-O1", "-fsanitize=undefined", "-fno-sanitize-recover", "-Werror"]


@needs_compiler
@pytest.mark.parametrize("flags", [["-mno-avx512f"], ["-march=x86-64"], SANITIZED], ids=" ".join)
def test_kernels_equal_their_formulas_with_vectors_of_any_width(flags, monkeypatch, cache_cleared):
    if "86" not in subprocess.run([compiler(), "-dumpmachine"], capture_output=True, text=True).stdout:
        pytest.skip("flags of x86 processors")
    monkeypatch.setattr(building, "FLAGS", building.FLAGS + flags)
    many = torch.randn(2, 16, 50, 64)
    for kernel in (layers.rms_norm, layers.swiglu, layers.rotate, layers.head_linear):
        assert_equals_formula(kernel, CASES[kernel].make(random.Random(1)))
    for dtype, heads in zip(CACHE_DTYPES, (16, 16, 1), strict=True):
        k, v = many[:, :1].to(dtype), many[:, 1:2].to(dtype)
        assert_equals_formula(attention.decode, (many[:, :heads, :1].contiguous(), k, v, 0.2))
        assert_equals_formula(layers.put, (k, torch.tensor([7]), many[:, :1, 3:4]))
        assert_equals_formula(layers.retention_step, retention_inputs(random.Random(1), (dtype,)))
    assert_equals_formula(attention.causal, (many, many[:, :1], many[:, 1:2], 0.2, 20))


# Triton's kernels

needs_triton = pytest.mark.skipif(not find_spec("triton"), reason="Triton comes with PyTorch's CUDA build")
COMPILE = """
import sys, chips
from archs.kernels import triton_attention as kernel

chips.study_shapes = dict
assert chips.main() == 0
kernel.tiling = lambda *_: kernel.Tiling(5, 16, 128, 4, 8)  # too large
sys.argv = ["chips.py", "--only", "sm_86 MHA 64 bf16 attend_split"]
assert chips.main() == 1
"""
COMPILED = [  # of bench/chips.py: the smallest, Hopper's and Blackwell's matrix units, and what had too large tiles
    "sm_80 MLA 2+8, 4 heads fp32", "sm_80 retention 512 fp32",
    "sm_90 MLA 256+32, 8 heads bf16 attend_split", "sm_100 MQA 64, 71 heads bf16 attend_split",
    "sm_86 MLA 512+64, 16 heads fp32 attend_split", "sm_89 MQA 256, 64 heads bf16 attend_split",
    "sm_120 MLA 512+64, 64 heads bf16 attend_split",
]  # fmt: skip


@needs_triton
def test_triton_kernels_compile_and_fit(tmp_path):
    """On six chips, in no more shared memory than was estimated, with tiles that are fetched ahead; a tile that is too
    large fails."""
    root, rows = Path(__file__).parents[2], tmp_path / "rows.jsonl"
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": f"{root}{os.pathsep}{root / 'bench'}"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    command = [sys.executable, "-W", "ignore", "-c", COMPILE, "--json", str(rows), "--only", *COMPILED]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    failures = [line for line in result.stderr.splitlines() if line.startswith("sm_")]
    assert failures == ["sm_86 MHA 64 bf16 attend_split: ValueError: does not fit"]
    compiled = [json.loads(line) for line in rows.read_text().splitlines()]
    assert {row["chip"] for row in compiled} == {"sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"}
    assert {row["kernel"] for row in compiled} == {"attend_split", "combine_splits", "retain_columns"}
    for row in compiled:
        if row["kernel"] == "attend_split":  # vectors of 10 numbers do not begin at multiples of 16 bytes
            assert (int(row["fetches"]) >= 10) == (row["shape"] != "MLA 2+8, 4 heads"), row


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shared_bytes", [101_376, 166_912, 232_448])
def test_tiles_of_published_shapes_fit(dtype, shared_bytes):
    from archs.kernels.triton_attention import tiling

    for M in (16, 32, 64, 128):
        for A, R, E in ((16, 0, 16), (64, 0, 64), (128, 0, 128), (256, 0, 256), (256, 32, 0), (512, 64, 0)):
            tile = tiling(M, A, R, E, dtype, shared_bytes)
            assert tile.shared_bytes(A + R, E, dtype.itemsize) <= shared_bytes
            assert shared_bytes < 232_448 or (tile.queries, tile.stages) == (min(64, M), 3)


SMALLER = [(40_000, (3, 64, 64)), (9_300, (3, 32, 16)), (5_000, (2, 16, 16))]


@needs_triton
@pytest.mark.parametrize(("shared_bytes", "sizes"), SMALLER)
def test_smaller_tiles_give_the_same_attention(shared_bytes, sizes, monkeypatch):
    from archs.kernels import triton_attention

    assert triton_attention.tiling(64, 16, 0, 16, torch.float32, shared_bytes)[:3] == sizes
    monkeypatch.setattr(triton_attention, "chip", lambda device: triton_attention.Chip(4, shared_bytes))
    for shape in ((80, 1, 16, 16), (8, 1, 144, None)):
        inputs = decode_inputs(random.Random(7), [shape], positions=(1,))  # 300 slots
        inputs = [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in inputs]
        assert_equals_formula(triton.decode_attention, inputs)


@pytest.fixture
def triton_for_any_device(monkeypatch):
    monkeypatch.setattr(triton, "usable", lambda *tensors: True)
    monkeypatch.setattr(triton, "runs_on", lambda device: True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_steps_in_dtypes_that_triton_does_not_support_are_not_recorded_on_a_gpu(dtype, triton_for_any_device):
    def can_record(weight_dtype, cache_dtype):
        weight = torch.zeros(1, dtype=weight_dtype).as_subclass(OnGPU)
        model = SimpleNamespace(embed=SimpleNamespace(weight=weight))
        return replay.can_record(model, None, SimpleNamespace(static=True, dtypes={torch.float32, cache_dtype}))

    assert can_record(torch.float32, dtype) == can_record(dtype, torch.float32) == (dtype != torch.float64)


@needs_triton
def test_triton_kernels_are_launched_on_the_device_of_their_tensors(monkeypatch):
    """Without a GPU: the current device is what was last entered."""
    devices, launched = ["cuda:0"], []
    q = SimpleNamespace(dtype=None, device="cuda:1", to=lambda dtype: q)

    @contextlib.contextmanager
    def entered(place):
        devices.append(getattr(place, "device", place))
        yield
        devices.pop()

    def launch(*arguments):
        launched.append(devices[-1])
        return q

    monkeypatch.setattr(torch.cuda, "device", entered)
    monkeypatch.setattr(torch.cuda, "device_of", entered)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch, "zeros", lambda *shape, **options: "cuda:1")
    for kernel in ("triton_attention.split_kv_attention", "triton_retention.retain"):
        monkeypatch.setattr(f"archs.kernels.{kernel}", launch)
    triton.decode_attention(q, q, q, 1.0, 0, None)
    triton.retention_step(q)
    assert triton.runs_on.__wrapped__("cuda:1")
    assert launched == ["cuda:1"] * 3
