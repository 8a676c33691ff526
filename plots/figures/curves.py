"""Loss while training."""

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from plots import style
from plots.drawing import (
    Drawing,
    NotInResults,
    Rows,
    by_panel,
    grouped,
    is_narrow,
    label_outer,
    legend_entries,
    loss_axis_name,
    named,
    panels,
    sizes_caption,
    spread,
    widened,
)
from plots.results import Study, number


def curve_rows(study: Study) -> Rows:
    rows = []
    for variant in (variant for variants in study.shown_sizes.values() for variant in variants):
        points: dict[int, list[float]] = {}
        for run in variant.runs:
            for point in run.get("curve") or []:
                if number(point.get("tokens")) is not None and number(point.get("val_bpb")) is not None:
                    points.setdefault(point["tokens"], []).append(point["val_bpb"])
        for tokens, values in sorted(points.items()):
            rows.append(named(variant) | {"tokens": tokens} | spread(values, "val_bpb") | {"seeds": len(values)})
    if not rows:
        raise NotInResults("no training curves (`curve`)")
    return rows


def last_third(rows: Rows) -> Rows:
    found = []
    for group in grouped(rows, "size").values():
        late = [row for row in group if row["tokens"] >= 2 / 3 * max(row["tokens"] for row in group)]
        found += late if len({row["tokens"] for row in late}) > 1 else []
    return found


def draw_curves(rows: Rows, study: Study, width: float) -> Figure:
    """All of training, and beside it the last third on a scale of its own: there the curves come apart. A panel of the
    last third for each family or size where one could not be read."""
    late = by_panel(last_third(rows), study)
    several = len(late) > 1
    shown = [("whole training", rows)] + [(title if several else "last third", part) for title, part in late]
    fig, axes = panels(width, len(shown), 1.55 if not several else 1.35, 2.3 if not several else 1.8)
    for ax, (title, part) in zip(axes, shown, strict=True):
        for index, (label, group) in enumerate(grouped(part, "label").items()):
            look = study.labels[label].look
            xs, low, high = ([row[key] for row in group] for key in ("tokens", "val_bpb_min", "val_bpb_max"))
            every = max(1, len(xs) // 5)
            marks = look.marks() | {"markevery": (index % every, every), "linestyle": look.line}
            ax.plot(xs, [row["val_bpb"] for row in group], markersize=3.2, **marks)
            if low != high:
                ax.fill_between(xs, low, high, color=look.color, alpha=0.14, linewidth=0)
        ax.margins(0.04)
        ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        ax.xaxis.set_major_locator(MaxNLocator(3 if is_narrow(width) or several else 5, steps=[1, 2, 4, 5, 10]))
        ax.xaxis.set_major_formatter(lambda value, _: style.plain_text(value))
        ax.set_title(title)
    sizes = grouped([row for _, part in late for row in part], "size")
    for ax, (_, part) in zip(axes[1:], late, strict=True):  # families of a size share a scale, to be compared
        same = sizes[part[0]["size"]]
        ax.set_ylim(*widened(min(row["val_bpb_min"] for row in same), max(row["val_bpb_max"] for row in same)))
    label_outer(axes, "training tokens", "val bits/byte" if several else loss_axis_name(study))
    style.add_legend(fig, legend_entries(rows, study))
    return fig


def curve_caption(study: Study, rows: Rows) -> str:
    band = "" if study.seeds[1] == 1 else "; bands reach from the lowest to the highest seed"
    parts = len(by_panel(last_third(rows), study))
    late = "; right: the last third, on a scale of its own" if parts == 1 else ""
    if parts > 1:
        late = "; first all of training, then its last third, those of one model size on one scale"
    return (
        f"Validation bits per byte against training tokens seen ({study.seeds_text}{band}){late}. All variants of a "
        f"seed see the same tokens in the same order.{sizes_caption(study)}"
    )


FIGURE = Drawing("curves", 80, "Training", curve_rows, draw_curves, curve_caption)
