"""Whether a gap between variants holds as models grow."""

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from plots import style
from plots.drawing import (
    Drawing,
    Findings,
    NotInResults,
    Rows,
    draw_differences,
    grouped,
    interval_caption,
    legend_entries,
    named,
    panels,
)
from plots.results import Difference, Study, number
from plots.style import plain_text


def size_rows(study: Study) -> Rows:
    if len(study.sizes) < 2:
        raise NotInResults("one model size")
    rows = []
    for variant in (variant for variants in study.sizes.values() for variant in variants):
        params, loss = number(variant.first("params")), variant.mean("loss.val_bpb")
        if params and loss is not None:
            each, tokens = (number(variant.first(path)) for path in ("train.flops_per_token", "train_tokens"))
            cost = {"params": params, "train_flops": each * tokens if each and tokens else None}
            cost |= {"variant": variant.short, "val_bpb": loss}
            rows.append(named(variant) | cost | study.difference_row(variant, "val_bpb"))
    if not rows:
        raise NotInResults("no finite validation loss with parameter counts")
    return rows


def draw_sizes(rows: Rows, study: Study, width: float) -> Figure:
    has_flops = any(row["train_flops"] for row in rows)
    across = {"params": "parameters", "train_flops": "training FLOPs of the run"}
    shown = [("params", "val_bpb"), *([("train_flops", "val_bpb")] if has_flops else []), ("params", "difference")]
    fig, axes = panels(width, len(shown), 1.6, 2.4, across=(1, 3))
    lines = grouped(rows, "variant")
    for ax, (x, y) in zip(axes, shown, strict=True):
        ax.set_xscale("log")
        if y == "difference":
            compared = {name: [row for row in group if row[y] is not None] for name, group in lines.items()}
            draw_differences(ax, x, {name: group for name, group in compared.items() if group}, study, 1.03)
        else:
            for group in lines.values():
                look, known = study.labels[group[0]["label"]].look, [row for row in group if row[x]]
                ax.plot([row[x] for row in known], [row[y] for row in known], linestyle=look.line, **look.marks())
        ax.margins(0.1)
        style.decimal_ticks(ax.xaxis, lambda value: plain_text(value, 3), 4)
        ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        ax.set_xlabel(across[x])
        ax.set_ylabel("validation bits per byte" if y == "val_bpb" else "bits per byte\nabove the baseline")
    style.add_legend(fig, legend_entries(rows, study))
    return fig


def size_caption(study: Study, rows: Rows) -> str:
    baselines = ", ".join(
        dict.fromkeys(study.labels[v.baseline].short for v in study.variants if v.baseline in study.labels)
    )
    return (
        f"Validation bits per byte ({study.seeds_text}) against parameters and against the training FLOPs of the run, "
        f"and the difference to the baseline of the same size ({baselines}; zero line), paired by seed. Horizontal "
        f"axes logarithmic. {interval_caption(study, rows)}"
    )


def size_findings(study: Study) -> Findings:
    """From `gap_changes`: whether a gap to the baseline grows or closes, by an interval of its own, paired by seed."""
    found = []
    for entry in study.raw.get("gap_changes") or []:
        change = Difference.of(entry)
        first, last = entry["sizes"]
        said = f"{change.label}: from {first} to {last} its difference to {change.baseline} changes by "
        said += f"{change.mean:+.4f} bits per byte ({change.interval}): "
        if change.low is None:
            said += "one seed, so nothing can be concluded about a trend."
        elif change.separable:
            said += f"it is {change.verdict} at the larger size."
        else:
            said += "no trend with size can be separated from chance."
        found.append(("Gap by size", said))
    return found


FIGURE = Drawing("sizes", 20, "Model sizes", size_rows, draw_sizes, size_caption, size_findings)
