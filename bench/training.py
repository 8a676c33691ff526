"""A training step, forward, backward and optimiser: each variant of ours, and transformers' Llama.

    uv run python bench/training.py
    uv run python bench/training.py --width 768 --layers 12 --heads 12 --vocab-size 50304 --context 1024 --batch 32

Same shape, batch and precision, and the same AdamW with clipping. Ratios are to our MHA's step. MFU is the share of the
rate of a large matrix product, measured here. Ours is compiled where there is a C++ compiler, as in longer runs.
"""

from pairs import Report, in_turns, parser, ratio, spread  # before torch, whose threads it tells how to wait

# isort: split

import statistics
import sys

import torch
from peers import peer

from train.module import LanguageModel, has_compiler, matmul_flops_per_s
from train.plan import resolve_precision


def main() -> None:
    torch._dynamo.config.recompile_limit = 100  # several models in one process
    made = parser(
        __doc__.splitlines()[0],
        vocab_size=4096, width=256, layers=6, heads=8, kv_heads=2, kv_rank=128, rope_dim=16, window=128,
        batch=16, context=256, precision="auto", repeats=9,
    )  # fmt: skip
    made.add_argument("--only", nargs="+", help="these variants of ours (default: all); mha is always among them")
    made.add_argument("--no-compile", action="store_true", help="ours as short runs are trained, not compiled")
    made.add_argument("--compiled-peer", action="store_true", help="transformers' Llama through torch.compile, too")
    args = made.parse_args()
    compiled = has_compiler() and not args.no_compile
    precision = resolve_precision(args.precision)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    shape = {name: getattr(args, name) for name in ("vocab_size", "width", "layers", "heads", "context")}
    variants = {
        "mha": ("mha", {}),
        "gqa": ("gqa", {"kv_heads": args.kv_heads}),
        "mqa": ("mqa", {}),
        "mla": ("mla", {"kv_rank": args.kv_rank, "rope_dim": args.rope_dim}),
        "yoco window": ("yoco", {"kv_heads": args.heads, "window": args.window}),
        "yoco retention": ("yoco", {"kv_heads": args.heads, "self_decoder": "gret"}),
    }
    inputs = torch.randint(args.vocab_size, (args.batch, args.context), device=args.device)
    targets = torch.randint(args.vocab_size, (args.batch, args.context), device=args.device)
    modules = {
        name: LanguageModel(arch, shape | own, tokens=1)
        for name, (arch, own) in variants.items()
        if not args.only or name in ["mha", *args.only]
    }
    theirs = peer(modules["mha"].to(args.device).model).train()

    def ours(module: LanguageModel):
        module.to(args.device).train()
        if compiled:
            module.compile_parts()
        return stepper(lambda: module.mean_nats(inputs, targets), module)

    def stepper(loss, model: torch.nn.Module):
        matrices = [p for p in model.parameters() if p.dim() > 1]
        vectors = [p for p in model.parameters() if p.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)

        def step() -> None:
            with torch.autocast(args.device, dtype, enabled=precision == "bf16"):
                value = loss()
            value.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return step

    steps = {name: ours(module) for name, module in modules.items()}
    steps["transformers Llama"] = stepper(lambda: theirs(inputs, labels=targets, use_cache=False).loss, theirs)
    if args.compiled_peer:
        peer_compiled = torch.compile(theirs)
        steps["transformers Llama, compiled"] = stepper(
            lambda: peer_compiled(inputs, labels=targets, use_cache=False).loss, theirs
        )
    for name in list(steps):
        try:
            steps[name]()
        except Exception as e:  # a peer that does not run here, or no memory for it
            del steps[name]
            if name == "mha":
                raise
            print(f"{name}: {str(e).splitlines()[0]}", file=sys.stderr)
    columns = ["what", "step ms", "to our mha", "quartiles", "tokens/s", "MFU"]
    title = (
        f"training step, batch {args.batch} x {args.context}, width {args.width}, {args.layers} layers, {precision}, "
    )
    title += "ours compiled" if compiled else "nothing compiled"
    report = Report(title, args.json, args.device, columns)
    times = in_turns(steps, args.device, args.repeats, warmup=3)
    peak = matmul_flops_per_s(args.device, dtype)
    for name, column in times.items():
        found, low, high = ratio(column, times["mha"])
        speed = inputs.numel() / statistics.median(column)
        flops = 3 * modules.get(name, modules["mha"]).model.flops_per_token(args.context)
        row = {
            "what": name,
            "step ms": spread(column),
            "to our mha": f"{found:.2f}",
            "quartiles": f"{low:.2f}-{high:.2f}",
        }
        report.add(**row, **{"tokens/s": f"{speed:,.0f}", "MFU": f"{speed * flops / peak:.0%}"})
    report.show()
    print(f"a large matrix product in {precision}: {peak / 1e12:.2f} TFLOP/s")


if __name__ == "__main__":
    main()
