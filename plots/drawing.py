"""What all figures share: their interface, their panels, and the sentences about differences between variants.

A figure is a file in plots/figures. `rows` makes the rows of its CSV from the results (or says why it cannot), and
`draw` draws those rows and nothing else, so that a figure's CSV is exactly what it shows."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations, product

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from plots import style
from plots.results import Results, VariantResults, mean
from plots.tables import Table

Rows = list[dict]
Findings = list[tuple[str, str]]  # (what it is about, what the numbers say)

MANY = 6  # lines that a reader can still follow in one panel
APART = 5  # points of 1/72 inch between bars that would cover each other


class NotInResults(Exception):
    """Raised by `rows`: the results hold nothing for this figure; the message says what is missing."""


@dataclass(frozen=True)
class Drawing:
    name: str
    order: int  # its place among the figures of the report
    title: str
    rows: Callable[[Results], Rows]
    draw: Callable[[Rows, Results, float], Figure]  # (rows, results, page width in inches)
    caption: Callable[[Results, Rows], str]
    findings: Callable[[Results], Findings] = lambda results: []  # sentences, also where nothing could be drawn
    tables: tuple[Callable[[Results], Table | None], ...] = ()
    long_tables: Callable[[Results], list[Table]] = lambda results: []  # in their own file, closed in the report


def named(variant: VariantResults) -> dict:
    names = {key: getattr(variant, key) for key in ("label", "arch", "family", "size")}
    return names | {"seeds": variant.seeds}


def spread(values: list[float], name: str) -> dict:
    """Mean, lowest and highest over seeds."""
    return {name: mean(values), f"{name}_min": min(values), f"{name}_max": max(values)}


def grouped(rows: Rows, *keys: str) -> dict:
    """Rows by the value of one key, or by a tuple of several."""
    groups: dict = {}
    for row in rows:
        group = row[keys[0]] if len(keys) == 1 else tuple(row[key] for key in keys)
        groups.setdefault(group, []).append(row)
    return groups


def widened(low: float, high: float) -> tuple[float, float]:
    """Limits for an axis of losses. They span at least 1 %, so that differences far below seed noise do not fill the
    figure's full height."""
    spare = max(0.0, 0.01 * high - (high - low)) / 2
    margin = 0.16 * (high - low + 2 * spare)
    return low - spare - margin, high + spare + margin


def is_narrow(width: float) -> bool:
    return width < 5


def new_figure(width: float, height: float) -> Figure:
    return Figure(figsize=style.fixed_size() or (width, height), layout="constrained")


