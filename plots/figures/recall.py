"""Multi-query associative recall (Zoology, arXiv 2312.04927): how many key-value pairs a cache can hold and return,
how far back, and with how few bytes."""

from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from plots import drawing as d
from plots import style
from plots.results import Results
from plots.style import bytes_text
from plots.tables import MISSING, Table, size_text
from plots.technique_tables import measured_notes

# What the accuracy is measured at -> its key in the loss, the name of its axis, the title of its panel
MEASURED_AT = {
    "pairs": ("accuracy_at", "key-value pairs", "by number of pairs"),
    "distance": ("accuracy_at_distance", "tokens back to the pair", "by distance"),
}


def recall_rows(results: Results) -> d.Rows:
    rows = []
    for variant in results.largest:
        for what, (key, *_) in MEASURED_AT.items():
            for place in sorted(map(int, variant.first(f"loss.{key}") or {})):
                if values := variant.values(f"loss.{key}.{place}"):
                    at = {"kv_bytes_per_token": variant.bytes_per_token} | dict.fromkeys(MEASURED_AT) | {what: place}
                    rows.append(d.named(variant) | at | d.spread(values, "accuracy"))
    if not any(row["pairs"] for row in rows):
        raise d.NotInResults("no recall task (`loss.accuracy_at`)")
    chosen = most_different(rows)
    return [row | {"in_byte_panel": row["pairs"] == chosen} for row in rows]


def most_different(rows: d.Rows) -> int:
    """The number of pairs at which the variants differ most; the largest where several tie."""
    ranges = {}
    for pairs, group in d.grouped([row for row in rows if row["pairs"]], "pairs").items():
        values = [row["accuracy"] for row in group]
        ranges[pairs] = (max(values) - min(values), pairs)
    return max(ranges, key=ranges.get)


def draw_recall(rows: d.Rows, results: Results, width: float) -> Figure:
    parts = {what: part for what in MEASURED_AT if (part := [row for row in rows if row[what]])}
    fig, (*axes, right) = d.panels(width, len(parts) + 1, 1.9, 2.5, sharey=True)
    for ax, (what, part) in zip(axes, parts.items(), strict=True):
        draw_lines(ax, part, what, results)
        ax.margins(x=0.1 if d.is_narrow(width) else 0.06)
    draw_by_bytes(right, [row for row in rows if row["in_byte_panel"]], results)
    for ax in fig.axes:
        if ax.get_subplotspec().colspan.start == 0:
            ax.set_ylabel(f"queries answered correctly\n({results.seeds_text})")
    right.set_ylim(-0.03, 1.03)
    right.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    style.add_legend(fig, d.legend_entries(rows, results))
    return fig


def draw_lines(ax: Axes, rows: d.Rows, what: str, results: Results) -> None:
    """Draw the accuracy against one of MEASURED_AT, a line for each variant."""
    ax.set_xscale("log", base=2)
    labels, places = d.grouped(rows, "label"), sorted({row[what] for row in rows})
    apart = min([1.04, *((high / low) ** (0.6 / len(labels)) for low, high in pairwise(places))])
    for index, (label, group) in enumerate(labels.items()):
        look, xs = results.labels[label].look, [row[what] for row in group]
        aside = [x * apart ** (index - (len(labels) - 1) / 2) for x in xs]
        for x, row in zip(aside, group, strict=True):
            ax.plot([x, x], [row["accuracy_min"], row["accuracy_max"]], color=look.color, linewidth=0.7, zorder=2)
        ax.plot(aside, [row["accuracy"] for row in group], linestyle=look.line, markersize=3.4, **look.marks())
    style.measured_ticks(ax.xaxis, [row[what] for row in rows], style.tokens_text, d.panel_inches(ax), 0.26)
    _, name, title = MEASURED_AT[what]
    ax.set_xlabel(name)
    ax.set_title(title)


def draw_by_bytes(ax: Axes, rows: d.Rows, results: Results) -> None:
    sizes = [row["kv_bytes_per_token"] for row in rows if row["kv_bytes_per_token"] > 0] or [1]
    zero = min(sizes) / 4
    places = {row["kv_bytes_per_token"] or zero for row in rows}
    ax.set_xscale("log", base=2)
    ax.set_xlim(min(places) / 1.5, max(places) * 1.5)
    rows = d.side_by_side(ax, [row | {"x": row["kv_bytes_per_token"] or zero} for row in rows], "accuracy")
    for group in d.grouped(rows, "family").values():
        group = sorted(group, key=lambda row: row["x"])
        look = results.labels[group[0]["label"]].look
        curve = [[row[key] for row in group] for key in ("x", "accuracy")]
        ax.plot(*curve, color=look.color, linestyle=look.line, linewidth=0.9)
        for row in group:
            look = results.labels[row["label"]].look
            ax.plot([row["x"]] * 2, [row["accuracy_min"], row["accuracy_max"]], color=look.color, linewidth=0.7)
            ax.plot([row["x"]], [row["accuracy"]], linestyle="none", **look.marks())
    text = lambda value: "0 B" if value == zero and zero in places else bytes_text(value)  # noqa: E731
    ticks = style.powers_of_two(min(sizes) / 1.5, max(places) * 1.5)
    style.octave_ticks(ax.xaxis, ([zero] if zero in places else []) + ticks, text, d.panel_inches(ax), 0.5)
    ax.set_xlabel(f"KV per token{results.cache_text}")
    ax.set_title(f"at {rows[0]['pairs']} pairs")


