"""The memory-quality plane: KV cache bytes per token against loss."""

from itertools import pairwise

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from plots import drawing as d
from plots import style
from plots.labels import Point, label_points
from plots.results import Results
from plots.style import bytes_text
from plots.tables import MISSING, Table, share_text, size_text

ENDS = ("val_bpb", "val_bpb_low", "val_bpb_high")


def frontier_rows(results: Results) -> d.Rows:
    if any(variant.values("loss.accuracy") for variant in results.variants):
        raise d.NotInResults("recall shows accuracy instead")
    rows = []
    for variants in results.shown_sizes.values():
        of_size = []
        for variant in variants:
            loss, difference = variant.mean("loss.val_bpb"), results.difference_row(variant, "val_bpb")
            if loss is None:
                continue
            low, high = (
                loss + end - difference["difference"] if (end := difference[f"difference_{key}"]) is not None else None
                for key in ("low", "high")
            )
            point = {"kv_bytes_per_token": variant.bytes_per_token, "val_bpb": loss}
            bar = {"val_bpb_low": low, "val_bpb_high": high, "difference_seeds": difference["difference_seeds"]}
            of_size.append(d.named(variant) | {"baseline": variant.label == variant.baseline} | point | bar)
        best = float("inf")
        for row in sorted(of_size, key=lambda row: (row["kv_bytes_per_token"], row["val_bpb"])):
            row["on_front"] = row["val_bpb"] < best
            best = min(best, row["val_bpb"])
        rows += of_size
    if not rows:
        raise d.NotInResults("no finite validation loss")
    return rows


def draw_frontier(rows: d.Rows, results: Results, width: float) -> Figure:
    sizes = d.grouped(rows, "size")
    alone = len(sizes) == 1
    fig, axes = d.panels(width, len(sizes), 2.15 if alone else 1.7, 2.8 if alone else 2.1, across=(1, 3))
    limits = [
        d.widened(min(ends), max(ends))
        for group in sizes.values()
        for ends in [[row[key] for row in group for key in ENDS if row[key] is not None]]
    ]
    span = max(high - low for low, high in limits)  # the same in every panel, so that slopes can be compared
    plots = []
    for ax, (size, group), (low, high) in zip(axes, sizes.items(), limits, strict=True):
        ax.set_ylim((low + high - span) / 2, (low + high + span) / 2)
        plots.append((ax, *draw_panel(ax, group, results)))
        if alone:
            hint = "lower left is better; dashed: Pareto front"
            ax.set_title(hint, loc="right", fontsize=7, color=style.GREY, style="italic")
        else:
            ax.set_title(results.size_title(size))
    x_name = f"KV cache per token{results.cache_text}"
    d.label_outer(axes, x_name, d.loss_axis_name(results) if alone or not d.is_narrow(width) else "bits/byte")
    fig.draw_without_rendering()
    names = {row["label"]: style.wrapped(results.labels[row["label"]].short, 24) for row in rows}
    if not all(label_points(ax, named_points(points, names), lines, need_all=True) for ax, points, lines in plots):
        for ax in axes:
            for text in list(ax.texts):
                text.remove()
        families = {row["family"]: family_look(results, row["family"]) for row in rows}
        style.add_legend(fig, [(look.handle(), style.wrapped(name)) for name, look in families.items()])
        fig.draw_without_rendering()
        values = {row["label"]: results.labels[row["label"]].value for row in rows}
        for ax, points, lines in plots:
            label_points(ax, named_points(points, values), lines)
    return fig


def named_points(points: d.Rows, names: dict[str, str]) -> list[Point]:
    return [Point(row["x"], *(row[key] for key in ENDS), names[row["label"]]) for row in points]


def family_look(results: Results, family: str) -> style.Look:
    return next(variant.look for variant in results.variants if variant.family == family)


