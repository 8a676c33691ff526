"""Prefill and decode step of whole models, against transformers with its default cache.

    uv run python bench/decode.py
    uv run python bench/decode.py --context 8192 --dtype bf16 --variants mha "gqa kv_heads=4"

Both models have the same shape and number of parameters. Where transformers has no such architecture (YOCO), the peer
is the first variant, and only prefill is compared.
"""

from pairs import DTYPE, Report, model_of, model_parser, ratio, spread

import sys

import torch
from peers import peer, peer_name
from transformers import DynamicCache

from archs import Decoder

STEPS = 8  # decode steps timed together, after which both caches are cut back


@torch.inference_mode()
def main() -> int:
    defaults = {"batch": 8, "context": 2048, "dtype": DTYPE, "decode_repeats": 7, "prefill_repeats": 3}
    args = model_parser(__doc__.splitlines()[0], **defaults).parse_args()
    title = f"prefill and decode, batch {args.batch}, context {args.context}, {args.dtype}"
    report = Report(title, args, ["what", "ms", "peer", "peer ms", "ratio", "quartiles"])
    prompt = torch.randint(args.vocab_size, (args.batch, args.context), device=args.device)

    def add(what: str, times: dict[str, list[float]], steps: int = 1) -> None:
        (_, name), (own, others) = times, ([t / steps for t in column] for column in times.values())
        report.add(what, spread(own), name, spread(others), *ratio(others, own))

    def prefill_of(model: Decoder, cache):
        def prefill() -> None:
            cache.reset()
            model.prefill(prompt, cache)

        return prefill

    def compare(variant: str) -> None:
        model = model_of(variant, args)
        cache = model.new_cache(args.batch, args.context + STEPS)
        prefill = prefill_of(model, cache)
        other = peer(model)
        if other is None:
            first = model_of(args.variants[0], args)
            steps = {variant: prefill, args.variants[0]: prefill_of(first, first.new_cache(args.batch, args.context))}
            add(f"{variant} prefill", report.in_turns(steps, args.prefill_repeats))
            return
        other.eval()
        name, state = peer_name(other), {}

        def peer_prefill() -> None:
            state["cache"] = DynamicCache(config=other.config)
            other(prompt, past_key_values=state["cache"], use_cache=True, logits_to_keep=1)

        def decode() -> None:
            cache.length = args.context
            for _ in range(STEPS):
                model.decode(prompt[:, 0], cache)

        def peer_decode() -> None:
            for _ in range(STEPS):
                other(prompt[:, :1], past_key_values=state["cache"], use_cache=True)

        add(f"{variant} prefill", report.in_turns({variant: prefill, name: peer_prefill}, args.prefill_repeats, 1))
        times: dict[str, list[float]] = {variant: [], name: []}
        for turn in range(-1, args.decode_repeats):
            if turn > 0 and report.out_of_time():
                break
            if excess := state["cache"].get_seq_length() - args.context:
                state["cache"].crop(-excess)
            for step, seconds in report.in_turns({variant: decode, name: peer_decode}, 1, 0).items():
                times[step] += seconds if turn >= 0 else []
        add(f"{variant} decode step", times, STEPS)

    return report.measure(args.variants, compare)


if __name__ == "__main__":
    sys.exit(main())
