"""Decode speed in tokens per second."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from plots import drawing as d
from plots import style
from plots.results import Results, number


def decode_rows(results: Results) -> d.Rows:
    rows = []
    for variant in results.shown_variants:
        for (batch, context), point in variant.decode.items():
            half = (number(point["token_ms_iqr"]) or 0.0) / 2 / point["token_ms"]
            speed, slowest = point["tokens_per_s"], point["slowest_tokens_per_s"]
            ends = {
                "tokens_per_s_low": speed / (1 + half) if slowest is None else slowest,
                "tokens_per_s_high": speed / max(1 - half, 0.1) if slowest is None else speed,  # finite, however noisy
            }
            how = {key: point[key] for key in ("memory_bound", "backend")}
            timed = {"seeds": point["seeds"], "batch": batch, "context": context, "tokens_per_s": speed}
            rows.append(d.named(variant) | timed | ends | how)
    if not rows:
        raise d.NotInResults("no decode timings")
    return rows


def as_dots(rows: d.Rows) -> bool:
    """True for a panel per context with a row per variant, instead of lines: where there is one context, and where
    there are more lines than a reader can distinguish, as long as the panels stay few."""
    crowded = any(len(d.grouped(part, "label")) > d.MANY for part in d.grouped(rows, "size").values())
    return len(d.grouped(rows, "context")) == 1 or (crowded and len(d.grouped(rows, "size", "batch", "context")) <= 6)


def draw_decode(rows: d.Rows, results: Results, width: float) -> Figure:
    dots = as_dots(rows)
    parts = d.grouped(rows, "size", "batch", "context") if dots else d.grouped(rows, "size", "batch")
    parts = dict(sorted(parts.items(), key=lambda item: (list(results.sizes).index(item[0][0]), item[0][1:])))
    names = list(dict.fromkeys(results.labels[row["label"]].short for row in rows))
    high = (0.35 + d.row_inches(names, 0.17) * len(names),) * 2 if dots else (1.65, 2.1)
    fig, axes = d.panels(width, len(parts), *high, across=(2, 3) if dots else (2, 4))
    for ax, (at, part) in zip(axes, parts.items(), strict=True):
        if dots:
            draw_dots(ax, part, results, names)
        else:
            draw_lines(ax, part, results)
        size, title = at[0], f"batch {at[1]}" + (f", context {style.tokens_text(at[2])}" if dots else "")
        ax.set_title(f"{size}, {title}" if size else title)
    d.label_outer(axes, "decode tokens/s" if dots else "context (tokens)", "" if dots else "decode tokens/s")
    entries = [] if dots else d.legend_entries(rows, results)
    if any(row["memory_bound"] is False for row in rows):
        hollow = Line2D([], [], color=style.GREY, marker="o", markerfacecolor="white", linestyle="none")
        entries.append((hollow, "hollow: not memory-bound"))
    if entries:
        style.add_legend(fig, entries)
    return fig


def draw_lines(ax: Axes, rows: d.Rows, results: Results) -> None:
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    for label, group in d.grouped(rows, "label").items():
        look = results.labels[label].look
        xs, ys = [row["context"] for row in group], [row["tokens_per_s"] for row in group]
        ax.errorbar(xs, ys, yerr=bars(group), fmt="none", ecolor=look.color, elinewidth=0.6, capsize=1.5, capthick=0.6)
        ax.plot(xs, ys, linestyle=look.line, color=look.color, linewidth=0.9)
        for x, y, row in zip(xs, ys, group, strict=True):
            ax.plot([x], [y], linestyle="none", **look.marks(hollow=row["memory_bound"] is False))
    ax.margins(0.08)
    style.measured_ticks(ax.xaxis, [row["context"] for row in rows], style.tokens_text, d.panel_inches(ax), 0.26)
    style.decimal_ticks(ax.yaxis)


def draw_dots(ax: Axes, rows: d.Rows, results: Results, names: list[str]) -> None:
    ax.set_xscale("log")
    for row in rows:
        look, y = results.labels[row["label"]].look, names.index(results.labels[row["label"]].short)
        look_of_bar = {"xerr": bars([row]), "ecolor": look.color, "elinewidth": 0.6, "capsize": 1.5, "capthick": 0.6}
        ax.errorbar([row["tokens_per_s"]], [y], fmt="none", **look_of_bar)
        marks = look.marks(hollow=row["memory_bound"] is False) | {"fillstyle": "full"}  # the row names the variant
        ax.plot([row["tokens_per_s"]], [y], linestyle="none", **marks)
    ax.margins(x=0.08)
    style.decimal_ticks(ax.xaxis, at_most=5)
    d.dot_axis(ax, names)
    ax.tick_params(axis="y", labelleft=ax.get_subplotspec().is_first_col())


def bars(rows: d.Rows) -> list[list[float]]:
    down = [row["tokens_per_s"] - row["tokens_per_s_low"] for row in rows]
    return [down, [row["tokens_per_s_high"] - row["tokens_per_s"] for row in rows]]


def decode_caption(results: Results, rows: d.Rows) -> str:
    flags = [row["memory_bound"] for row in rows]
    if None in flags:
        bound = "The results do not say which points are bound by memory."
    elif all(flags):
        bound = "Every point is bound by memory traffic."
    else:
        bound = (
            f"Hollow points ({flags.count(False)} of {len(flags)}): launches, Python or arithmetic set the time, or "
            "the processor's cache holds the model; they say nothing about what a smaller cache saves."
        )
    if as_dots(rows):
        against, axes, panel = "with the context in the cache", "logarithmic axis", "batch size and context"
    else:
        against, axes, panel = "against the context in the cache", "both axes are logarithmic", "batch size"
    if len(results.sizes) > 1:
        panel = f"model size and {panel}"
    bars = "Bars: interquartile range of the step time."
    if any(row["seeds"] > 1 for row in rows):
        bars = (
            "The fastest of several seeds, as speed depends on shapes and not on the seed; bars reach to the slowest."
        )
    return (
        f"Tokens decoded per second by the whole batch, prefill excluded, {against}; one panel per {panel}, each with "
        f"its own scale; {axes}. Medians. {bars} {bound}"
    )


FIGURE = d.Drawing("decode", 70, "Decode speed", decode_rows, draw_decode, decode_caption)
