"""How kernels are built: once for all processes, for any processor, or not at all; and Triton's without a GPU."""

import os
import random
import subprocess
import sys

import pytest
import torch
from operators import CACHE_DTYPES, CASES, assert_equals_formula, needs_compiler, retention_inputs, without_compiler

from archs import ops
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


COMPILE = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from archs.kernels.triton_attention import attend_split as kernel

for tile in sys.argv[1:]:
    A, R, E, shared, M, N, warps = (int(x) for x in tile.split(","))
    constants = {"A": A, "R": R, "E": E, "SHARED": bool(shared), "PRECISION": "tf32"}
    constants |= {"BLOCK_M": M, "BLOCK_N": N, "BLOCK_A": A, "BLOCK_R": max(16, R), "BLOCK_E": E}
    special = dict(q_ptr="*bf16", k_ptr="*bf16", v_ptr="*bf16", position_ptr="*i64", scale="fp32")
    names = kernel.arg_names
    types = {n: "constexpr" if n in constants else special.get(n, "*fp32" if "ptr" in n else "i32") for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if "ptr" in n or n[1:2] == "_"}
    source = ASTSource(kernel, types, {(names.index(n),): value for n, value in constants.items()}, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    print(made.metadata.shared, made.asm["ptx"].count("cp.async"))
"""
TILES = {"mha": "64,0,64,0,16,128,4", "mla": "256,32,256,1,16,32,4"}


def test_decode_attention_compiles_for_hopper():
    """Without a GPU: to sm_90, with tiles that are fetched ahead and fit into its shared memory (227 KiB a program)."""
    pytest.importorskip("triton", reason="Triton comes with PyTorch's CUDA build; it is not here")
    command = [sys.executable, "-W", "ignore", "-c", COMPILE, *TILES.values()]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    for arch, line in zip(TILES, result.stdout.splitlines(), strict=True):
        shared_bytes, fetches = map(int, line.split())
        assert shared_bytes <= 227 * 1024, arch
        assert fetches >= 10, arch  # of 16 bytes a thread: more than the small tiles
