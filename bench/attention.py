"""Decode attention of one layer: how near its reading of the cache comes to the memory's bandwidth.

    uv run python bench/attention.py
    uv run python bench/attention.py --batch 64 --dtype bf16

Caches of several layers are read one after another, as a model reads them: together they are too large for the
processor's own caches. The roof is measured in the same process and in turns with the rest, as the fastest of several
reads of a large array. The arithmetic bound is the variant's FLOPs at the rate of a large matrix product. On a GPU,
PyTorch's flash attention and flex_attention take their turns on the same caches.
"""

from pairs import DTYPE, DTYPES, Report, parser, print_failure, recorded, spread

import functools
import statistics
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from archs.ops import attention, zeros
from eval.speed import ROOF_BYTES, reads
from train.machine import matmul_flops_per_s


def peers(H: int, G: int) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    from torch.nn.attention.flex_attention import flex_attention

    def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q.view(q.shape[0], G, H // G, -1), k, v)

    flex = functools.partial(torch.compile(flex_attention, dynamic=False), enable_gqa=G != H)
    return {"sdpa flash": flash, "flex_attention": flex}


@torch.inference_mode()
def main() -> int:
    defaults = {"heads": 16, "head_dim": 64, "kv_heads": 4, "kv_rank": 256, "rope_dim": 32}
    defaults |= {"batch": 8, "context": 8192, "dtype": DTYPE, "repeats": 15}
    args = parser(__doc__.splitlines()[0], **defaults).parse_args()
    device, dtype, H, D = args.device, DTYPES[args.dtype], args.heads, args.head_dim
    title = f"decode attention, batch {args.batch}, context {args.context}, {H} heads of {D}, {args.dtype}"
    report = Report(title, args, ["what", "cache MiB", "ms", "GB/s", "of the read roof", "arithmetic bound"])
    x = zeros((ROOF_BYTES[device] // 4,), torch.float32, torch.device(device)).normal_()
    roofs = {way: (read, 1) if device == "cpu" else recorded([read], device) for way, read in reads(x).items()}
    peak = matmul_flops_per_s(device, dtype)
    position = torch.tensor([args.context - 1], device=device) if device == "cuda" else None
    variants = {  # (KV heads, key size, value size), the last None where the values are columns of the keys
        "mha": (H, D, D),
        f"gqa-{args.kv_heads}": (args.kv_heads, D, D),
        "mqa": (1, D, D),
        "mla": (1, args.kv_rank + args.rope_dim, None),
    }

    def random(*shape: int) -> Tensor:
        return zeros((args.batch, *shape), dtype, torch.device(device)).normal_()

    def measure(name: str) -> None:
        G, key_size, value_size = variants[name]
        attended = value_size or args.kv_rank

        def attend(q: Tensor, k: Tensor, v: Tensor | None) -> Tensor:
            return attention(q, k, k[..., :attended] if v is None else v, key_size**-0.5, 0, position)

        nbytes = args.batch * G * args.context * (key_size + (value_size or 0)) * dtype.itemsize
        q = random(H, 1, key_size)
        layers = [
            (random(G, args.context, key_size), random(G, args.context, value_size) if value_size else None)
            for _ in range(-(-x.nbytes // nbytes))
        ]
        attentions = {name: attend}
        if device == "cuda" and value_size:
            attentions |= {f"{name}, {label}": step for label, step in peers(H, G).items()}
        steps = dict(roofs)
        for label, step in attentions.items():
            try:
                steps[label] = recorded([functools.partial(step, q, k, v) for k, v in layers], device)
            except Exception as e:
                if label == name:
                    raise
                print_failure(label, e)
        times = report.in_turns({label: step for label, (step, _) in steps.items()}, args.repeats)
        times = {label: [t / steps[label][1] for t in column] for label, column in times.items()}
        roof = max(x.nbytes / statistics.median(times[way]) / 1e9 for way in roofs)
        bound = f"{1e3 * 2 * args.batch * H * args.context * (key_size + attended) / peak:.2f} ms"
        for label in list(steps)[len(roofs) :]:
            speed = nbytes / statistics.median(times[label]) / 1e9
            share = f"{speed / roof:.0%} of {roof:.1f}"
            report.add(label, f"{nbytes / 2**20:.0f}", spread(times[label]), f"{speed:.1f}", share, bound)

    return report.measure(variants, measure)


if __name__ == "__main__":
    sys.exit(main())
