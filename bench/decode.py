"""Whole models, decode step and prefill, against transformers with its default cache.

    uv run python bench/decode.py
    uv run python bench/decode.py --context 8192 --dtype bf16 --variants mha "gqa kv_heads=4"

Ours against theirs on the same shapes and numbers of parameters; where they have no such architecture (YOCO), our
prefill against that of our first variant.
"""

# Before torch, whose threads it tells how to wait.
from pairs import Report, in_turns, model_of, model_parser, ratio, said, spread

# isort: split

import sys

import torch
from peers import peer
from transformers import DynamicCache

STEPS = 8  # decode steps timed together, between which neither cache is cut back


def main() -> int:
    defaults = {"batch": 8, "context": 2048, "dtype": "fp32", "decode_repeats": 7, "prefill_repeats": 3}
    args = model_parser(__doc__.splitlines()[0], **defaults).parse_args()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    title = f"prefill and decode, batch {args.batch}, context {args.context}, {args.dtype}"
    report = Report(title, args.json, args.device, ["what", "ours ms", "peer", "peer ms", "ratio", "quartiles"])
    prompt = torch.randint(args.vocab_size, (args.batch, args.context), device=args.device)

    def add(what: str, times: dict[str, list[float]], steps: int = 1) -> None:
        (ours, peers), name = ([t / steps for t in column] for column in times.values()), list(times)[1]
        found, low, high = ratio(peers, ours)
        row = {"what": what, "ours ms": spread(ours), "peer": name, "peer ms": spread(peers)}
        report.add(**row, ratio=f"{found:.2f}", quartiles=f"{low:.2f}-{high:.2f}")

    @torch.inference_mode()
    def compare(variant: str) -> None:
        model = model_of(variant, args, dtype)
        cache = model.new_cache(args.batch, args.context + STEPS)

        def prefill() -> None:
            cache.reset()
            model.prefill(prompt, cache)

        def decode() -> None:
            cache.length = args.context
            for _ in range(STEPS):
                model.decode(prompt[:, 0], cache)

        theirs = peer(model)
        if theirs is None:
            baseline = model_of(args.variants[0], args, dtype)
            other = baseline.new_cache(args.batch, args.context)

            def prefill_first() -> None:
                other.reset()
                baseline.prefill(prompt, other)

            steps = {"ours": prefill, f"our {args.variants[0]}": prefill_first}
            add(f"{variant} prefill", in_turns(steps, args.device, args.prefill_repeats))
            return
        theirs.eval()
        name = f"transformers {type(theirs).__name__.removesuffix('ForCausalLM')}"
        state = {}

        def peer_prefill() -> None:
            state["cache"] = DynamicCache(config=theirs.config)
            theirs(prompt, past_key_values=state["cache"], use_cache=True, logits_to_keep=1)

        def peer_decode() -> None:
            for _ in range(STEPS):
                theirs(prompt[:, :1], past_key_values=state["cache"], use_cache=True)

        add(f"{variant} prefill", in_turns({"ours": prefill, name: peer_prefill}, args.device, args.prefill_repeats, 1))

        def one_each(repeats: int) -> dict[str, list[float]]:
            times = {"ours": [], name: []}
            for _ in range(repeats):
                if more := state["cache"].get_seq_length() - args.context:
                    state["cache"].crop(-more)
                for key, seconds in in_turns({"ours": decode, name: peer_decode}, args.device, 1, 0).items():
                    times[key] += seconds
            return times

        one_each(1)
        add(f"{variant} decode step", one_each(args.decode_repeats), STEPS)

    failed = 0
    for variant in args.variants:
        try:
            compare(variant)
        except Exception as e:  # the others are measured all the same
            print(f"{variant}: {said(e)}", file=sys.stderr)
            failed = 1
    report.show()
    return failed


if __name__ == "__main__":
    sys.exit(main())
