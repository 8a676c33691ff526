"""Whole models, decode step and prefill, against transformers with its default cache.

    uv run python bench/decode.py
    uv run python bench/decode.py --width 768 --layers 12 --heads 12 --kv-rank 256 --rope-dim 32 --dtype bf16

Ours against theirs on the same shapes and numbers of parameters; and YOCO's prefill against our MHA's.
"""

from pairs import Report, in_turns, parser, ratio, spread  # before torch, whose threads it tells how to wait

# isort: split

import torch
from peers import peer
from transformers import DynamicCache

from archs import build

STEPS = 8  # decode steps timed together, between which neither cache is cut back


def main() -> None:
    made = parser(
        __doc__.splitlines()[0],
        vocab_size=4096, width=256, layers=6, heads=8, kv_heads=2, kv_rank=128, rope_dim=16, window=256,
        batch=8, context=2048, dtype="fp32", decode_repeats=7, prefill_repeats=3,
    )  # fmt: skip
    made.add_argument("--only", nargs="+", default=["mha", "gqa", "mqa", "mla", "yoco"], help=" ")
    args = made.parse_args()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    shape = {name: getattr(args, name) for name in ("vocab_size", "width", "layers", "heads", "context")}
    own = {
        "gqa": {"kv_heads": args.kv_heads},
        "mla": {"kv_rank": args.kv_rank, "rope_dim": args.rope_dim},
        "yoco": {"kv_heads": args.heads, "window": args.window},
    }
    title = f"prefill and decode, batch {args.batch}, context {args.context}, {args.dtype}"
    report = Report(title, args.json, args.device, ["what", "ours ms", "peer", "peer ms", "ratio", "quartiles"])
    prompt = torch.randint(args.vocab_size, (args.batch, args.context), device=args.device)

    def add(what: str, times: dict[str, list[float]], steps: int = 1) -> None:
        (ours, peers), name = ([t / steps for t in column] for column in times.values()), list(times)[1]
        found, low, high = ratio(peers, ours)
        row = {"what": what, "ours ms": spread(ours), "peer": name, "peer ms": spread(peers)}
        report.add(**row, ratio=f"{found:.2f}", quartiles=f"{low:.2f}-{high:.2f}")

    @torch.inference_mode()
    def compare(arch: str) -> None:
        model = build(arch, **shape, **own.get(arch, {})).to(args.device, dtype).eval()
        cache = model.new_cache(args.batch, args.context + STEPS)

        def prefill() -> None:
            cache.reset()
            model.prefill(prompt, cache)

        def decode() -> None:
            cache.length = args.context
            for _ in range(STEPS):
                model.decode(prompt[:, 0], cache)

        if arch == "yoco":
            baseline = build("mha", **shape).to(args.device, dtype).eval()
            other = baseline.new_cache(args.batch, args.context)

            def prefill_mha() -> None:
                other.reset()
                baseline.prefill(prompt, other)

            add("yoco prefill", in_turns({"ours": prefill, "our mha": prefill_mha}, args.device, args.prefill_repeats))
            return
        theirs = peer(model).eval()
        name = f"transformers {type(theirs).__name__.removesuffix('ForCausalLM')}"
        state = {}

        def peer_prefill() -> None:
            state["cache"] = DynamicCache(config=theirs.config)
            theirs(prompt, past_key_values=state["cache"], use_cache=True, logits_to_keep=1)

        def peer_decode() -> None:
            for _ in range(STEPS):
                theirs(prompt[:, :1], past_key_values=state["cache"], use_cache=True)

        add(f"{arch} prefill", in_turns({"ours": prefill, name: peer_prefill}, args.device, args.prefill_repeats, 1))

        def one_each(repeats: int) -> dict[str, list[float]]:
            times = {"ours": [], name: []}
            for _ in range(repeats):
                if more := state["cache"].get_seq_length() - args.context:
                    state["cache"].crop(-more)
                for key, seconds in in_turns({"ours": decode, name: peer_decode}, args.device, 1, 0).items():
                    times[key] += seconds
            return times

        one_each(1)
        add(f"{arch} decode step", one_each(args.decode_repeats), STEPS)

    for arch in args.only:
        compare(arch)
    report.show()


if __name__ == "__main__":
    main()
