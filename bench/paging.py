"""A decode step of sequences of different lengths: paged caches against a cache that is padded to the longest.

    uv run python bench/paging.py
    uv run python bench/paging.py --context 2048 --batch 32 --variants "yoco kv_heads=2"

`padded` is the model's static cache, in which every sequence is as long as the longest; `blocks of C` is a paged cache
with blocks of C tokens, the first with one block for each sequence. Lengths are uniform up to the context. What such
caches hold and waste is measured in a study with `eval.paging`.
"""

from pairs import DTYPE, Report, model_of, model_parser, ratio, spread

import functools
import sys

import torch

from archs import Cache, Decoder
from archs.paged import PagedBatch
from eval.paging import draw_lengths, paged_cache

STEPS = 4  # decode steps timed together
BLOCK_SIZES = 16, 64


@torch.inference_mode()
def main() -> int:
    defaults = {"batch": 8, "context": 8192, "dtype": DTYPE, "repeats": 7}
    parser = model_parser(__doc__.splitlines()[0], **defaults)
    parser.set_defaults(variants=["mha", "gqa kv_heads=2", "mla kv_rank=128 rope_dim=16"])
    args = parser.parse_args()
    lengths = draw_lengths(args.batch, args.context - STEPS)
    title = f"a decode step of {args.batch} sequences of up to {args.context} tokens, {args.dtype}"
    report = Report(title, args, ["what", "step ms", "of padded", "quartiles"])
    token = torch.zeros(args.batch, dtype=torch.int64, device=args.device)

    def decode(model: Decoder, cache: Cache) -> None:
        if isinstance(cache, PagedBatch):
            for sequence, length in zip(cache.sequences, lengths, strict=True):
                sequence.length = length
        else:
            cache.length = max(lengths)
        for _ in range(STEPS):
            model.decode(token, cache)

    def compare(variant: str) -> None:
        model = model_of(variant, args)
        caches = {"padded": model.new_cache(args.batch, args.context)}
        for size in (args.context, *BLOCK_SIZES):
            pages = paged_cache(model, lengths, size, spare=STEPS)
            caches[f"blocks of {size}"] = pages.batch(pages.sequences)
        steps = {name: functools.partial(decode, model, cache) for name, cache in caches.items()}
        times = report.in_turns(steps, args.repeats)
        for name, column in times.items():
            report.add(f"{variant}, {name}", spread([t / STEPS for t in column]), *ratio(column, times["padded"]))

    return report.measure(args.variants, compare)


if __name__ == "__main__":
    sys.exit(main())
