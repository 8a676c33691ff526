"""Decode of whole models at one point: how near the memory's bandwidth each variant comes.

    uv run python bench/roof.py
    uv run python bench/roof.py --width 768 --layers 12 --heads 12 --batch 128 --context 8192 --dtype bf16

What `kvfrontier eval` measures, without a study: bytes that a step must read, weights and cache, over its time.
"""

from pairs import Report, parser  # before torch, whose threads it tells how to wait

# isort: split

import torch

from archs import build
from eval.speed import measure_decode, measure_roof


def main() -> None:
    args = parser(
        __doc__.splitlines()[0],
        vocab_size=4096, width=256, layers=6, heads=8, kv_heads=2, kv_rank=128, rope_dim=16, window=256,
        batch=8, context=2048, dtype="auto",
    ).parse_args()  # fmt: skip
    device = torch.device(args.device)
    bf16 = args.dtype == "bf16" or (args.dtype == "auto" and device.type == "cuda")
    shape = {name: getattr(args, name) for name in ("vocab_size", "width", "layers", "heads", "context")}
    variants = {
        "mha": ("mha", {}),
        "gqa": ("gqa", {"kv_heads": args.kv_heads}),
        "mqa": ("mqa", {}),
        "mla": ("mla", {"kv_rank": args.kv_rank, "rope_dim": args.rope_dim}),
        "yoco window": ("yoco", {"kv_heads": args.kv_heads, "window": args.window}),
        "yoco retention": ("yoco", {"kv_heads": args.kv_heads, "self_decoder": "gret"}),
    }
    roof = measure_roof(device)
    columns = ["what", "token_ms", "tokens/s", "cache MiB read", "roof_fraction", "prefill_ms", "backend"]
    title = f"decode, batch {args.batch}, context {args.context}, roof {roof:.0f} GB/s"
    report = Report(title, args.json, args.device, columns)
    for name, (arch, own) in variants.items():
        model = build(arch, **shape, **own).to(device, torch.bfloat16 if bf16 else torch.float32).eval()
        for point in measure_decode(model, [args.batch], [args.context], roof):
            if "skipped" in point:
                print(f"{name}: {point['skipped']}")
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


if __name__ == "__main__":
    main()
