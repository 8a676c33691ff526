"""Tiles of the GPU's decode kernel: its choice against others, for each kind of cache.

    uv run python bench/tiles.py
    uv run python bench/tiles.py --batch 16 --context 65536

A tiling is a number of cached tokens a tile, of warps a program and of programs a processor, which gives the number of
splits. The report has the ten fastest of each kind and the kernel's choice. It needs a GPU, or TRITON_INTERPRET=1, with
which the times mean nothing.
"""

from pairs import DTYPES, Report, parser, print_failure, recorded, spread

import itertools
import statistics
import sys
from functools import partial

import torch

from archs.kernels import triton_attention as kernel

TRIED = {"slots": [16, 32, 64, 128], "warps": [4, 8], "programs": [1, 2, 4, 8]}
SHOWN = 10


@torch.inference_mode()
def main() -> int:
    defaults = {"heads": 16, "head_dim": 64, "kv_rank": 256, "rope_dim": 32, "batch": 64, "context": 8192}
    made = parser(__doc__.splitlines()[0], **defaults, dtype="bf16", repeats=15)
    for name, values in TRIED.items():
        made.add_argument(f"--{name}", type=int, nargs="+", default=values, help=" ")
    args = made.parse_args()
    device, dtype, H, D = args.device, DTYPES[args.dtype], args.heads, args.head_dim
    kinds = {"mha": (H, D, False), "mqa": (1, D, False), "mla": (1, args.kv_rank + args.rope_dim, True)}
    title = f"tiles of decode attention, batch {args.batch}, context {args.context}, {H} heads of {D}, {args.dtype}"
    report = Report(title, args, ["what", "slots", "warps", "splits", "ms", "GB/s"])
    position = torch.tensor([args.context - 1], device=device)
    choose = kernel.tiling

    def measure(kind: str) -> None:
        G, size, shared = kinds[kind]
        q = torch.randn(args.batch, H, 1, size, device=device, dtype=dtype)
        k = torch.randn(args.batch, G, args.context, size, device=device, dtype=dtype)
        value_size = args.kv_rank if shared else size
        v = k[..., :value_size] if shared else torch.randn_like(k)
        nbytes = k.nbytes * (1 if shared else 2)

        def run(tile: kernel.Tiling) -> None:
            kernel.tiling = lambda *_: tile
            kernel.split_kv_attention(q, k, v, size**-0.5, position)

        choices = []
        kernel.tiling = lambda *sizes: choices.append(choose(*sizes)) or choices[0]
        kernel.split_kv_attention(q, k, v, size**-0.5, position)
        chosen = choices[0]
        others = itertools.product(args.slots, args.warps, args.programs)
        tried = [chosen._replace(slots=slots, warps=warps, programs=programs) for slots, warps, programs in others]
        processors = kernel.chip(q.device).processors
        splits = {tile: tile.splits(args.batch * G, args.context, processors) for tile in [chosen, *tried]}
        steps, calls = {}, 1
        # Tilings that differ in nothing but programs give the same splits where there are few tokens.
        for tile in {(tile.slots, tile.warps, splits[tile]): tile for tile in reversed(splits)}.values():
            try:
                run(tile)
                steps[tile] = partial(run, tile)
                if device == "cuda":
                    steps[tile], calls = recorded([steps[tile]], device)
            except Exception as e:  # too large for a processor
                print_failure(f"{kind} {tile}", e)
        times = {tile: [t / calls for t in column] for tile, column in report.in_turns(steps, args.repeats).items()}
        ranked = sorted(times, key=lambda tile: statistics.median(times[tile]))
        for tile in dict.fromkeys([*ranked[:SHOWN], *(t for t in ranked if t == chosen)]):
            what = f"{kind}, the kernel's choice" if tile == chosen else kind
            speed = f"{nbytes / statistics.median(times[tile]) / 1e9:.2f}"
            report.add(what, *map(str, (tile.slots, tile.warps, splits[tile])), spread(times[tile]), speed)

    try:
        return report.measure(kinds, measure)
    finally:
        kernel.tiling = choose


if __name__ == "__main__":
    sys.exit(main())
