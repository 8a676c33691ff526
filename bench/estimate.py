"""Time and memory of a study on a GPU, by arithmetic.

    uv run python bench/estimate.py hour small
    uv run python bench/estimate.py my-study.yaml

Nothing is run. A training step takes the time of its FLOPs at the rates below, and then that of its traffic at the
memory's bandwidth: what was counted in the compiled step of an MHA of 30M parameters, for each element of a layer's
output. Expect it to be off by 30 %.
"""

import argparse
import sys
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from train.meta import on_meta
from train.store import find_directory
from train.study import Study, parse_study, read_yaml
from train.tuning import LEAST_RATES
from train.variants import Variant, resolve_variants


class Chip(NamedTuple):
    """Rates that a program reaches, in half precision."""

    matmul: float  # FLOP/s
    attention: float
    bandwidth: float  # bytes/s
    memory: float  # bytes


CHIPS = {"H100": Chip(520e12, 250e12, 2.8e12, 80e9), "RTX 4090": Chip(130e12, 80e12, 0.92e12, 24e9)}
TRAFFIC = 208  # bytes that a step moves between kernels, for each token and element of a layer's output
STORED = 43  # bytes that it keeps for the gradient
LOGIT = 6, 2  # bytes that a logit moves, and keeps
RETENTION = 1.5, 1.3  # times as much of these in a model with gated retention
STATE = 16  # bytes of a parameter, its gradient and moments
EAGER = 2.0  # times as long without torch.compile
COMPILED_FROM = 2e15
COMPILE, COMPILED_AGAIN, START, POINT = 35.0, 12.0, 2.0, 1.5  # seconds; the last of a point of the decode grid


class Cost(NamedTuple):
    tokens_per_s: float
    memory: float  # bytes of one step
    seconds: float


def cost(variant: Variant, tokens: int, study: Study, chip: Chip) -> Cost:
    """Of one run of `tokens`, without what it takes to compile."""
    model, context = on_meta(variant.arch, variant.options), study.model["context"]
    o, batch = model.options, study.train.batch_tokens
    elements, (moved, kept) = o.layers * o.width, RETENTION if getattr(o, "self_decoder", "") == "gret" else (1, 1)
    scores, matmul = 3.5 * model.score_flops(context), 3 * model.matmul_flops()  # scores are computed again
    traffic = TRAFFIC * moved * elements + LOGIT[0] * o.vocab_size
    second = matmul / chip.matmul + scores / chip.attention + traffic / chip.bandwidth
    second *= 1 if is_compiled(variant, tokens) else EAGER
    memory = STATE * variant.params + batch * (STORED * kept * elements + LOGIT[1] * o.vocab_size)
    return Cost(1 / second, memory, START + tokens * second)


def is_compiled(variant: Variant, tokens: int) -> bool:
    return 6 * variant.params * tokens > COMPILED_FROM


def hours(study: Study, variants: list[Variant], chip: Chip) -> dict[str, float]:
    """Hours of each part of a study: tuning, compared runs, compiling, evaluation."""
    train, seconds = study.train, dict.fromkeys(("tuning", "training", "compiling", "evaluation"), 0.0)
    runs: list[tuple[str, Variant, int, int]] = []  # part, variant, tokens, how many
    smallest = min(variants, key=lambda variant: variant.work).size
    for variant in variants:
        runs.append(("training", variant, variant.tokens, len(study.seeds)))
        if isinstance(train.lr, list):
            tries = max(LEAST_RATES, len(train.lr)) * train.tuning_seeds  # at least
            share, small = train.tuning_share, variant.size == smallest
            if share is None or small:
                runs.append(("tuning", variant, variant.tokens, tries))
            if share:
                runs.append(("tuning", variant, int(share * variant.tokens), tries))
    for part, variant, tokens, count in runs:
        seconds[part] += count * cost(variant, tokens, study, chip).seconds
        if is_compiled(variant, tokens):
            first = COMPILE if part == "training" else COMPILED_AGAIN
            seconds["compiling"] += first + (count - 1) * COMPILED_AGAIN
    grid = study.eval.decode
    points = len(grid.batch) * len(grid.context) * len(study.seeds if grid.seeds is None else grid.seeds)
    for variant in variants:
        loss = study.eval.loss_tokens / cost(variant, 1, study, chip).tokens_per_s
        seconds["evaluation"] += 2 * POINT * points + len(study.seeds) * (START + loss)
    return {part: value / 3600 for part, value in seconds.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("studies", nargs="+", help="names of studies, or their YAML files")
    for name in parser.parse_args().studies:
        study_file = find_directory(name, None)[1]
        study = parse_study(read_yaml(study_file))
        variants = resolve_variants(study, study.tokenizer.vocab_size or 512, study_file.parent)
        table = Table("", "parameters", *(f"{chip}: {what}" for chip in CHIPS for what in ("tokens/s", "memory")))
        for variant in variants:
            cells = []
            for chip in CHIPS.values():
                each = cost(variant, variant.tokens, study, chip)
                pieces = (
                    f" in {-(-each.memory // (0.9 * chip.memory)):.0f} pieces"
                    if each.memory > 0.9 * chip.memory
                    else ""
                )
                cells += [f"{each.tokens_per_s:,.0f}", f"{each.memory / 1e9:.1f} GB{pieces}"]
            table.add_row(variant.label, f"{variant.params:,}", *cells)
        Console().print(table)
        for label, chip in CHIPS.items():
            parts = hours(study, variants, chip)
            text = ", ".join(f"{part} {60 * value:,.0f}" for part, value in parts.items())
            print(f"{name} on {label}: {60 * sum(parts.values()):,.0f} minutes ({text})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
