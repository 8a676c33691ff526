"""The loss and its gradient: time, and memory beyond what there was, against PyTorch's and Liger Kernel's.

    uv run python bench/loss.py
    uv run python bench/loss.py --vocab-size 50304 --width 768 --batch 64 --context 1024

All logits at once would be as large as the last column says. Liger Kernel takes part on a GPU where it is installed.
"""

from pairs import DTYPE, DTYPES, Report, Step, parser, ratio, spread

import importlib.util
import statistics
import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from archs import ops


def torch_loss(x_BTW: Tensor, weight_VW: Tensor, targets_BT: Tensor) -> Tensor:
    return F.cross_entropy((x_BTW @ weight_VW.T).float().flatten(0, 1), targets_BT.flatten(), reduction="sum")


def peak_mib(step: Step, device: str) -> float:
    """Memory of a step beyond what there was, in MiB; of a CPU's process as Linux counts it."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with open("/proc/self/clear_refs", "w", encoding="ascii") as f:
        f.write("5")  # the peak begins anew
    before = _kib("VmRSS")
    step()
    return (_kib("VmHWM") - before) / 2**10


def _kib(name: str) -> int:
    with open("/proc/self/status", encoding="ascii") as f:
        return next(int(line.split()[1]) for line in f if line.startswith(name))


def main() -> int:
    made = parser(__doc__.splitlines()[0], vocab_size=16384, width=256, batch=16, context=256, dtype=DTYPE, repeats=9)
    args = made.parse_args()
    device, dtype = args.device, DTYPES[args.dtype]
    shape = f"batch {args.batch} x {args.context}, width {args.width}, vocabulary {args.vocab_size}, {args.dtype}"
    report = Report(
        f"loss and gradient, {shape}", args, ["what", "ms", "to ours", "quartiles", "peak MiB", "logits MiB"]
    )
    x = torch.randn(args.batch, args.context, args.width, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(args.vocab_size, args.width, device=device, dtype=dtype, requires_grad=True)
    targets = torch.randint(args.vocab_size, x.shape[:2], device=device)
    losses = {"ours": ops.unembed_cross_entropy, "torch": torch_loss}
    if device == "cuda" and ops.gains_by_compiling(torch.device(device), float("inf")):
        losses["ours"] = ops.compiled(ops.unembed_cross_entropy)  # as in training
        losses["torch, compiled"] = torch.compile(torch_loss, dynamic=False)
    if device == "cuda" and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        losses["liger"] = lambda x, weight, targets: liger(weight, x.flatten(0, 1), targets.flatten())

    def stepper(name: str) -> Step:
        def step() -> None:
            torch.autograd.grad(losses[name](x, weight, targets), (x, weight))

        return step

    def measure(name: str) -> None:
        steps = {"ours": stepper("ours"), name: stepper(name)}
        times = report.in_turns(steps, args.repeats)
        peak = statistics.median(peak_mib(steps[name], device) for _ in range(3))
        logits = args.batch * args.context * args.vocab_size * dtype.itemsize / 2**20
        report.add(name, spread(times[name]), *ratio(times[name], times["ours"]), f"{peak:.0f}", f"{logits:.0f}")

    return report.measure(losses, measure)


if __name__ == "__main__":
    sys.exit(main())
