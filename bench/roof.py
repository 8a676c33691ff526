"""Decode of whole models at one point: how near the memory's bandwidth each variant comes.

    uv run python bench/roof.py
    uv run python bench/roof.py --width 768 --layers 12 --heads 12 --batch 128 --variants mha "gqa kv_heads=4"

What `kvfrontier eval` measures, without a study: bytes that a step must read, weights and cache, over its time.
"""

# Before torch, whose threads it tells how to wait.
from pairs import Report, model_of, model_parser, said

# isort: split

import sys

import torch

from eval.speed import measure_decode, measure_roof


def main() -> int:
    args = model_parser(__doc__.splitlines()[0], batch=8, context=2048, dtype="auto").parse_args()
    device = torch.device(args.device)
    bf16 = args.dtype == "bf16" or (args.dtype == "auto" and device.type == "cuda")
    roof = measure_roof(device)
    columns = ["what", "token_ms", "tokens/s", "cache MiB read", "roof_fraction", "prefill_ms", "backend"]
    title = f"decode, batch {args.batch}, context {args.context}, roof {roof:.0f} GB/s"
    report = Report(title, args.json, args.device, columns)
    failed = 0
    for name in args.variants:
        try:
            model = model_of(name, args, torch.bfloat16 if bf16 else torch.float32)
            (point,) = measure_decode(model, [args.batch], [args.context], roof)
        except Exception as e:  # the others are measured all the same
            point, failed = {"skipped": said(e)}, 1
        if "skipped" in point:
            print(f"{name}: {point['skipped']}", file=sys.stderr)
            continue
        read = point["kv_read_gb_s"] * point["token_ms"] * 1e6 / 2**20
        report.add(
            **{
                "what": name,
                "token_ms": f"{point['token_ms']:.3f} (iqr {point['token_ms_iqr']:.3f})",
                "tokens/s": f"{point['tokens_per_s']:,.0f}",
                "cache MiB read": f"{read:,.0f}",
                "roof_fraction": f"{point['roof_fraction']:.2f}",
                "prefill_ms": f"{point['prefill_ms']:.1f}",
                "backend": point["backend"],
            }
        )
    report.show()
    return failed


if __name__ == "__main__":
    sys.exit(main())
