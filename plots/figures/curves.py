"""Validation loss during training."""

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from plots import drawing as d
from plots import style
from plots.results import Results, number


def curve_rows(results: Results) -> d.Rows:
    rows = []
    for variant in results.shown_variants:
        points: dict[int, list[float]] = {}
        for run in variant.runs:
            for point in run.get("curve") or []:
                if number(point.get("tokens")) is not None and number(point.get("val_bpb")) is not None:
                    points.setdefault(point["tokens"], []).append(point["val_bpb"])
        for tokens, values in sorted(points.items()):
            rows.append(d.named(variant) | {"tokens": tokens} | d.spread(values, "val_bpb") | {"seeds": len(values)})
    if not rows:
        raise d.NotInResults("no training curves (`curve`)")
    return rows


def last_third(rows: d.Rows) -> d.Rows:
    late_rows = []
    for group in d.grouped(rows, "size").values():
        late = [row for row in group if row["tokens"] >= 2 / 3 * max(row["tokens"] for row in group)]
        if len({row["tokens"] for row in late}) > 1:
            late_rows += late
    return late_rows


def draw_curves(rows: d.Rows, results: Results, width: float) -> Figure:
    """Draw all of training and, on another scale, its last third, where the curves separate: in one panel, or in one
    for each family or size where one would be too crowded."""
    late = d.by_panel(last_third(rows), results)
    several = len(late) > 1
    shown = [("whole training", rows)] + [(title if several else "last third", part) for title, part in late]
    fig, axes = d.panels(width, len(shown), 1.55 if not several else 1.35, 2.3 if not several else 1.8)
    for ax, (title, part) in zip(axes, shown, strict=True):
        for index, (label, group) in enumerate(d.grouped(part, "label").items()):
            look = results.labels[label].look
            xs, low, high = ([row[key] for row in group] for key in ("tokens", "val_bpb_min", "val_bpb_max"))
            every = max(1, len(xs) // 5)
            marks = look.marks() | {"markevery": (index % every, every), "linestyle": look.line}
            ax.plot(xs, [row["val_bpb"] for row in group], markersize=3.2, **marks)
            if low != high:
                ax.fill_between(xs, low, high, color=look.color, alpha=0.14, linewidth=0)
        ax.margins(0.04)
        ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        ax.xaxis.set_major_locator(MaxNLocator(3 if d.is_narrow(width) or several else 5, steps=[1, 2, 4, 5, 10]))
        ax.xaxis.set_major_formatter(lambda value, _: style.plain_text(value))
        ax.set_title(title)
    sizes = d.grouped([row for _, part in late for row in part], "size")
    for ax, (_, part) in zip(axes[1:], late, strict=True):  # families of a size share a scale, to be compared
        same = sizes[part[0]["size"]]
        ax.set_ylim(*d.widened(min(row["val_bpb_min"] for row in same), max(row["val_bpb_max"] for row in same)))
    d.label_outer(axes, "training tokens", d.tuning_axis_name(results, results.seeds_text, several))
    style.add_legend(fig, d.legend_entries(rows, results))
    return fig


def curve_caption(results: Results, rows: d.Rows) -> str:
    band = "" if results.seeds[1] == 1 else "; bands reach from the lowest to the highest seed"
    parts = len(d.by_panel(last_third(rows), results))
    late = ""
    if parts == 1:
        late = "; right: the last third on another scale"
    elif parts > 1:
        late = "; first all of training, then its last third, with one scale for each model size"
    text = "Validation bits per byte"
    if results.has_tuning_text:
        text = "Bits per byte of the tuning text, which no comparison uses,"
    return (
        f"{text} against training tokens seen ({results.seeds_text}{band}){late}. All variants of a "
        f"seed see the same tokens in the same order.{d.sizes_caption(results)}"
    )


FIGURE = d.Drawing("curves", 80, "Training", curve_rows, draw_curves, curve_caption)
