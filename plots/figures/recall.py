"""Multi-query associative recall (Zoology, arXiv 2312.04927): how many key-value pairs a cache can hold and return."""

from matplotlib.figure import Figure

from plots import drawing as d
from plots import style
from plots.results import Results


def recall_rows(results: Results) -> d.Rows:
    rows = []
    for variant in results.largest:
        for pairs in sorted(map(int, variant.first("loss.accuracy_at") or {})):
            if values := variant.values(f"loss.accuracy_at.{pairs}"):
                at = {"kv_bytes_per_token": variant.bytes_per_token, "pairs": pairs}
                rows.append(d.named(variant) | at | d.spread(values, "accuracy"))
    if not rows:
        raise d.NotInResults("no recall task (`loss.accuracy_at`)")
    chosen = most_different(rows)
    return [row | {"in_right_panel": row["pairs"] == chosen} for row in rows]


def most_different(rows: d.Rows) -> int:
    """The number of pairs at which the variants differ most; the largest where several tie."""
    ranges = {}
    for pairs, group in d.grouped(rows, "pairs").items():
        values = [row["accuracy"] for row in group]
        ranges[pairs] = (max(values) - min(values), pairs)
    return max(ranges, key=ranges.get)


def draw_recall(rows: d.Rows, results: Results, width: float) -> Figure:
    fig, (left, right) = d.panels(width, 2, 1.9, 2.5, sharey=True)
    left.set_xscale("log", base=2)
    labels = d.grouped(rows, "label")
    for index, (label, group) in enumerate(labels.items()):
        look, xs = results.labels[label].look, [row["pairs"] for row in group]
        aside = [x * 1.04 ** (index - (len(labels) - 1) / 2) for x in xs]
        for x, row in zip(aside, group, strict=True):
            left.plot([x, x], [row["accuracy_min"], row["accuracy_max"]], color=look.color, linewidth=0.7, zorder=2)
        left.plot(aside, [row["accuracy"] for row in group], linestyle=look.line, markersize=3.4, **look.marks())
    style.measured_ticks(left.xaxis, [row["pairs"] for row in rows], style.tokens_text, d.panel_inches(left), 0.26)
    left.set_xlabel("key-value pairs")
    left.set_ylabel(f"queries answered correctly\n({results.seeds_text})")

    shown = [row for row in rows if row["in_right_panel"]]
    sizes = [row["kv_bytes_per_token"] for row in shown if row["kv_bytes_per_token"] > 0] or [1]
    zero = min(sizes) / 4
    right.set_xscale("log", base=2)
    for group in d.grouped(shown, "family").values():
        group = sorted(group, key=lambda row: row["kv_bytes_per_token"])
        look = results.labels[group[0]["label"]].look
        xs, ys = [row["kv_bytes_per_token"] or zero for row in group], [row["accuracy"] for row in group]
        right.plot(xs, ys, color=look.color, linestyle=look.line, linewidth=0.9)
        for x, row in zip(xs, group, strict=True):
            look = results.labels[row["label"]].look
            right.plot([x, x], [row["accuracy_min"], row["accuracy_max"]], color=look.color, linewidth=0.7)
            right.plot([x], [row["accuracy"]], linestyle="none", **look.marks())
    places = {row["kv_bytes_per_token"] or zero for row in shown}
    text = lambda value: "0 B" if value == zero and zero in places else style.bytes_text(value)  # noqa: E731
    right.set_xlim(min(places) / 1.5, max(places) * 1.5)
    ticks = style.powers_of_two(min(sizes) / 1.5, max(places) * 1.5)
    style.octave_ticks(right.xaxis, ([zero] if zero in places else []) + ticks, text, d.panel_inches(right), 0.5)
    right.set_xlabel(f"KV per token{results.cache_text}")
    left.set_title("by number of pairs")
    right.set_title(f"at {shown[0]['pairs']} pairs")
    left.set_ylim(-0.03, 1.03)
    left.margins(x=0.1 if d.is_narrow(width) else 0.06)
    left.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    style.add_legend(fig, d.legend_entries(rows, results))
    return fig


def recall_caption(results: Results, rows: d.Rows) -> str:
    seeds = results.seeds_text
    if results.seeds[1] > 1:
        seeds += "; bars reach from the lowest to the highest seed"
    sentences = [
        "Multi-query associative recall: share of queries answered correctly against the number of key-value pairs in "
        f"the sequence ({seeds}), and against the bytes that one more token adds to the KV cache at "
        f"{most_different(rows)} pairs, where the variants differ most."
    ]
    if len(d.grouped(rows, "family")) < len(d.grouped(rows, "label")):
        sentences.append("Lines join the variants of a family.")
    sentences.append("Horizontal axes are logarithmic.")
    if len(results.sizes) > 1:
        sentences.append(f"Models of the largest size, {results.largest[0].size}.")
    if results.seeds[1] == 1:
        sentences.append("With one seed nothing can be concluded about their order.")
    return " ".join(sentences)


def recall_findings(results: Results) -> d.Findings:
    return d.difference_findings(results, "accuracy", "Recall", "accuracy", "of the queries")


FIGURE = d.Drawing("recall", 30, "Associative recall", recall_rows, draw_recall, recall_caption, recall_findings)
