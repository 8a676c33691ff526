"""Time per token with the cache and without: why the cache exists."""

from functools import partial

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from plots import style
from plots.drawing import Drawing, NotInResults, Rows, dot_axis, named, new_figure, row_inches
from plots.results import Study


def recompute_rows(study: Study) -> Rows:
    rows = []
    for variant in study.variants:
        both = [variant.values(f"recompute.{key}") for key in ("cached_ms", "recomputed_ms")]
        if all(both) and (fastest := [min(times) for times in both]) and min(fastest) > 0:
            cached, recomputed = fastest
            at = {key: variant.first(f"recompute.{key}") for key in ("batch", "context")}
            times = {"cached_ms": cached, "recomputed_ms": recomputed, "speed_up": recomputed / cached}
            rows.append(named(variant) | {"seeds": len(both[0])} | at | times)
    if not rows:
        raise NotInResults("no timings with and without the cache (`recompute`)")
    return rows


def draw_recompute(rows: Rows, study: Study, width: float) -> Figure:
    names = [row["label"] for row in rows]
    fig = new_figure(width, 0.55 + row_inches(names, 0.24 if len(rows) < 8 else 0.18) * len(rows))
    ax = fig.add_subplot()
    beside = partial(ax.annotate, textcoords="offset points", fontsize=7.5, annotation_clip=False)
    for y, row in enumerate(rows):
        marks, ms = study.labels[row["label"]].look.marks(), (row["cached_ms"], row["recomputed_ms"])
        ax.plot(ms, (y, y), color=marks["color"], linewidth=0.7, zorder=2)
        ax.plot(ms[:1], [y], linestyle="none", zorder=3, **marks)
        ax.plot(ms[1:], [y], linestyle="none", marker="x", color=marks["color"], markeredgewidth=1.1, zorder=3)
        beside(f"{row['speed_up']:.1f}\u00d7", (1, y), (4, 0), xycoords=("axes fraction", "data"), va="center")
    beside("speed-up", (1, 1), (4, 2), xycoords="axes fraction", color=style.GREY, style="italic")
    ax.set_xscale("log")
    ax.margins(x=0.06)
    dot_axis(ax, names)
    style.decimal_ticks(ax.xaxis)
    ax.set_xlabel("time per token (ms)")
    filled = Line2D([], [], color=style.GREY, marker="o", linestyle="none")
    cross = Line2D([], [], color=style.GREY, marker="x", markeredgewidth=1.1, linestyle="none")
    style.add_legend(fig, [(filled, "with the cache"), (cross, "whole prefix recomputed")])
    return fig


def recompute_caption(study: Study, rows: Rows) -> str:
    fastest = "of several seeds the fastest" if any(row["seeds"] > 1 for row in rows) else "1 seed"
    at = " / ".join(sorted({f"batch {row['batch']}, context {row['context']}" for row in rows}))
    return (
        f"Time for one further token at {at}: from the cache, and by recomputing the whole prefix (logarithmic axis; "
        f"{fastest}). The factor is the second over the first: what keeping keys and values is for."
    )


FIGURE = Drawing("recompute", 90, "With and without the cache", recompute_rows, draw_recompute, recompute_caption)
