"""A training step (forward, backward, optimiser) of each variant, and of transformers' model of the first one's shape.

    uv run python bench/training.py
    uv run python bench/training.py --context 1024 --batch 32 --variants mha "gqa kv_heads=4"

All have the same shape, batch and precision, and the same AdamW with clipping. Each is timed in turns with the first
variant, and its ratio is to that one's step.
MFU is the share of the rate of a large matrix product, measured here. Variants are compiled where there is a C++
compiler, as in longer runs.
"""

from pairs import DTYPES, Report, Step, model_parser, options, ratio, spread

import statistics
import sys

import torch
from peers import peer, peer_name

from archs.ops import gains_by_compiling
from train.machine import matmul_flops_per_s, resolve_precision
from train.module import LanguageModel
from train.optimizers import adamw


def main() -> int:
    torch._dynamo.config.recompile_limit = 100  # several models in one process
    made = model_parser(__doc__.splitlines()[0], batch=16, context=256, precision="auto", repeats=9)
    made.add_argument("--no-compile", action="store_true", help="train the variants as short runs do, not compiled")
    made.add_argument("--compiled-peer", action="store_true", help="time transformers' model compiled, too")
    args = made.parse_args()
    compiles = not args.no_compile and gains_by_compiling(torch.device(args.device), float("inf"))
    precision = resolve_precision(args.precision)
    title = f"training step, batch {args.batch} x {args.context}, width {args.width}, {args.layers} layers, {precision}"
    title += ", variants compiled" if compiles else ", nothing compiled"
    report = Report(title, args, ["what", "step ms", "to the first", "quartiles", "tokens/s", "MFU"])
    inputs, targets = torch.randint(args.vocab_size, (2, args.batch, args.context), device=args.device)

    def stepper(model: torch.nn.Module, loss: Step) -> Step:
        optimizer = adamw(model, lr=1e-4, weight_decay=0.1)

        def step() -> None:
            with torch.autocast(args.device, DTYPES[precision], enabled=precision == "bf16"):
                value = loss()
            value.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return step

    def prepare(variant: str) -> tuple[LanguageModel, Step]:
        module = LanguageModel(*options(variant, args), tokens=1).to(args.device).train()
        if compiles:
            module.compile_parts()
        return module, stepper(module, lambda: module.mean_nats(inputs, targets))

    first = args.variants[0]
    first_module, first_step = prepare(first)
    peers = {}
    if other := peer(first_module.model):
        peers[peer_name(other)] = other.train()
        if args.compiled_peer:
            peers[f"{peer_name(other)}, compiled"] = torch.compile(other)
    peak = matmul_flops_per_s(args.device, DTYPES[precision])

    def measure(name: str) -> None:
        module, step = first_module, first_step
        if model := peers.get(name):
            step = stepper(model, lambda: model(inputs, labels=targets, use_cache=False).loss)
        elif name != first:
            module, step = prepare(name)
        times = report.in_turns({first: first_step, name: step}, args.repeats)
        tokens_per_s = inputs.numel() / statistics.median(times[name])
        flops = 3 * module.model.flops_per_token(args.context) * tokens_per_s
        mfu = f"{flops / peak:.0%} of {peak / 1e12:.2f} TFLOP/s"
        report.add(name, spread(times[name]), *ratio(times[name], times[first]), f"{tokens_per_s:,.0f}", mfu)

    return report.measure([first, *peers, *args.variants[1:]], measure)


if __name__ == "__main__":
    sys.exit(main())
