"""How the decode kernel of a GPU is divided among programs: its own choice beside others, for each kind of cache.

    uv run python bench/tiles.py
    uv run python bench/tiles.py --batch 16 --context 65536

Slots a tile, warps a program and, from programs a processor, splits (archs/split_kv.py, `tiling`); of each kind the
fastest ten and the kernel's own. On a GPU, or with TRITON_INTERPRET=1, which says nothing of its speed.
"""

# Before torch, whose threads it tells how to wait.
from pairs import Report, in_turns, parser, said, spread

# isort: split

import itertools
import statistics
import sys
from functools import partial

import torch
from attention import in_a_row

import archs.split_kv
from archs.split_kv import Tiling, processors, split_kv_attention, tiling

TRIED = {"slots": [16, 32, 64, 128], "warps": [4, 8], "programs": [1, 2, 4, 8]}
SHOWN = 10


@torch.inference_mode()
def main() -> None:
    defaults = {"heads": 16, "head_dim": 64, "kv_rank": 256, "rope_dim": 32, "batch": 64, "context": 8192}
    made = parser(__doc__.splitlines()[0], **defaults, dtype="bf16", repeats=15)
    for name, values in TRIED.items():
        made.add_argument(f"--{name}", type=int, nargs="+", default=values, help=" ")
    args = made.parse_args()
    device, dtype = args.device, {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    H, D = args.heads, args.head_dim
    kinds = {"mha": (H, D, False), "mqa": (1, D, False), "mla": (1, args.kv_rank + args.rope_dim, True)}
    title = f"tiles of decode attention, batch {args.batch}, context {args.context}, {H} heads of {D}, {args.dtype}"
    report = Report(title, args.json, device, ["what", "slots", "warps", "splits", "ms", "GB/s"])
    position = torch.tensor([args.context - 1], device=device)
    for kind, (G, size, shared) in kinds.items():
        q = torch.randn(args.batch, H, size, device=device, dtype=dtype)
        k = torch.randn(args.batch, G, args.context, size, device=device, dtype=dtype)
        v = None if shared else torch.randn_like(k)
        used = args.kv_rank if shared else size
        held = k.nbytes * (1 if shared else 2)

        def run(tile: Tiling, q=q, k=k, v=v, size=size, used=used) -> None:
            archs.split_kv.tiling = lambda *_: tile
            split_kv_attention(q, k, v, position, size**-0.5, used)

        steps, calls = {}, 1
        own = tiling(1 << (used - 1).bit_length(), dtype, shared)
        tried = itertools.starmap(Tiling, itertools.product(args.slots, args.warps, args.programs))
        splits = {tile: tile.splits(args.batch * G, args.context, processors(q.device)) for tile in [own, *tried]}
        for tile in {(tile.slots, tile.warps, splits[tile]): tile for tile in reversed(splits)}.values():
            try:
                run(tile)
                steps[tile] = partial(run, tile)
                if device == "cuda":
                    steps[tile], calls = in_a_row([steps[tile]], device)
            except Exception as e:  # too large for a processor
                print(f"{kind} {tile}: {said(e)}", file=sys.stderr)
        times = {tile: [t / calls for t in column] for tile, column in in_turns(steps, device, args.repeats).items()}
        ranked = sorted(times, key=lambda tile: statistics.median(times[tile]))
        for tile in dict.fromkeys([*ranked[:SHOWN], *(t for t in ranked if t == own)]):
            what, speed = f"{kind}, its own" if tile == own else kind, held / statistics.median(times[tile]) / 1e9
            facts = tile._asdict() | {"splits": splits[tile], "ms": spread(times[tile]), "GB/s": f"{speed:.2f}"}
            report.add(what=what, **facts)
    archs.split_kv.tiling = tiling
    report.show()


if __name__ == "__main__":
    main()
