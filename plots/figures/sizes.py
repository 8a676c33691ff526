"""Loss by model size: whether a gap between variants persists as models grow."""

from itertools import chain

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from plots import drawing as d
from plots import style
from plots.results import Difference, Results, number
from plots.style import plain_text
from plots.tables import MISSING, Table

EQUAL = 1.3  # sizes whose parameters differ by less than this factor differ in the recipe, not in size


def size_rows(results: Results) -> d.Rows:
    if len(results.sizes) < 2:
        raise d.NotInResults("one model size")
    if are_equal(results):
        raise d.NotInResults("sizes of equal parameters")
    rows = []
    for variant in chain(*results.sizes.values()):
        params, loss = number(variant.first("params")), variant.mean("loss.val_bpb")
        if params and loss is not None:
            per_token, tokens = (number(variant.first(path)) for path in ("train.flops_per_token", "train_tokens"))
            cost = {"params": params, "train_flops": per_token * tokens if per_token and tokens else None}
            cost |= {"variant": variant.short, "val_bpb": loss}
            rows.append(d.named(variant) | cost | results.difference_row(variant, "val_bpb"))
    if not rows:
        raise d.NotInResults("no finite validation loss with parameter counts")
    return rows


def are_equal(results: Results) -> bool:
    counts = [count for variant in results.variants if (count := number(variant.first("params")))]
    return bool(counts) and max(counts) < EQUAL * min(counts)


def draw_sizes(rows: d.Rows, results: Results, width: float) -> Figure:
    has_flops = any(row["train_flops"] for row in rows)
    across = {"params": "parameters", "train_flops": "training FLOPs of the run"}
    shown = [("params", "val_bpb"), *([("train_flops", "val_bpb")] if has_flops else []), ("params", "difference")]
    fig, axes = d.panels(width, len(shown), 1.6, 2.4, across=(1, 3))
    lines = d.grouped(rows, "variant")
    for ax, (x, y) in zip(axes, shown, strict=True):
        ax.set_xscale("log")
        if y == "difference":
            compared = {name: [row for row in group if row[y] is not None] for name, group in lines.items()}
            d.draw_differences(ax, x, {name: group for name, group in compared.items() if group}, results, 1.03)
        else:
            for group in lines.values():
                look, known = results.labels[group[0]["label"]].look, [row for row in group if row[x]]
                ax.plot([row[x] for row in known], [row[y] for row in known], linestyle=look.line, **look.marks())
        ax.margins(0.1)
        style.decimal_ticks(ax.xaxis, lambda value: plain_text(value, 3), 4)
        ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        ax.set_xlabel(across[x])
        ax.set_ylabel("validation bits per byte" if y == "val_bpb" else "bits per byte\nabove the baseline")
    style.add_legend(fig, d.legend_entries(rows, results))
    return fig


def size_caption(results: Results, rows: d.Rows) -> str:
    baselines = ", ".join(
        dict.fromkeys(results.labels[v.baseline].short for v in results.variants if v.baseline in results.labels)
    )
    return (
        f"Validation bits per byte ({results.seeds_text}) against parameters and against the training FLOPs of the "
        f"run, and the difference to the baseline of the same size ({baselines}; zero line), paired by seed. "
        f"Horizontal axes are logarithmic. {d.interval_caption(results, rows)}"
    )


def size_findings(results: Results) -> d.Findings:
    """Sentences on `gap_changes`: whether a gap to the baseline grows or closes, with its interval, paired by seed."""
    sentences = []
    for entry in results.raw.get("gap_changes", []):
        change = Difference.of(entry)
        first, last = entry["sizes"]
        if change.low is None:
            verdict = "one seed, so nothing can be concluded from this change"
        elif change.separable:
            verdict = f"it is {change.verdict} at {last}"
        else:
            verdict = "this change cannot be separated from chance"
        sentences.append(
            f"{change.label}: from {first} to {last} its difference to {change.baseline} changes by {change.mean:+.4f} "
            f"bits per byte ({change.interval}): {verdict}."
        )
    return [("Gap by recipe" if are_equal(results) else "Gap by size", sentence) for sentence in sentences]


def difference_table(results: Results) -> Table | None:
    """Each variant's difference to the baseline at every size, None where there is one size or no comparison."""
    sizes = dict.fromkeys(variant.size for variant in results.variants)  # in the study's order
    if len(sizes) < 2 or not results.comparisons:
        return None
    metric = results.comparisons[-1].metric  # the last is the one that the study is about
    compared = [each for each in results.comparisons if each.metric == metric]
    cells: dict[str, dict[str, str]] = {}  # short label -> size
    for each in compared:
        variant = results.labels[each.label]
        cells.setdefault(variant.short, {})[variant.size] = difference_cell(each)
    rows = [[name, *(of_size.get(size, MISSING) for size in sizes)] for name, of_size in cells.items()]
    levels = " / ".join(f"{level:g} %" for level in sorted({100 * e.level for e in compared if e.low is not None}))
    bars = f"± half the width of the {levels} interval; *: separable from zero" if levels else "one seed: no intervals"
    note = f"Mean differences in {metric} to the baseline of the same size, paired by seed; {bars}."
    return Table(["variant", *sizes], rows, "l" + "r" * len(sizes), [note], "Difference to the baseline by size")


def difference_cell(each: Difference) -> str:
    if each.mean is None:
        return MISSING
    half = "" if each.low is None else f" ± {(each.high - each.low) / 2:.4f}"
    return f"{each.mean:+.4f}{half}{'*' if each.separable else ''}"


FIGURE = d.Drawing(
    "sizes", 20, "Model sizes",
    size_rows, draw_sizes, size_caption, size_findings, difference_table,
)  # fmt: skip