def draw_panel(ax, rows: d.Rows, results: Results) -> tuple[d.Rows, list]:
    """Draw one size; return the rows with the place `x` where each is drawn, and the lines that labels should
    avoid."""
    sizes = [row["kv_bytes_per_token"] for row in rows if row["kv_bytes_per_token"] > 0] or [1]
    zero = min(sizes) / 4  # where a cache that does not grow stands on the logarithmic axis, marked "0 B"
    points = [row | {"x": row["kv_bytes_per_token"] or zero} for row in rows]
    left, right = (limit(row["x"] for row in points) for limit in (min, max))
    ax.set_xscale("log", base=2)
    ax.set_xlim(left / 2, right * 2)

    front = sorted((row for row in points if row["on_front"]), key=lambda row: row["x"])
    xs, ys = [row["x"] for row in front], [row["val_bpb"] for row in front]
    xs, ys = [xs[0], *xs, right * 2], [ax.get_ylim()[1], *ys, ys[-1]]
    step = {"drawstyle": "steps-post", "color": style.GREY, "linewidth": 0.7, "linestyle": (0, (3, 2)), "zorder": 1}
    ax.plot(xs, ys, **step)
    lines = [[(x0, y0), (x1, y0), (x1, y1)] for (x0, y0), (x1, y1) in pairwise(zip(xs, ys, strict=True))]
    points = d.side_by_side(ax, points, *ENDS)
    for row in points:
        if row["baseline"]:
            ax.axhline(row["val_bpb"], color=style.GREY, linewidth=0.5, zorder=1)
            lines.append([(left / 2, row["val_bpb"]), (right * 2, row["val_bpb"])])
    for family, group in d.grouped(points, "family").items():
        look, group = family_look(results, family), sorted(group, key=lambda row: row["x"])
        if len(group) > 1:
            curve = [[row["x"] for row in group], [row["val_bpb"] for row in group]]
            ax.plot(*curve, color=look.color, linestyle=look.line, linewidth=0.9, zorder=2)
            lines += [list(segment) for segment in pairwise(zip(*curve, strict=True))]
        for row in group:
            if row["val_bpb_low"] is not None:
                bar = [row["val_bpb_low"], row["val_bpb_high"]]
                ax.plot([row["x"]] * 2, bar, color=look.color, linewidth=0.8, zorder=2)
            ax.plot([row["x"]], [row["val_bpb"]], linestyle="none", markersize=5.5, zorder=3, **look.marks())
    shown_zero = not all(row["kv_bytes_per_token"] for row in points)
    ticks = style.powers_of_two(max(left / 2, 1), right * 2)
    if shown_zero:
        ticks = [zero, *(tick for tick in ticks if tick > zero)]
    text = lambda value: "0 B" if shown_zero and value == zero else bytes_text(value)  # noqa: E731
    style.octave_ticks(ax.xaxis, ticks, text, d.panel_inches(ax), 0.5)
    ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    return points, lines


def frontier_caption(results: Results, rows: d.Rows) -> str:
    sentences = [
        "Bytes that one more token adds to the KV cache (exact, logarithmic axis) against bits per byte of held-out "
        f"text ({results.seeds_text})."
    ]
    if len({row["family"] for row in rows}) < len({results.labels[row["label"]].short for row in rows}):
        sentences.append("Lines join the variants of a family.")
    sentences.append("Points that would cover each other stand side by side.")
    sentences.append("Lower left is better; dashed: Pareto front; thin horizontal line: the loss of the baseline.")
    if any(row["val_bpb_low"] is not None for row in rows):
        bars = "Bars around the means, of the difference to the baseline"
        sentences.append(d.interval_caption(results, rows, "val_bpb_low", bars))
    elif results.seeds[1] == 1:
        sentences.append("With one seed, neither a vertical difference nor the front can be told from seed noise.")
    else:
        sentences.append("The results hold no intervals.")
    if results.seeds[0] < results.seeds[1]:
        sentences.append(
            "Some seeds are missing: a mean is over the seeds that a variant has, a difference over those that both "
            "have."
        )
    if len(results.sizes) > 1:
        sentences += [d.sizes_caption(results).strip(), "All panels span the same range of loss."]
    return " ".join(sentences)


def frontier_findings(results: Results) -> d.Findings:
    entries = results.raw.get("bytes_for_baseline", [])
    several = [entry for entry in entries if len(entry["seeds"]) > 1]
    sentences = [need_sentence(results, entry) for entry in several if not is_trivial(entry)]
    if entries and not several:
        sentences = ["One seed: nothing can be concluded about how many bytes a family needs for the baseline's loss."]
    losses = d.difference_findings(results, "val_bpb", "Loss", "loss", "bits per byte")
    return losses + [("Bytes for the baseline's loss", sentence) for sentence in sentences]


