"""Cache bytes of sequences of different lengths: contiguous, doubling and paged caches."""

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from plots import drawing as d
from plots import style
from plots.results import Results

MARKERS = {"contiguous": "s", "doubling": "D", "paged": "o"}


def paging_rows(results: Results) -> d.Rows:
    rows = [
        d.named(variant) | entry | {"wasted_share": entry["wasted_bytes"] / entry["held_bytes"]}
        for variant in results.variants
        for entry in variant.first("paging") or []
    ]
    if not rows:
        raise d.NotInResults("no bytes of contiguous and paged caches (`paging`)")
    return rows


def kinds(rows: d.Rows) -> dict[tuple, dict]:
    """(cache, block size) -> how its marker looks."""
    looks = {}
    for cache, block_size in dict.fromkeys((row["cache"], row["block_size"]) for row in rows):
        # Paged caches hold almost the same: the first is a dot, the others are rings around it.
        rings = sum(kind[0] == cache for kind in looks)
        look = {"marker": MARKERS[cache], "markersize": 4 + 3 * rings, "fillstyle": "none" if rings else "full"}
        looks[cache, block_size] = look
    return looks


def kind_name(cache: str, block_size: int | None) -> str:
    return f"blocks of {block_size}" if block_size else cache


def draw_paging(rows: d.Rows, results: Results, width: float) -> Figure:
    by_variant, looks = d.grouped(rows, "label"), kinds(rows)
    names = list(by_variant)
    fig = d.new_figure(width, 0.75 + d.row_inches(names, 0.24 if len(names) < 8 else 0.18) * len(names))
    ax = fig.add_subplot()
    for y, (label, group) in enumerate(by_variant.items()):
        color, needed = results.labels[label].look.color, group[0]["needed_bytes"]
        ax.plot([needed, max(row["held_bytes"] for row in group)], [y, y], color=color, linewidth=0.7, zorder=2)
        ax.plot([needed], [y], marker="|", markersize=9, color=color, zorder=3)
        for row in group:
            marks = looks[row["cache"], row["block_size"]]
            ax.plot([row["held_bytes"]], [y], color=color, zorder=3, **marks)
    ax.set_xscale("log", base=2)
    ax.margins(x=0.06)
    d.dot_axis(ax, names)
    low, high = ax.get_xlim()
    if high / low < 4:
        low, high = low / 2, high * 2
    ax.set_xlim(low, high)
    style.measured_ticks(ax.xaxis, style.powers_of_two(low, high), style.bytes_text, width - 1.2, 0.5)
    ax.set_xlabel(f"cache of {rows[0]['sequences']} sequences")
    entries = [(Line2D([], [], marker="|", markersize=9, linestyle="none", color=style.GREY), "needed by the tokens")]
    for kind, marks in looks.items():
        handle = Line2D([], [], linestyle="none", color=style.GREY, **marks)
        entries.append((handle, kind_name(*kind)))
    style.add_legend(fig, entries)
    return fig


def paging_caption(results: Results, rows: d.Rows) -> str:
    first = rows[0]
    lengths = "the lengths of the corpus's documents" if first["lengths"] == "documents" else "uniform lengths"
    baseline = [row for row in rows if row["label"] == first["label"]]
    shares = ", ".join(f"{kind_name(row['cache'], row['block_size'])} {row['wasted_share']:.1%}" for row in baseline)
    return (
        f"Cache{results.cache_text} of {first['sequences']} sequences with {lengths}, up to {first['max_tokens']} "
        f"tokens ({first['tokens']:,} in all), logarithmic axis. A contiguous cache has room for the longest in every "
        "sequence, a doubling one twice as much room whenever it is full, a paged one blocks of a fixed number of "
        "tokens. What is right of the vertical mark is wasted; shares of what is held, "
        f"{first['label']}: {shares}. Exact byte counts: no timing and no seeds involved."
    )


FIGURE = d.Drawing("paging", 65, "Sequences of different lengths", paging_rows, draw_paging, paging_caption)