def panels(width: float, count: int, narrow: float, wide: float, across: tuple[int, int] = (2, 3), **shared):
    """(figure, its axes): `count` panels that are `narrow` or `wide` inches high on a narrow or wide page, with at most
    `across` of them in a row."""
    height, most = (narrow, across[0]) if is_narrow(width) else (wide, across[1])
    columns = min(count, 2 if count == 4 else most, most)
    lines = -(-count // columns)
    fig = new_figure(width, 0.3 + lines * height)
    axes = list(fig.subplots(lines, columns, squeeze=False, **shared).flat)
    for ax in axes[count:]:
        ax.remove()
    return fig, axes[:count]


def panel_inches(ax: Axes) -> float:
    """The approximate width of the panel in inches, which decides how many ticks it has room for."""
    return ax.figure.get_figwidth() / ax.get_subplotspec().get_gridspec().ncols - 0.6


def dot_name(name: str) -> str:
    return style.wrapped(name, 20)


def row_inches(names: list[str], least: float) -> float:
    """The height of a row of `dot_axis` in inches."""
    return max(least, 0.34) if any("\n" in dot_name(name) for name in names) else least


def dot_axis(ax: Axes, names: list[str]) -> None:
    """Give the panel a y axis with a row for each name, the first on top."""
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.set_yticks(range(len(names)), map(dot_name, names))
    ax.tick_params(axis="y", length=0)
    ax.yaxis.grid(False)


def label_outer(axes: list[Axes], x: str, y: str) -> None:
    """Name the y axis in the first column, the x axis of the lowest panel of each column."""
    lowest = {ax.get_subplotspec().colspan.start: ax for ax in axes}
    for ax in axes:
        if ax.get_subplotspec().colspan.start == 0:
            ax.set_ylabel(y)
        if ax in lowest.values():
            ax.set_xlabel(x)


def by_panel(rows: Rows, results: Results) -> list[tuple[str, Rows]]:
    """(title, rows) of a panel for each size, or for each family where a size has more variants than a panel can
    show."""
    sizes = grouped(rows, "size")
    crowded = any(len(grouped(group, "label")) > MANY for group in sizes.values())
    parts = []
    for size, group in sizes.items():
        for family, part in grouped(group, "family").items() if crowded else [("", group)]:
            title = ", ".join(filter(None, (family, results.size_title(size) if size and not family else size)))
            parts.append((style.wrapped(title, 30), part))
    return parts


def sizes_caption(results: Results) -> str:
    """A sentence on the panels where there are several sizes, else empty."""
    if len(results.sizes) == 1:
        return ""
    text = " Panels by model size (in brackets: parameters)."
    if len(results.sizes) > len(results.shown_sizes):
        text += f" {len(results.shown_sizes)} of {len(results.sizes)} sizes are shown."
    return text


def legend_entries(rows: Rows, results: Results) -> list:
    """A (handle, name) for each variant, whatever its size."""
    shown = {results.labels[row["label"]].short: results.labels[row["label"]].look for row in rows}
    return [(look.handle(), style.wrapped(name)) for name, look in shown.items()]


def loss_axis_name(results: Results) -> str:
    return f"bits per byte of held-out text\n({results.seeds_text})"


def tuning_axis_name(results: Results, seeds: str, is_short: bool) -> str:
    """The name of an axis of losses as curves and tuning measure them."""
    if is_short:
        return "tune bits/byte" if results.has_tuning_text else "val bits/byte"
    text = "bits per byte of tuning text" if results.has_tuning_text else "validation bits per byte"
    return f"{text}\n({seeds})"


def draw_differences(
    ax: Axes, x: str, lines: dict[str, Rows], results: Results, aside: float, y: str = "difference", base: float = 0
) -> None:
    """Draw differences to the baseline, which is at `base`, against column `x`, a line for each group of rows. Lines
    with intervals are moved apart by a factor `aside`, so that no interval hides another."""
    if all(row[f"{y}_low"] is None for group in lines.values() for row in group):
        aside = 1.0
    for index, group in enumerate(lines.values()):
        look = results.labels[group[0]["label"]].look
        xs = [row[x] * aside ** (index - (len(lines) - 1) / 2) for row in group]
        for at, row in zip(xs, group, strict=True):
            if row[f"{y}_low"] is not None:
                ax.plot([at, at], [row[f"{y}_low"], row[f"{y}_high"]], color=look.color, linewidth=0.7, zorder=2)
        ax.plot(xs, [row[y] for row in group], linestyle=look.line, markersize=3.4, zorder=3, **look.marks())
    ax.axhline(base, color=style.GREY, linewidth=0.6, zorder=1)


def side_by_side(ax: Axes, points: Rows, value: str, *ends: str) -> Rows:
    """The rows with a new `x`, on a logarithmic axis whose limits are set, for those that would cover each other: where
    markers at the `value`, or bars between the `ends`, overlap, they stand APART around their common middle, in the
    order of bytes and value."""
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    apart, marker = APART * math.log2(right / left) / (72 * panel_inches(ax)), (top - bottom) / 25

    def order(row: dict) -> tuple[float, float]:
        return row["kv_bytes_per_token"], row[value]

    def spread(block: Rows) -> Rows:
        left = sum(math.log2(row["x"]) for row in block) / len(block) - apart * (len(block) - 1) / 2
        return [row | {"x": 2 ** (left + n * apart)} for n, row in enumerate(sorted(block, key=order))]

    def reach(row: dict) -> tuple[float, float]:
        bar = [row[key] for key in ends if row[key] is not None]
        return min([row[value] - marker / 2, *bar]), max([row[value] + marker / 2, *bar])

    def covers(pair: tuple[dict, dict]) -> bool:
        (lows, highs), (left, right) = zip(*map(reach, pair), strict=True), sorted(pair, key=order)
        return max(lows) < min(highs) and math.log2(right["x"] / left["x"]) < 0.99 * apart

    blocks = [[row] for row in points]
    while True:
        pairs = combinations(blocks, 2)
        pair = next((pair for pair in pairs if any(map(covers, product(*map(spread, pair))))), None)
        if not pair:
            xs = {row["label"]: row["x"] for block in blocks if len(block) > 1 for row in spread(block)}
            return [row | {"x": xs.get(row["label"], row["x"])} for row in points]
        blocks = [block for block in blocks if block not in pair] + [pair[0] + pair[1]]


def interval_caption(results: Results, rows: Rows, low: str = "difference_low", bars: str = "Bars") -> str:
    """A sentence on the bars of the drawn differences, or on what their absence means."""
    counts = sorted({row["difference_seeds"] for row in rows if row[low] is not None})
    if not counts and results.seeds[1] > 1 and not any(row["difference_seeds"] for row in rows):
        return "No intervals, as nothing is compared."
    if not counts:
        seed = "one seed in common" if results.seeds[1] > 1 else "one seed"
        return f"No intervals: with {seed} nothing can be concluded from these differences."
    n = f"n = {counts[0]}" if len(counts) == 1 else f"n = {counts[0]} to {counts[-1]}"
    levels = " / ".join(f"{level:g}" for level in results.levels)
    text = f"{bars}: {levels} % intervals (Student, paired by seed, {n})"
    return f"{text}, each for one comparison: among many, some mislead."


def difference_findings(results: Results, metric: str, about: str, quality: str, unit: str) -> Findings:
    """A sentence for each comparison with an interval, and one for all comparisons of a single seed."""
    sentences, single = [], {}
    compared = [each for each in results.comparisons if each.metric == metric]
    for each in compared:
        cost = results.cost_of_rates(each)
        rates = "" if cost is None else f"; a rate off by a factor of 1.41 would cost up to {cost:.4f}"
        if each.mean is None:
            sentences.append(f"{each.label}: no finite {quality} to compare with {each.baseline}.")
        elif each.low is None:
            single.setdefault(each.baseline, []).append(
                f"{each.label} {each.mean:+.4f}{'' if cost is None else f' ({cost:.4f})'}"
            )
        elif each.separable:
            if each.holds_together is False:
                rates = f"; not separable where all comparisons are to hold together{rates}"
            sentences.append(
                f"{each.label} has a {each.verdict} {quality} than {each.baseline}: {each.mean:+.4f} {unit} "
                f"({each.interval}){rates}."
            )
        else:
            sentences.append(
                f"{each.label}: not separable from {each.baseline}: {each.mean:+.4f} {unit} ({each.interval}); at this "
                f"level a difference larger than {max(abs(each.low), abs(each.high)):.4f} is excluded{rates}."
            )
    known = any(results.cost_of_rates(each) is not None for each in compared)
    costs = "; in brackets, what a rate off by a factor of 1.41 would cost at most" if known else ""
    for baseline, texts in single.items():
        sentences.append(
            f"Nothing can be concluded about which variant has the better {quality}: one seed. Differences to "
            f"{baseline}, without intervals (n = 1): {', '.join(texts)} {unit}{costs}."
        )
    labels = {each.label for each in compared}
    for variant in results.variants:
        if variant.label not in {variant.baseline, *labels} and variant.values(f"loss.{metric}"):
            sentences.append(f"{variant.label} is not compared: it has no seed in common with {variant.baseline}.")
    return [(about, sentence) for sentence in sentences]