def is_trivial(entry: dict) -> bool:
    """True where the baseline's own family needs exactly the baseline's bytes, as none smaller is as good."""
    at_baseline = entry["bytes_per_token"] == entry["baseline_bytes_per_token"]
    return at_baseline and entry["baseline"] in entry["labels"]


def need_interval(results: Results, entry: dict) -> str:
    """The interval of the bytes that a family needs, with open ends as "under" its smallest or "over" its largest
    variant; empty with one seed."""
    if len(entry["seeds"]) < 2:
        return ""
    sizes, low, high = sizes_of(results, entry), entry["low"], entry["high"]
    above = f"over {bytes_text(sizes[-1])}"
    if high is None and low == sizes[-1]:
        return above
    below = f"under {bytes_text(sizes[0])}"
    return f"{below if low is None else bytes_text(low)} to {above if high is None else bytes_text(high)}"


def sizes_of(results: Results, entry: dict) -> list[int]:
    """Bytes per token of a family's variants, ascending."""
    return sorted(results.labels[label].bytes_per_token for label in entry["labels"])


def need_sentence(results: Results, entry: dict) -> str:
    family, baseline, n = entry["family"], entry["baseline"], len(entry["seeds"])
    if entry["size"]:
        family += f" at {entry['size']}"
    interval, value = need_interval(results, entry), entry["bytes_per_token"]
    bounds = f"{100 * entry['level']:g} % interval {interval}, n = {n}" if interval else f"n = {n}"
    if n > 1 and entry["low"] is None and entry["high"] is None:
        return f"The variants measured do not show what {family} needs for {baseline}'s loss ({bounds})."
    if value is None:
        up_to = f"up to {bytes_text(sizes_of(results, entry)[-1])} per token"
        return f"{family} does not reach {baseline}'s loss with the variants measured, {up_to} ({bounds})."
    share = ""
    if of := entry["baseline_bytes_per_token"]:
        share = f", {share_text(value, of)} of its {bytes_text(of)}"
    variants = [results.labels[label] for label in entry["labels"]]
    if entry["verdict"] == "at most":
        variants = [variant for variant in variants if variant.bytes_per_token == value]
    if constant := max(variant.constant_bytes for variant in variants):
        share += f", besides up to {bytes_text(constant)} per sequence at any length"
    if entry["verdict"] == "at most":
        return (
            f"{family} needs at most {bytes_text(value)} per token for {baseline}'s loss{share}: on the mean over "
            f"seeds its smallest variant is already as good ({bounds})."
        )
    return f"{family} reaches {baseline}'s loss with {bytes_text(value)} per token{share} ({bounds})."


def need_table(results: Results) -> Table | None:
    entries = results.raw.get("bytes_for_baseline", [])
    if not entries:
        return None
    rows = []
    constant: dict[str, int] = {}  # family -> the most that one of its variants holds besides its bytes per token
    for entry in entries:
        family, value, of = entry["family"], entry["bytes_per_token"], entry["baseline_bytes_per_token"]
        need = "not reached" if value is None else size_text(value)
        if entry["verdict"] == "at most":
            need = f"at most {need}"
        name = f"{family} {entry['size']}" if entry["size"] else family
        cells = [name, entry["baseline"], size_text(of), need, share_text(value, of)]
        rows.append(
            [*cells, need_interval(results, entry) or MISSING, str(len(entry["seeds"])), ", ".join(entry["labels"])]
        )
        constant[family] = max(
            constant.get(family, 0), *(results.labels[label].constant_bytes for label in entry["labels"])
        )
    header = ["family", "baseline", "its KV per token", "family needs", "of the baseline's", "interval", "seeds"]
    levels = ", ".join(f"{100 * level:g} %" for level in {entry["level"] for entry in entries})
    notes = [
        "Interpolated between each family's variants over the logarithm of bytes, never extrapolated. Intervals "
        f"({levels}): Student's t over seed-paired differences; an end beyond the variants measured is written as "
        '"under" the smallest or "over" the largest.'
    ]
    if texts := [f"{family} up to {size_text(most)}" for family, most in constant.items() if most]:
        notes.append(f"Besides these bytes a sequence holds, at any length: {', '.join(texts)}.")
    return Table([*header, "variants"], rows, "llrrrrrl", notes, "KV bytes per token for the baseline's loss")


FIGURE = d.Drawing(
    "frontier", 10, "Memory against quality",
    frontier_rows, draw_frontier, frontier_caption, frontier_findings, (need_table,),
)  # fmt: skip
