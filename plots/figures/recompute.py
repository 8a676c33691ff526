"""Time per token with the cache and without: why the cache exists."""

from functools import partial

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from plots import drawing as d
from plots import style
from plots.results import Results


def recompute_rows(results: Results) -> d.Rows:
    rows = []
    for variant in results.variants:
        both = [variant.values(f"recompute.{key}") for key in ("cached_ms", "recomputed_ms")]
        if all(both) and (fastest := [min(times) for times in both]) and min(fastest) > 0:
            cached, recomputed = fastest
            at = {key: variant.first(f"recompute.{key}") for key in ("batch", "context")}
            times = {"cached_ms": cached, "recomputed_ms": recomputed, "speed_up": recomputed / cached}
            rows.append(d.named(variant) | {"seeds": len(both[0])} | at | times)
    if not rows:
        raise d.NotInResults("no timings with and without the cache (`recompute`)")
    return rows


def draw_recompute(rows: d.Rows, results: Results, width: float) -> Figure:
    names = [row["label"] for row in rows]
    fig = d.new_figure(width, 0.55 + d.row_inches(names, 0.24 if len(rows) < 8 else 0.18) * len(rows))
    ax = fig.add_subplot()
    annotate = partial(ax.annotate, textcoords="offset points", fontsize=7.5, annotation_clip=False)
    for y, row in enumerate(rows):
        marks, ms = results.labels[row["label"]].look.marks(), (row["cached_ms"], row["recomputed_ms"])
        ax.plot(ms, (y, y), color=marks["color"], linewidth=0.7, zorder=2)
        ax.plot(ms[:1], [y], linestyle="none", zorder=3, **marks)
        ax.plot(ms[1:], [y], linestyle="none", marker="x", color=marks["color"], markeredgewidth=1.1, zorder=3)
        annotate(f"{row['speed_up']:.1f}\u00d7", (1, y), (4, 0), xycoords=("axes fraction", "data"), va="center")
    annotate("speed-up", (1, 1), (4, 2), xycoords="axes fraction", color=style.GREY, style="italic")
    ax.set_xscale("log")
    ax.margins(x=0.06)
    d.dot_axis(ax, names)
    style.decimal_ticks(ax.xaxis)
    ax.set_xlabel("time per token (ms)")
    filled = Line2D([], [], color=style.GREY, marker="o", linestyle="none")
    cross = Line2D([], [], color=style.GREY, marker="x", markeredgewidth=1.1, linestyle="none")
    style.add_legend(fig, [(filled, "with the cache"), (cross, "whole prefix recomputed")])
    return fig


def recompute_caption(results: Results, rows: d.Rows) -> str:
    fastest = "the fastest of several seeds" if any(row["seeds"] > 1 for row in rows) else "1 seed"
    at = " / ".join(sorted({f"batch {row['batch']}, context {row['context']}" for row in rows}))
    return (
        f"Time for one more token at {at}: with the cache, and by recomputing the whole prefix (logarithmic axis; "
        f"{fastest}). The factor is the second divided by the first: what the cache is for."
    )


FIGURE = d.Drawing("recompute", 90, "With and without the cache", recompute_rows, draw_recompute, recompute_caption)
