"""Loss by position in the context."""

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from plots import drawing as d
from plots import style
from plots.results import Results


def position_rows(results: Results) -> d.Rows:
    rows = []
    for variant in results.largest:
        for first in sorted(map(int, variant.first("loss.nats_at") or {})):
            nats = variant.mean(f"loss.nats_at.{first}")
            if first and nats is not None:
                place = {"context_tokens": first, "val_nats": nats}
                rows.append(d.named(variant) | place | results.difference_row(variant, f"nats_at.{first}"))
    if not rows:
        raise d.NotInResults("no loss by position (`loss.nats_at`)")
    return rows


def draw_positions(rows: d.Rows, results: Results, width: float) -> Figure:
    """Draw a panel of all variants' losses, then their differences to the baseline in one panel, or in one per family
    on a common scale."""
    different = [row for row in rows if row["difference"] is not None]
    parts = d.by_panel(different, results)
    several = len(parts) > 1
    fig, axes = d.panels(width, 1 + len(parts), 1.35 if several else 1.7, 1.75 if several else 2.4)
    for ax in axes:
        ax.set_xscale("log", base=2)
    for label, group in d.grouped(rows, "label").items():
        look, xs = results.labels[label].look, [row["context_tokens"] for row in group]
        axes[0].plot(xs, [row["val_nats"] for row in group], linestyle=look.line, markersize=3.2, **look.marks())
    axes[0].set_title("loss", pad=4)
    for ax, (title, part) in zip(axes[1:], parts, strict=True):
        d.draw_differences(ax, "context_tokens", d.grouped(part, "label"), results, 1.09)
        ax.set_title(title if several else "against the baseline", pad=4)
    ends = [
        row[key]
        for row in different
        for key in ("difference", "difference_low", "difference_high")
        if row[key] is not None
    ]
    for index, ax in enumerate(axes):
        style.measured_ticks(
            ax.xaxis, [row["context_tokens"] for row in rows], style.tokens_text, d.panel_inches(ax), 0.26
        )
        if index and ends:
            spare = 0.06 * (max(*ends, 0) - min(*ends, 0))
            ax.set_ylim(min(*ends, 0) - spare, max(*ends, 0) + spare)
        ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        if ax.get_subplotspec().is_last_row() or not several:
            ax.set_xlabel("tokens of context")
    axes[0].set_ylabel("nats per token")
    for index, ax in enumerate(axes[1:], 1):
        if index == 1 or ax.get_subplotspec().is_first_col():
            ax.set_ylabel("difference (nats)")
    style.add_legend(fig, d.legend_entries(rows, results))
    return fig


def position_caption(results: Results, rows: d.Rows) -> str:
    baseline = " / ".join(dict.fromkeys(variant.baseline for variant in results.largest))
    size = f" Models of the largest size, {results.largest[0].size}." if len(results.sizes) > 1 else ""
    return (
        "Mean loss of tokens against the number of context tokens before them (logarithmic axis; a point stands at the "
        f"start of its bin, which ends where the next begins; {results.seeds_text}), and its difference to {baseline}, "
        f"paired by seed.{size} {d.interval_caption(results, rows)}"
    )


FIGURE = d.Drawing("positions", 50, "Where in the context", position_rows, draw_positions, position_caption)
