"""The decode kernels of a GPU, by Triton's interpreter where there is none, against attention by definition."""

import os
import subprocess
import sys

import pytest
import torch
from test_attention import by_definition
from test_laws import each_variant, make

pytest.importorskip("triton", reason="Triton comes with torch's CUDA build; it is not here")

from archs.split_kv import split_kv_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# query heads, KV heads, key size, value size (None: the values are the first columns of the keys)
SHAPES = {
    "mha": (4, 4, 64, 64),
    "gqa": (8, 2, 64, 64),
    "mqa": (12, 1, 128, 128),
    "more queries than a block": (80, 1, 16, 16),
    "odd sizes": (6, 2, 80, 20),
    "mla": (8, 1, 144, None),
    "mla of odd rank": (3, 1, 30, None),
    "mla of DeepSeek": (16, 1, 576, None),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("seen", [1, 17, 128, 300])
def test_one_token_attends_to_the_first_seen_slots(shape, seen):
    torch.manual_seed(seen)
    H, G, D, E = shape
    value_size = None if E else D - D // 9
    q, k = torch.randn(2, H, D, device=DEVICE), torch.randn(2, G, 300, D, device=DEVICE)
    v = torch.randn(2, G, 300, E, device=DEVICE) if E else None
    values = k[..., :value_size] if v is None else v
    expected = by_definition(q[:, :, None], k[:, :, :seen], values[:, :, :seen], scale=0.2)[:, :, 0]
    for beyond in (k[:, :, seen:], values[:, :, seen:]):
        beyond.fill_(float("nan"))  # what stands beyond is never used
    got = split_kv_attention(q, k, v, torch.tensor([seen - 1], device=DEVICE), 0.2, value_size)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_keys_may_be_of_half_precision_and_strided():
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter's bf16 products are wrong
    kept = torch.randn(2, 40, 3, 16, device=DEVICE, dtype=dtype).transpose(1, 2)  # (B, G, S, D)
    q = torch.randn(2, 6, 16, device=DEVICE, dtype=dtype)
    got = split_kv_attention(q, kept, kept, torch.tensor([36], device=DEVICE), 0.25)
    q, kept = q.float(), kept.float()[:, :, :37]
    expected = by_definition(q[:, :, None], kept, kept, scale=0.25)[:, :, 0]
    torch.testing.assert_close(got.float(), expected, rtol=0.02, atol=0.02)


@each_variant
def test_a_step_with_its_position_on_the_device_equals_the_full_forward(arch, options, monkeypatch):
    """From an empty cache on, and after a prompt."""
    monkeypatch.setattr("archs.attention.takes_attention", lambda *tensors: False)
    monkeypatch.setattr("archs.attention.attend_on_device", split_kv_attention)
    monkeypatch.setattr("archs.yoco.takes_retention", lambda *tensors: False)
    monkeypatch.setattr("archs.yoco.retains_on_device", lambda *tensors: True)
    model = make(arch, options).to(DEVICE)
    tokens = torch.randint(97, (2, 18), device=DEVICE)
    with torch.inference_mode():
        full = model(tokens)
        for prompt, end in ((0, 2), (16, 18)):
            cache = model.new_cache(2, 19)
            if prompt:
                model.prefill(tokens[:, :prompt], cache)
            for t in range(prompt, end):
                logits = model.append(tokens[:, t : t + 1], cache, torch.tensor([t], device=DEVICE))
                torch.testing.assert_close(logits, full[:, t], rtol=0, atol=1e-5 * full.abs().max().item())


COMPILE = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from archs.split_kv import attend_split as kernel

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


def test_the_kernel_compiles_for_hopper():
    """Without a GPU: to sm_90, with tiles that are fetched ahead and fit into its shared memory (227 KiB a program)."""
    command = [sys.executable, "-W", "ignore", "-c", COMPILE, *TILES.values()]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = {arch: map(int, line.split()) for arch, line in zip(TILES, done.stdout.splitlines(), strict=True)}
    for arch, (shared_bytes, fetches) in found.items():
        assert shared_bytes <= 227 * 1024, arch
        assert fetches >= 10, arch  # of 16 bytes a thread: more than the small tiles
