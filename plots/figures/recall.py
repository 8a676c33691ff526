"""Multi-query associative recall (Zoology, arXiv 2312.04927): how many pairs a cache can hold and give back."""

from matplotlib.figure import Figure

from plots import style
from plots.drawing import (
    Drawing,
    Findings,
    NotInResults,
    Rows,
    difference_findings,
    grouped,
    is_narrow,
    legend_entries,
    named,
    panel_inches,
    panels,
    spread,
)
from plots.results import Study


def recall_rows(study: Study) -> Rows:
    rows = []
    for variant in study.largest:
        for pairs in sorted(map(int, variant.first("loss.accuracy_at") or {})):
            if values := variant.values(f"loss.accuracy_at.{pairs}"):
                kept = {"kv_bytes_per_token": variant.first("kv.bytes_per_token"), "pairs": pairs}
                rows.append(named(variant) | kept | spread(values, "accuracy"))
    if not rows:
        raise NotInResults("no recall task (`loss.accuracy_at`)")
    chosen = telling(rows)
    return [row | {"in_right_panel": row["pairs"] == chosen} for row in rows]


def telling(rows: Rows) -> int:
    """The number of pairs at which the variants differ most; of equals, the largest."""
    apart = {}
    for pairs, group in grouped(rows, "pairs").items():
        values = [row["accuracy"] for row in group]
        apart[pairs] = (max(values) - min(values), pairs)
    return max(apart, key=apart.get)


def draw_recall(rows: Rows, study: Study, width: float) -> Figure:
    fig, (left, right) = panels(width, 2, 1.9, 2.5, sharey=True)
    left.set_xscale("log", base=2)
    labels = grouped(rows, "label")
    for index, (label, group) in enumerate(labels.items()):
        look, xs = study.labels[label].look, [row["pairs"] for row in group]
        aside = [x * 1.04 ** (index - (len(labels) - 1) / 2) for x in xs]
        for x, row in zip(aside, group, strict=True):
            left.plot([x, x], [row["accuracy_min"], row["accuracy_max"]], color=look.color, linewidth=0.7, zorder=2)
        left.plot(aside, [row["accuracy"] for row in group], linestyle=look.line, markersize=3.4, **look.marks())
    style.measured_ticks(left.xaxis, [row["pairs"] for row in rows], style.tokens_text, panel_inches(left), 0.26)
    left.set_xlabel("key-value pairs")
    left.set_ylabel(f"queries answered right\n({study.seeds_text})")

    shown = [row for row in rows if row["in_right_panel"]]
    kept = [row["kv_bytes_per_token"] for row in shown if row["kv_bytes_per_token"] > 0] or [1]
    zero = min(kept) / 4
    right.set_xscale("log", base=2)
    for group in grouped(shown, "family").values():
        group = sorted(group, key=lambda row: row["kv_bytes_per_token"])
        look = study.labels[group[0]["label"]].look
        xs, ys = [row["kv_bytes_per_token"] or zero for row in group], [row["accuracy"] for row in group]
        right.plot(xs, ys, color=look.color, linestyle=look.line, linewidth=0.9)
        for x, row in zip(xs, group, strict=True):
            look = study.labels[row["label"]].look
            right.plot([x, x], [row["accuracy_min"], row["accuracy_max"]], color=look.color, linewidth=0.7)
            right.plot([x], [row["accuracy"]], linestyle="none", **look.marks())
    places = {row["kv_bytes_per_token"] or zero for row in shown}
    text = lambda value: "0 B" if value == zero and zero in places else style.bytes_text(value)  # noqa: E731
    right.set_xlim(min(places) / 1.5, max(places) * 1.5)
    ticks = style.powers_of_two(min(kept) / 1.5, max(places) * 1.5)
    style.octave_ticks(right.xaxis, ([zero] if zero in places else []) + ticks, text, panel_inches(right), 0.5)
    right.set_xlabel(f"KV per token{study.cache_text}")
    left.set_title("by number of pairs")
    right.set_title(f"at {shown[0]['pairs']} pairs")
    left.set_ylim(-0.03, 1.03)
    left.margins(x=0.1 if is_narrow(width) else 0.06)
    left.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    style.add_legend(fig, legend_entries(rows, study))
    return fig


def recall_caption(study: Study, rows: Rows) -> str:
    bars = "; bars reach from the lowest to the highest seed" if study.seeds[1] > 1 else ""
    size = f" Models of the largest size, {study.largest[0].size}." if len(study.sizes) > 1 else ""
    lines = " Lines join the variants of a family." * (len(grouped(rows, "family")) < len(grouped(rows, "label")))
    one = " With one seed nothing can be concluded about their order." if study.seeds[1] == 1 else ""
    return (
        "Multi-query associative recall: share of queries answered right against the number of key-value pairs in the "
        f"sequence ({study.seeds_text}{bars}), and against what a further token adds to the KV cache at "
        f"{telling(rows)} pairs, where the variants differ most.{lines} Horizontal axes logarithmic.{size}{one}"
    )


def recall_findings(study: Study) -> Findings:
    return difference_findings(study, "accuracy", "Recall", "accuracy", "of the queries")


FIGURE = Drawing("recall", 30, "Associative recall", recall_rows, draw_recall, recall_caption, recall_findings)