def recall_caption(results: Results, rows: d.Rows) -> str:
    seeds = results.seeds_text
    if results.seeds[1] > 1:
        seeds += "; bars reach from the lowest to the highest seed"
    distances = [row["distance"] for row in rows if row["distance"]]
    back = ""
    if distances:
        most = max(distances)
        back = f", against the distance to the pair ({most}: over {most // 2} and up to {most} tokens)"
    task = "Needles in a text" if results.raw["corpus"]["name"] == "needle" else "Multi-query associative recall"
    sentences = [
        f"{task}: share of queries answered correctly against the number of key-value pairs in "
        f"the sequence ({seeds}){back}, and against the bytes that one more token adds to the KV cache at "
        f"{most_different(rows)} pairs, where the variants differ most."
    ]
    if len(d.grouped(rows, "family")) < len(d.grouped(rows, "label")):
        sentences.append("Lines join the variants of a family.")
    sentences.append("Points that would cover each other stand side by side. Horizontal axes are logarithmic.")
    if len(results.sizes) > 1:
        sentences.append(f"Models of the largest size, {results.largest[0].size}.")
    if results.seeds[1] == 1:
        sentences.append("With one seed nothing can be concluded about their order.")
    return " ".join(sentences)


def byte_table(results: Results, is_long: bool = False) -> Table | None:
    """The fewest bytes for each accuracy, of full caches or, where it `is_long`, under all techniques."""
    entries = [each for each in results.raw.get("bytes_for_accuracy", []) if is_long or each["kind"] == "full"]
    if not entries:
        return None
    counts = sorted({each["pairs"] for each in entries})
    cells: dict[tuple, dict[int, str]] = {}  # (label, kind) -> pairs -> cell
    for each in entries:
        needed = " / ".join(map(size_text, each["bytes"].values()))
        cells.setdefault((each["label"], each["kind"]), {})[each["pairs"]] = needed
    names = ["variant", "technique"] if is_long else ["variant"]
    rows = [[*what[: len(names)], *(at.get(pairs, MISSING) for pairs in counts)] for what, at in cells.items()]
    notes = [
        f"Fewest bytes for {' / '.join(map(percent, entries[0]['bytes']))} of the queries answered right "
        f"({results.seeds_text}), over the settings measured; {MISSING}: none is good enough. Means without intervals: "
        "a setting near such a limit may be on either side of it by chance.",
        *measured_notes(results),
    ]
    title = "Fewest cache bytes for an accuracy" + (", all techniques" if is_long else "")
    align = "l" * len(names) + "r" * len(counts)
    return Table([*names, *(f"{pairs} pairs" for pairs in counts)], rows, align, notes, title, folded=is_long)


def long_byte_tables(results: Results) -> list[Table]:
    table = byte_table(results, is_long=True)
    return [table] if table else []


def percent(share: str) -> str:
    return f"{100 * float(share):g} %"


def recall_findings(results: Results) -> d.Findings:
    found = d.difference_findings(results, "accuracy", "Recall", "accuracy", "of the queries")
    return found + [("Bytes for recall", sentence) for sentence in byte_sentences(results)]


def byte_sentences(results: Results) -> list[str]:
    """For the most pairs and each accuracy, which caches reach it with the fewest bytes."""
    entries = [each for each in results.raw.get("bytes_for_accuracy", []) if each["size"] == results.largest[0].size]
    if not entries:
        return []
    if results.seeds[1] == 1:
        return ["One seed: nothing can be concluded about the cache bytes that an accuracy needs."]
    most = max(each["pairs"] for each in entries)
    entries = [each for each in entries if each["pairs"] == most]
    full, sentences = [each for each in entries if each["kind"] == "full"], []
    for share in entries[0]["bytes"]:
        where = f"{percent(share)} of the queries at {most} pairs (mean over seeds)"
        if best := fewest(entries, share):
            text = f"To answer {where} right, the fewest cache bytes are {best}; "
            own = fewest(full, share)
            text += f"of full caches alone {own}" if own else "no full cache is enough"
        else:
            text = f"No cache measured answers {where} right"
        never = [each["label"] for each in full if each["bytes"][share] is None]
        if 0 < len(never) < len(full):
            text += f"; the full caches of {', '.join(never)} never reach it"
        sentences.append(f"{text}.")
    return sentences


def fewest(entries: list[dict], share: str) -> str:
    """The caches that need the fewest bytes for a share of the queries; empty where none is good enough."""
    reached = [each for each in entries if each["bytes"][share] is not None]
    if not reached:
        return ""
    least = min(each["bytes"][share] for each in reached)
    names = [
        each["label"] if each["kind"] == "full" else f"{each['label']} ({each['kind']})"
        for each in reached
        if each["bytes"][share] == least
    ]
    return f"{bytes_text(least)} by {' and '.join(names)}"


FIGURE = d.Drawing(
    "recall", 30, "Associative recall",
    recall_rows, draw_recall, recall_caption, recall_findings, (byte_table,), long_byte_tables,
)  # fmt: skip
