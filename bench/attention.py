"""Decode attention of one layer: how near its reading of the cache comes to the memory's bandwidth.

    uv run python bench/attention.py
    uv run python bench/attention.py --batch 64 --dtype bf16

As many caches are read one after another, as a model's layers do, as are large together: none stays in the processor's
own caches. The roof is measured in the same process and in turns with the rest: the fastest of several reads of a large
array, on a GPU a copy as well. Beside it each variant's other bound, its FLOPs at the rate of a large matrix product.
Where CUDA is there, torch's SDPA and flex_attention take their turns on the same caches.
"""

# Before torch, whose threads it tells how to wait.
from pairs import Report, in_turns, parser, said, spread

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
from archs.graph import Calls
from eval.speed import ROOF_BYTES, reads
from train.machine import matmul_flops_per_s

REPLAYED = 20  # calls at least in one CUDA graph: launches are then not what is timed


def in_a_row(calls: list[Callable[[], object]], device: str) -> tuple[Callable[[], object], int]:
    """(All calls, how many they are), recorded as a decode step is; in a CUDA graph several rounds if they are few."""
    if device == "cpu":
        recorded = Calls()
        with recorded:
            for call in calls:
                call()
        return recorded.replay, len(calls)
    calls = calls * -(-REPLAYED // len(calls))
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay, len(calls)


def peers(H: int, G: int) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    from torch.nn.attention.flex_attention import flex_attention

    def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q.view(q.shape[0], G, H // G, -1), k, v)

    flex = functools.partial(torch.compile(flex_attention, dynamic=False), enable_gqa=G != H)
    return {"sdpa flash": flash, "flex_attention": flex}


@torch.inference_mode()
def main() -> None:
    args = parser(
        __doc__.splitlines()[0],
        heads=16, head_dim=64, kv_heads=4, kv_rank=256, rope_dim=32, batch=8, context=8192, dtype="fp32", repeats=15,
    ).parse_args()  # fmt: skip
    device, dtype = args.device, {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    H, D = args.heads, args.head_dim
    seen = torch.tensor([args.context - 1], device=device) if device == "cuda" else None

    def made(*shape: int) -> Tensor:
        return zeros(args.batch, *shape, dtype=dtype, device=device).normal_()

    x = zeros(ROOF_BYTES[device] // 4, dtype=torch.float32, device=device).normal_()
    y = torch.empty_like(x) if device == "cuda" else None
    roofs = reads(x) | ({} if y is None else {"copy": lambda: y.copy_(x)})
    title = f"decode attention, batch {args.batch}, context {args.context}, {H} heads of {D}, {args.dtype}"
    columns = ["what", "cache MiB", "ms", "GB/s", "of the read roof"]
    columns += ["arithmetic bound"] if y is None else ["of a copy", "arithmetic bound"]
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
        used = value_size or args.kv_rank
        held = args.batch * G * args.context * (key_size + (value_size or 0)) * dtype.itemsize
        q = made(H, 1, key_size)
        layers = [
            (made(G, args.context, key_size), made(G, args.context, value_size) if value_size else None)
            for _ in range(-(-x.nbytes // held))
        ]
        todo = {name: lambda q, k, v, used=used: attend(q, k, v, None, seen, used)}
        if device == "cuda" and value_size:
            todo |= {f"{name}, {peer}": step for peer, step in peers(H, G).items()}
        steps, calls = {}, {}
        for label, step in (roofs | todo).items():
            each = [functools.partial(step, q, k, v) for k, v in layers] if label in todo else [step]
            try:
                read = device == "cpu" and label in roofs
                steps[label], calls[label] = (step, 1) if read else in_a_row(each, device)
            except Exception as e:
                print(f"{label}: {said(e)}", file=sys.stderr)
        times = in_turns(steps, device, args.repeats)
        found = {
            read: calls[read] * x.nbytes * (2 if read == "copy" else 1) / statistics.median(times[read]) / 1e9
            for read in roofs
            if read in times
        }
        roof = max(found.values())
        bound = 2 * args.batch * H * args.context * (key_size + used) / peak
        for label in [label for label in todo if label in times]:
            column = [t / calls[label] for t in times[label]]
            speed = held / statistics.median(column) / 1e9
            report.add(
                **{
                    "what": label,
                    "cache MiB": f"{held / 2**20:.0f}",
                    "ms": spread(column),
                    "GB/s": f"{speed:.1f}",
                    "of the read roof": f"{speed / roof:.0%} of {roof:.1f}",
                    "of a copy": f"{speed / found['copy']:.0%} of {found['copy']:.1f}" if "copy" in found else "",
                    "arithmetic bound": f"{1e3 * bound:.2f} ms",
                    "roofs": ", ".join(f"{read} {rate:.1f}" for read, rate in found.items()),
                }
            )
    report.show()


if __name__ == "__main__":
    main()
