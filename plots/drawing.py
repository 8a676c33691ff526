"""What the figures share: what a figure is, its panels, and the sentences that differences between variants make.

A figure is a file in plots/figures: `rows` turns a study into the rows of its CSV (or says why it cannot), and `draw`
draws those rows and nothing else, so a figure's CSV is exactly what it shows."""

from collections.abc import Callable
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from plots import style
from plots.results import Study, Variant, mean
from plots.tables import Table

Rows = list[dict]
Findings = list[tuple[str, str]]  # (what it is about, what the numbers say)

MANY = 6  # lines in one panel that a reader can still follow


class NotInResults(Exception):
    """Raised by `rows`: the results hold nothing for this figure; the message says what is missing."""


@dataclass(frozen=True)
class Drawing:
    name: str
    order: int  # of the figures in the report
    title: str
    rows: Callable[[Study], Rows]
    draw: Callable[[Rows, Study, float], Figure]  # (rows, study, page width in inches)
    caption: Callable[[Study, Rows], str]
    findings: Callable[[Study], Findings] = lambda study: []  # what this quantity tells, drawn or not
    table: Callable[[Study], Table | None] = lambda study: None
    long_tables: Callable[[Study], list[Table]] = lambda study: []  # in a file of their own, folded up in the report


def named(variant: Variant) -> dict:
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
    """Limits for an axis of losses. They span 1 % at least, or the figure would blow differences far below seed noise
    up to its full height."""
    spare = max(0.0, 0.01 * high - (high - low)) / 2
    margin = 0.16 * (high - low + 2 * spare)
    return low - spare - margin, high + spare + margin


def is_narrow(width: float) -> bool:
    return width < 5


def new_figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def panels(width: float, count: int, narrow: float, wide: float, across: tuple[int, int] = (2, 3), **shared):
    """(figure, its axes): `count` panels, `narrow` or `wide` inches high, at most `across` of them in a row."""
    height, most = (narrow, across[0]) if is_narrow(width) else (wide, across[1])
    columns = min(count, 2 if count == 4 else most, most)
    lines = -(-count // columns)
    fig = new_figure(width, 0.3 + lines * height)
    axes = list(fig.subplots(lines, columns, squeeze=False, **shared).flat)
    for ax in axes[count:]:
        ax.remove()
    return fig, axes[:count]


def panel_inches(ax: Axes) -> float:
    """About how wide the panel is drawn, for the number of ticks that it has room for."""
    return ax.figure.get_figwidth() / ax.get_subplotspec().get_gridspec().ncols - 0.6


def dot_name(name: str) -> str:
    return style.wrapped(name, 20)


def row_inches(names: list[str], least: float) -> float:
    """How high a row of `dot_axis` must be."""
    return max(least, 0.34) if any("\n" in dot_name(name) for name in names) else least


def dot_axis(ax: Axes, names: list[str]) -> None:
    """A y axis with a row for each name, the first on top."""
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


def by_panel(rows: Rows, study: Study) -> list[tuple[str, Rows]]:
    """(title, rows): a panel a size, and a panel a family where a size has more variants than a panel can show."""
    sizes = grouped(rows, "size")
    crowded = any(len(grouped(group, "label")) > MANY for group in sizes.values())
    found = []
    for size, group in sizes.items():
        for family, part in grouped(group, "family").items() if crowded else [("", group)]:
            title = ", ".join(filter(None, (family, study.size_title(size) if size and not family else size)))
            found.append((style.wrapped(title, 30), part))
    return found


def sizes_caption(study: Study) -> str:
    """What panels of several sizes are; empty where there is one."""
    if len(study.sizes) == 1:
        return ""
    of = f" {len(study.shown_sizes)} of {len(study.sizes)} sizes." if len(study.sizes) > len(study.shown_sizes) else ""
    return f" Panels by model size (in brackets: parameters).{of}"


def legend_entries(rows: Rows, study: Study, linestyle=None) -> list:
    """A (handle, name) for each variant, whatever its size."""
    shown = {study.labels[row["label"]].short: study.labels[row["label"]].look for row in rows}
    return [(look.handle(linestyle), style.wrapped(name)) for name, look in shown.items()]


def loss_axis_name(study: Study) -> str:
    return f"validation bits per byte\n({study.seeds_text})"


def draw_differences(ax: Axes, x: str, lines: dict[str, Rows], study: Study, aside: float) -> None:
    """Differences to the baseline against column `x`, a line for each group of rows; those with intervals stand side by
    side, a factor `aside` apart."""
    if all(row["difference_low"] is None for group in lines.values() for row in group):
        aside = 1.0
    for index, group in enumerate(lines.values()):
        look = study.labels[group[0]["label"]].look
        xs = [row[x] * aside ** (index - (len(lines) - 1) / 2) for row in group]
        for at, row in zip(xs, group, strict=True):
            if row["difference_low"] is not None:
                bar = [row["difference_low"], row["difference_high"]]
                ax.plot([at, at], bar, color=look.color, linewidth=0.7, zorder=2)
        differences = [row["difference"] for row in group]
        ax.plot(xs, differences, linestyle=look.line, markersize=3.4, zorder=3, **look.marks())
    ax.axhline(0, color=style.GREY, linewidth=0.6, zorder=1)


def interval_caption(study: Study, rows: Rows, low: str = "difference_low", bars: str = "Bars") -> str:
    """What the bars of drawn differences are; without any, what that means."""
    counts = sorted({row["difference_seeds"] for row in rows if row[low] is not None})
    if not counts and study.seeds[1] > 1 and not any(row["difference_seeds"] for row in rows):
        return "No intervals: nothing is compared."
    if not counts:
        seed = "one seed in common" if study.seeds[1] > 1 else "one seed"
        return f"No intervals: with {seed} nothing can be concluded from these differences."
    n = f"n = {counts[0]}" if len(counts) == 1 else f"n = {counts[0]} to {counts[-1]}"
    levels = " / ".join(f"{level:g}" for level in study.levels)
    return f"{bars}: {levels} % intervals (Student, paired by seed, {n}), each by itself: of many, some mislead."


def difference_findings(study: Study, metric: str, about: str, quality: str, unit: str) -> Findings:
    """A sentence for each comparison with an interval, and one for those of a single seed."""
    found, single = [], {}
    for each in (each for each in study.comparisons if each.metric == metric):
        if each.mean is None:
            found.append(f"{each.label}: no finite {quality} to compare with {each.baseline}.")
        elif each.low is None:
            single.setdefault(each.baseline, []).append(f"{each.label} {each.mean:+.4f}")
        elif each.separable:
            found.append(
                f"{each.label} has a {each.verdict} {quality} than {each.baseline}: {each.mean:+.4f} {unit} "
                f"({each.interval})."
            )
        else:
            found.append(
                f"{each.label}: not separable from {each.baseline}: {each.mean:+.4f} {unit} ({each.interval}); at this "
                f"level a difference larger than {max(abs(each.low), abs(each.high)):.4f} is excluded."
            )
    for baseline, said in single.items():
        found.append(
            f"Nothing can be concluded about which variant has the better {quality}: one seed. Seen were, against "
            f"{baseline}, {', '.join(said)} {unit} (n = 1, no intervals)."
        )
    compared = {each.label for each in study.comparisons if each.metric == metric}
    for variant in study.variants:
        if variant.label not in {variant.baseline, *compared} and variant.values(f"loss.{metric}"):
            found.append(f"{variant.label} is not compared: it has no seed in common with {variant.baseline}.")
    return [(about, sentence) for sentence in found]
