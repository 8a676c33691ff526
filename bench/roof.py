"""Decode of whole models at one batch and context: how near each variant comes to the memory's bandwidth.

    uv run python bench/roof.py
    uv run python bench/roof.py --width 768 --layers 12 --heads 12 --batch 128 --variants mha "gqa kv_heads=4"

It measures what `kvfrontier eval` does, without a study: the bytes of weights and cache that a step must read, over its
time.
"""

from pairs import DTYPE, Report, model_of, model_parser

import sys

import torch

from eval.speed import measure_decode, measure_roof


def main() -> int:
    args = model_parser(__doc__.splitlines()[0], batch=8, context=2048, dtype=DTYPE).parse_args()
    roof = measure_roof(torch.device(args.device))
    title = f"decode, batch {args.batch}, context {args.context}, {args.dtype}, roof {roof:.0f} GB/s"
    columns = ["what", "token_ms", "tokens/s", "cache MiB read", "roof_fraction", "prefill_ms", "backend"]
    report = Report(title, args, columns)

    def measure(variant: str) -> None:
        (point,) = measure_decode(model_of(variant, args), [args.batch], [args.context], roof)
        if "skipped" in point:
            raise RuntimeError(point["skipped"])
        cache_mib = point["kv_read_gb_s"] * point["token_ms"] * 1e6 / 2**20
        report.add(
            variant,
            f"{point['token_ms']:.3f} (iqr {point['token_ms_iqr']:.3f})",
            f"{point['tokens_per_s']:,.0f}",
            f"{cache_mib:,.0f}",
            f"{point['roof_fraction']:.2f}",
            f"{point['prefill_ms']:.1f}",
            point["backend"],
        )

    return report.measure(args.variants, measure)


if __name__ == "__main__":
    sys.exit(main())
