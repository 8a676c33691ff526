"""Decode attention of one layer: how near its reading of the cache comes to the memory's bandwidth.

    uv run python bench/attention.py
    uv run python bench/attention.py --batch 64 --dtype bf16

The roof is measured in the same process and in turns with the rest: the fastest of several reads of a large array, on a
GPU a copy as well. Beside it each variant's other bound, its FLOPs at the rate of a large matrix product. Where CUDA is
there, torch's SDPA and flex_attention take their turns on the same cache.
"""

# Before torch, whose threads it tells how to wait.
from pairs import Report, in_turns, parser, spread

# isort: split

import functools
import statistics
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from archs.attention import attend
from archs.cache import zeros
from eval.speed import ROOF_BYTES, reads
from train.module import matmul_flops_per_s

REPLAYED = 20  # calls in one CUDA graph: launches are then not what is timed


def repeated(call: Callable[[], object], device: str) -> Callable[[], object]:
    """REPLAYED calls as a CUDA graph; on a CPU the call itself."""
    if device == "cpu":
        return call
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPLAYED):
            call()
    return graph.replay


def peers(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], object]]:
    from torch.nn.attention.flex_attention import flex_attention

    B, H, _, D = q.shape
    G = k.shape[1]

    def flash() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q.view(B, G, H // G, D), k, v)

    flex = functools.partial(torch.compile(flex_attention, dynamic=False), q, k, v, enable_gqa=G != H)
    return {"sdpa flash": flash, "flex_attention": flex}


@torch.inference_mode()
def main() -> None:
    args = parser(
        __doc__.splitlines()[0],
        heads=16, head_dim=64, kv_heads=4, kv_rank=256, rope_dim=32, batch=8, context=8192, dtype="fp32", repeats=15,
    ).parse_args()  # fmt: skip
    device, dtype = args.device, {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    H, D = args.heads, args.head_dim
    seen = torch.tensor([args.context], device=device) if device == "cuda" else None

    def made(*shape: int) -> Tensor:
        return zeros(args.batch, *shape, dtype=dtype, device=device).normal_()

    x = zeros(ROOF_BYTES[device] // 4, dtype=torch.float32, device=device)
    y = torch.empty_like(x) if device == "cuda" else None
    roofs = reads(x) | ({} if y is None else {"copy": lambda: y.copy_(x)})
    calls = REPLAYED if device == "cuda" else 1
    title = f"decode attention, batch {args.batch}, context {args.context}, {H} heads of {D}, {args.dtype}"
    columns = ["what", "cache MiB", "ms", "GB/s", "of the read roof", "arithmetic bound"]
    report = Report(title, args.json, device, columns)
    peak = matmul_flops_per_s(device, dtype)
    # variant: KV heads, key size, value size (None: the values are columns of the keys)
    variants = {
        "mha": (H, D, D),
        f"gqa-{args.kv_heads}": (args.kv_heads, D, D),
        "mqa": (1, D, D),
        "mla": (1, args.kv_rank + args.rope_dim, None),
    }
    for name, (G, key_size, value_size) in variants.items():
        q, k = made(H, 1, key_size), made(G, args.context, key_size)
        v = made(G, args.context, value_size) if value_size else None
        used = value_size or args.kv_rank
        call = functools.partial(attend, q, k, v, None, seen, used)
        steps = {read: repeated(step, device) for read, step in roofs.items()}
        todo = {name: call}
        if device == "cuda" and v is not None:
            todo |= {f"{name}, {peer}": step for peer, step in peers(q, k, v).items()}
        for label, step in todo.items():
            try:
                steps[label] = repeated(step, device)
            except Exception as e:
                print(f"{label}: {e}".splitlines()[0][:200], file=sys.stderr)
        times = in_turns(steps, device, args.repeats)
        moved = {read: x.nbytes * (2 if read == "copy" else 1) for read in roofs}
        roof = max(calls * moved[read] / statistics.median(times[read]) / 1e9 for read in roofs)
        held = k.nbytes + (v.nbytes if v is not None else 0)
        bound = 2 * args.batch * H * args.context * (key_size + used) / peak
        for label in [label for label in todo if label in times]:
            column = [t / calls for t in times[label]]
            speed = held / statistics.median(column) / 1e9
            report.add(
                **{
                    "what": label,
                    "cache MiB": f"{held / 2**20:.0f}",
                    "ms": spread(column),
                    "GB/s": f"{speed:.1f}",
                    "of the read roof": f"{speed / roof:.0%} of {roof:.1f}",
                    "arithmetic bound": f"{1e3 * bound:.2f} ms",
                }
            )
    report.show()


if __name__ == "__main__":
    main()
