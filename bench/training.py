"""A training step, forward, backward and optimiser: each variant of ours, and transformers' model of the first's shape.

    uv run python bench/training.py
    uv run python bench/training.py --context 1024 --batch 32 --variants mha "gqa kv_heads=4"

Same shape, batch and precision, and the same AdamW with clipping. Ratios are to the first variant's step. MFU is the
share of the rate of a large matrix product, measured here. Ours is compiled where there is a C++ compiler, as in longer
runs.
"""

# Before torch, whose threads it tells how to wait.
from pairs import Report, in_turns, model_parser, options, ratio, said, spread

# isort: split

import statistics
import sys
import time

import torch
from peers import peer

from archs.cpu.building import compiler
from train.machine import matmul_flops_per_s, resolve_precision
from train.module import LanguageModel, adamw


def main() -> None:
    torch._dynamo.config.recompile_limit = 100  # several models in one process
    made = model_parser(__doc__.splitlines()[0], batch=16, context=256, precision="auto", repeats=9)
    made.add_argument("--no-compile", action="store_true", help="ours as short runs are trained, not compiled")
    made.add_argument("--seconds", type=int, help="leave out what has not begun to compile after so many")
    made.add_argument("--compiled-peer", action="store_true", help="transformers' through torch.compile, too")
    args = made.parse_args()
    compiled = bool(compiler()) and not args.no_compile
    precision = resolve_precision(args.precision)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    inputs = torch.randint(args.vocab_size, (args.batch, args.context), device=args.device)
    targets = torch.randint(args.vocab_size, (args.batch, args.context), device=args.device)
    modules: dict[str, LanguageModel] = {}
    for name in args.variants:
        modules[name] = LanguageModel(*options(name, args), tokens=1).to(args.device).train()
    baseline = args.variants[0]
    theirs = peer(modules[baseline].model)

    def ours(module: LanguageModel):
        if compiled:
            module.compile_parts()
        return stepper(lambda: module.mean_nats(inputs, targets), module)

    def stepper(loss, model: torch.nn.Module):
        optimizer = adamw(model, lr=1e-4, weight_decay=0.1)

        def step() -> None:
            with torch.autocast(args.device, dtype, enabled=precision == "bf16"):
                value = loss()
            value.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return step

    steps = {baseline: ours(modules[baseline])}
    if theirs:
        name = f"transformers {type(theirs).__name__.removesuffix('ForCausalLM')}"
        theirs.train()
        steps[name] = stepper(lambda: theirs(inputs, labels=targets, use_cache=False).loss, theirs)
        if args.compiled_peer:
            quick = torch.compile(theirs)
            steps[f"{name}, compiled"] = stepper(lambda: quick(inputs, labels=targets, use_cache=False).loss, theirs)
    steps |= {name: ours(module) for name, module in modules.items() if name != baseline}
    began = time.monotonic()
    for name in list(steps):
        try:
            if name != baseline and args.seconds and time.monotonic() - began > args.seconds:
                raise TimeoutError(f"left out after {args.seconds} s")
            steps[name]()
        except Exception as e:  # a peer that does not run here, or no memory for it
            if name == baseline:
                raise
            del steps[name]
            print(f"{name}: {said(e)}", file=sys.stderr)
    columns = ["what", "step ms", "to the first", "quartiles", "tokens/s", "MFU"]
    title = (
        f"training step, batch {args.batch} x {args.context}, width {args.width}, {args.layers} layers, {precision}, "
    )
    title += "ours compiled" if compiled else "nothing compiled"
    report = Report(title, args.json, args.device, columns)
    times = in_turns(steps, args.device, args.repeats, warmup=3)
    peak = matmul_flops_per_s(args.device, dtype)
    for name, column in times.items():
        found, low, high = ratio(column, times[baseline])
        speed = inputs.numel() / statistics.median(column)
        flops = 3 * modules.get(name, modules[baseline]).model.flops_per_token(args.context)
        row = {
            "what": name,
            "step ms": spread(column),
            "to the first": f"{found:.2f}",
            "quartiles": f"{low:.2f}-{high:.2f}",
        }
        report.add(**row, **{"tokens/s": f"{speed:,.0f}", "MFU": f"{speed * flops / peak:.0%}"})
    report.show()
    print(f"a large matrix product in {precision}: {peak / 1e12:.2f} TFLOP/s")


if __name__ == "__main__":
    main()
