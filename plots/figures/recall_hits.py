"""Loss on recall hits: tokens that end a pair which the context has already shown, where a smaller cache loses first
(Zoology, arXiv 2312.04927)."""

from itertools import chain

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from plots import drawing as d
from plots import style
from plots.results import Results

KINDS = {"hits": "hit_nats", "rest": "rest_nats"}


def hit_rows(results: Results) -> d.Rows:
    rows = []
    for variant in chain(*results.sizes.values()):
        both = {kind: results.differences.get((variant.label, metric)) for kind, metric in KINDS.items()}
        if any(each is None or each.mean is None for each in both.values()):
            continue
        row = d.named(variant)
        for kind, each in both.items():
            row |= {kind: each.mean, f"{kind}_low": each.low, f"{kind}_high": each.high}
        rows.append(row | {"difference_seeds": both["hits"].seeds, "hit_share": hit_share(results, variant)})
    if not rows:
        raise d.NotInResults("no differences on recall hits (`hit_nats`)")
    return rows


def hit_share(results: Results, variant) -> float | None:
    hits, rest = (variant.mean(f"loss.{key}_tokens") for key in ("hit", "rest"))
    return hits / (hits + rest) if hits is not None and rest is not None and hits + rest else None


def draw_hits(rows: d.Rows, results: Results, width: float) -> Figure:
    fig = d.new_figure(width, 0.6 + d.row_inches([row["label"] for row in rows], 0.26) * len(rows))
    ax = fig.add_subplot()
    ax.axvline(0, color=style.GREY, linewidth=0.6, zorder=1)
    for y, row in enumerate(rows):
        look = results.labels[row["label"]].look
        for kind, at in (("hits", y - 0.17), ("rest", y + 0.17)):
            if row[f"{kind}_low"] is not None:
                ax.plot([row[f"{kind}_low"], row[f"{kind}_high"]], [at, at], color=look.color, linewidth=0.8, zorder=2)
            marks = look.marks(hollow=kind == "rest") | {"fillstyle": "full"}
            ax.plot([row[kind]], [at], linestyle="none", zorder=3, **marks)
    ax.margins(x=0.06)
    ax.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    d.dot_axis(ax, [row["label"] for row in rows])
    ax.set_xlabel("nats per token above the baseline")
    grey = {"color": style.GREY, "marker": "o", "linestyle": "none"}
    filled, hollow = Line2D([], [], **grey), Line2D([], [], markerfacecolor="white", **grey)
    style.add_legend(fig, [(filled, "recall hits"), (hollow, "all other tokens")])
    return fig


def hit_caption(results: Results, rows: d.Rows) -> str:
    shares = sorted({f"{100 * row['hit_share']:.3g}" for row in rows if row["hit_share"] is not None}, key=float)
    share = f", {' to '.join(dict.fromkeys((shares[0], shares[-1])))} % of all" if shares else ""
    return (
        "Difference in loss to the baseline, paired by seed, on recall hits (filled: tokens that end a pair of tokens "
        f"which the context already contains{share}) and on all other tokens (hollow). "
        f"{d.interval_caption(results, rows, 'hits_low')}"
    )


def hit_findings(results: Results) -> d.Findings:
    try:
        rows = hit_rows(results)
    except d.NotInResults:
        return []
    sentences, unclear = [], []
    for row in rows:
        hits, rest = (results.differences[row["label"], metric] for metric in KINDS.values())
        if hits.separable or rest.separable:
            parts = [
                f"{verdict} on {where}: {each.mean:+.4f} nats per token ({each.interval})"
                for each, where in ((hits, "recall hits"), (rest, "other tokens"))
                for verdict in [each.verdict if each.separable else "not separable"]
            ]
            sentences.append(f"{row['label']} against {hits.baseline}: {'; '.join(parts)}.")
        elif hits.low is not None:
            unclear.append(f"{row['label']} ({hits.mean:+.4f} nats per token on hits, {hits.interval})")
    if unclear:
        sentences.append(
            f"Not separable from the baseline, neither on recall hits nor on other tokens: {'; '.join(unclear)}."
        )
    if not sentences:
        sentences.append("One seed: nothing can be concluded about recall hits.")
    return [("Recall hits", sentence) for sentence in sentences]


FIGURE = d.Drawing("recall_hits", 40, "Recall hits", hit_rows, draw_hits, hit_caption, hit_findings)
