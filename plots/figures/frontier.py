"""What a kept byte buys: the memory-quality plane."""

import math
from itertools import pairwise, product

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from plots import style
from plots.drawing import (
    Drawing,
    Findings,
    NotInResults,
    Rows,
    difference_findings,
    grouped,
    interval_caption,
    is_narrow,
    label_outer,
    loss_axis_name,
    named,
    panel_inches,
    panels,
    sizes_caption,
    widened,
)
from plots.results import Study, number
from plots.style import bytes_text
from plots.tables import MISSING, Table, size_text

# Where a point's label may stand: right of it, above it to the right, ...
SIDES = ((1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (0, -1), (1, -1), (-1, -1))


def frontier_rows(study: Study) -> Rows:
    if any(variant.values("loss.accuracy") for variant in study.variants):
        raise NotInResults("recall shows accuracy instead")
    found = []
    for variants in study.shown_sizes.values():
        rows = []
        for variant in variants:
            loss, difference = variant.mean("loss.val_bpb"), study.difference_row(variant, "val_bpb")
            if loss is None:
                continue
            low, high = (
                loss + end - difference["difference"] if (end := difference[f"difference_{key}"]) is not None else None
                for key in ("low", "high")
            )
            point = {"kv_bytes_per_token": variant.first("kv.bytes_per_token"), "val_bpb": loss}
            bar = {"val_bpb_low": low, "val_bpb_high": high, "difference_seeds": difference["difference_seeds"]}
            rows.append(named(variant) | {"baseline": variant.label == variant.baseline} | point | bar)
        best = float("inf")
        for row in sorted(rows, key=lambda row: (row["kv_bytes_per_token"], row["val_bpb"])):
            row["on_front"] = row["val_bpb"] < best
            best = min(best, row["val_bpb"])
        found += rows
    if not found:
        raise NotInResults("no finite validation loss")
    return found


def ends(rows: Rows) -> list[float]:
    return [row[key] for row in rows for key in ("val_bpb", "val_bpb_low", "val_bpb_high") if row[key] is not None]


def draw_frontier(rows: Rows, study: Study, width: float) -> Figure:
    sizes = grouped(rows, "size")
    alone = len(sizes) == 1
    fig, axes = panels(width, len(sizes), 2.15 if alone else 1.7, 2.8 if alone else 2.1, across=(1, 3))
    limits = [widened(min(ends(group)), max(ends(group))) for group in sizes.values()]
    span = max(high - low for low, high in limits)  # so that a step up means as much in every panel
    plots = []
    for ax, (size, group), (low, high) in zip(axes, sizes.items(), limits, strict=True):
        ax.set_ylim((low + high - span) / 2, (low + high + span) / 2)
        plots.append((ax, *draw_panel(ax, group, study)))
        if alone:
            hint = "lower left is better; dashed: Pareto front"
            ax.set_title(hint, loc="right", fontsize=7, color=style.GREY, style="italic")
        else:
            ax.set_title(study.size_title(size))
    kept = f"KV cache per token{study.cache_text}"
    label_outer(axes, kept, loss_axis_name(study) if alone or not is_narrow(width) else "val bits/byte")
    names = [
        {row["label"]: style.wrapped(study.labels[row["label"]].short, 24) for row in points} for _, points, _ in plots
    ]
    fig.draw_without_rendering()
    if not all(label_points(fig, *plot, name) for plot, name in zip(plots, names, strict=True)):
        for ax in axes:
            for text in list(ax.texts):
                text.remove()
        families = {row["family"]: family_look(study, row["family"]) for row in rows}
        style.add_legend(fig, [(look.handle(), style.wrapped(name)) for name, look in families.items()])
        fig.draw_without_rendering()
        for plot in plots:
            values = {row["label"]: study.labels[row["label"]].value for row in plot[1]}
            label_points(fig, *plot, values, must=False)
    return fig


def family_look(study: Study, family: str) -> style.Look:
    return next(variant.look for variant in study.variants if variant.family == family)


def draw_panel(ax, rows: Rows, study: Study):
    """Draws one size; (points with their place `x`, the lines that labels should keep off)."""
    kept = [row["kv_bytes_per_token"] for row in rows if row["kv_bytes_per_token"] > 0] or [1]
    zero = min(kept) / 4  # where a variant that grows by nothing stands on the logarithmic axis, marked "0 B"
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
    for row in points:
        if row["baseline"]:
            ax.axhline(row["val_bpb"], color=style.GREY, linewidth=0.5, zorder=1)
            lines.append([(left / 2, row["val_bpb"]), (right * 2, row["val_bpb"])])
    for family, group in grouped(points, "family").items():
        look, group = family_look(study, family), sorted(group, key=lambda row: row["x"])
        if len(group) > 1:
            curve = [[row["x"] for row in group], [row["val_bpb"] for row in group]]
            ax.plot(*curve, color=look.color, linestyle=look.line, linewidth=0.9, zorder=2)
            lines += [list(segment) for segment in pairwise(zip(*curve, strict=True))]
        for row in group:
            if row["val_bpb_low"] is not None:
                bar = [row["val_bpb_low"], row["val_bpb_high"]]
                ax.plot([row["x"]] * 2, bar, color=look.color, linewidth=0.8, zorder=2)
            ax.plot([row["x"]], [row["val_bpb"]], linestyle="none", markersize=5.5, zorder=3, **look.marks())
    shown_zero = any(row["x"] == zero for row in points)
    ticks = style.powers_of_two(max(left / 2, 1), right * 2)
    if shown_zero:
        ticks = [zero, *(tick for tick in ticks if tick > zero)]
    text = lambda value: "0 B" if shown_zero and value == zero else bytes_text(value)  # noqa: E731
    style.octave_ticks(ax.xaxis, ticks, text, panel_inches(ax), 0.5)
    ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    return points, lines


def label_points(
    fig: Figure, ax, points: Rows, lines: list, names: dict[str, str], must: bool = True, reaches=(6, 9, 13)
) -> bool:
    """Write the points' names beside them, at most `reaches` points away and nearer than to any other point, inside the
    axes, touching no other name, marker or bar and, where that is possible, no line. What finds no room is left out,
    or, where each `must` be named, makes this stop and say False."""
    point = fig.dpi / 72  # pixels
    inside = ax.get_window_extent().padded(-point)
    taken, centers = [], ax.transData.transform([(row["x"], row["val_bpb"]) for row in points])
    for row in points:
        heights = [
            row[key] if row[key] is not None else row["val_bpb"] for key in ("val_bpb", "val_bpb_low", "val_bpb_high")
        ]
        (x, y), (_, low), (_, high) = ax.transData.transform([(row["x"], height) for height in heights])
        taken.append(Bbox.from_extents(x - 4 * point, y - 4 * point, x + 4 * point, y + 4 * point))
        taken.append(Bbox.from_extents(x - point, low, x + point, high))
    drawn = [ax.transData.transform(line) for line in lines]
    for row in sorted(points, key=lambda row: -len(names[row["label"]])):
        if not names[row["label"]]:
            continue
        own = ax.transData.transform((row["x"], row["val_bpb"]))
        text = ax.annotate(
            names[row["label"]], (row["x"], row["val_bpb"]), (0, 0), textcoords="offset points", fontsize=7.5
        )
        text.set_in_layout(False)
        choices = []
        for away, (dx, dy) in product(reaches, SIDES):
            reach = away * (0.75 if dx and dy else 1.0)
            spot = {"position": (dx * reach, dy * reach), "ha": ("center", "left", "right")[dx]}
            spot["va"] = ("center_baseline", "bottom", "top")[dy]
            text.set(**spot)
            box = text.get_window_extent().padded(0.8 * point)
            within = inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1
            if within and is_nearest(box, own, centers) and not any(box.overlaps(other) for other in taken):
                crossed = sum(crosses(box, line) for line in drawn)
                choices.append((crossed + away / 6, len(choices), spot, box))  # rather cross a line than stand far
        if choices:
            *_, spot, box = min(choices, key=lambda choice: choice[:2])
            text.set(**spot)
            taken.append(box)
        else:
            text.remove()
            if must:
                return False
    return True


def is_nearest(box: Bbox, own, points) -> bool:
    """Whether the box is nearer to its own point than to all other points, but for those in the same place."""
    away = lambda x, y: math.hypot(max(box.x0 - x, x - box.x1, 0), max(box.y0 - y, y - box.y1, 0))  # noqa: E731
    return all(away(*own) < away(*point) or math.dist(own, point) < 1 for point in points)


def crosses(box: Bbox, line) -> bool:
    """Whether a line of pixels passes through the box; sampled, which is exact enough for text."""
    for (x0, y0), (x1, y1) in pairwise(line):
        steps = max(2, int(max(abs(x1 - x0), abs(y1 - y0)) / 4))
        if any(box.contains(x0 + (x1 - x0) * i / steps, y0 + (y1 - y0) * i / steps) for i in range(steps + 1)):
            return True
    return False


def frontier_caption(study: Study, rows: Rows) -> str:
    if any(row["val_bpb_low"] is not None for row in rows):
        bars = interval_caption(study, rows, "val_bpb_low", "Bars around the means, of the difference to the baseline")
    elif study.seeds[1] == 1:
        bars = "With one seed a vertical difference cannot be told from seed noise, nor can the front."
    else:
        bars = "The results hold no intervals."
    families = " Lines join the variants of a family." * (
        len({row["family"] for row in rows}) < len({study.labels[row["label"]].short for row in rows})
    )
    if study.seeds[0] < study.seeds[1]:
        bars += " Seeds are missing: a mean is over those there are, a difference over those that both have."
    sizes = sizes_caption(study) + " All span the same range of loss." * (len(study.sizes) > 1)
    return (
        "What a kept byte buys: bytes that one further token adds to the KV cache (exact, logarithmic axis) against "
        f"validation bits per byte ({study.seeds_text}).{families} Lower left is better; dashed: Pareto front; thin "
        f"horizontal line: the baseline's loss. {bars}{sizes}"
    )


def frontier_findings(study: Study) -> Findings:
    entries = study.raw.get("bytes_for_baseline") or []
    several = [entry for entry in entries if len(entry.get("seeds") or []) > 1]
    needs = [need(study, entry) for entry in several if not is_own_family(entry)]
    if entries and not several:
        needs = ["One seed: nothing can be concluded about how many bytes a family needs for the baseline's loss."]
    losses = difference_findings(study, "val_bpb", "Loss", "loss", "bits per byte")
    return losses + [("Bytes for the baseline's loss", sentence) for sentence in needs]


def is_own_family(entry: dict) -> bool:
    """The baseline's own family needs what the baseline has, unless a smaller variant is as good: no finding."""
    value = number(entry.get("bytes_per_token"))
    at_baseline = value is not None and value == number(entry.get("baseline_bytes_per_token"))
    return at_baseline and entry.get("baseline") in (entry.get("labels") or [])


def measured(study: Study, entry: dict) -> list[float]:
    """Bytes per token of the variants that a family's curve is made of, rising."""
    known = [
        study.labels[label].first("kv.bytes_per_token") for label in entry.get("labels") or [] if label in study.labels
    ]
    return sorted(known)


def need_interval(study: Study, entry: dict) -> str:
    """Open ends run past what was measured: they are written as beyond the family's smallest or largest variant."""
    low, high, kept = number(entry.get("low")), number(entry.get("high")), measured(study, entry)
    if len(entry.get("seeds") or []) < 2 or not kept:
        return ""
    below, above = f"under {bytes_text(kept[0])}", f"over {bytes_text(kept[-1])}"
    if high is None and low == kept[-1]:
        return above
    return f"{bytes_text(low) if low is not None else below} to {bytes_text(high) if high is not None else above}"


def need(study: Study, entry: dict) -> str:
    family, baseline, kept = entry.get("family"), entry.get("baseline"), measured(study, entry)
    if entry.get("size"):
        family = f"{family} at {entry['size']}"
    n, interval = len(entry.get("seeds") or []), need_interval(study, entry)
    level = number(entry.get("level")) or 0.95
    bounds = f"{100 * level:g} % interval {interval}, n = {n}" if interval else f"n = {n}"
    if n > 1 and number(entry.get("low")) is None and number(entry.get("high")) is None:
        return f"What {family} needs for {baseline}'s loss cannot be told from the variants measured ({bounds})."
    value, of = number(entry.get("bytes_per_token")), number(entry.get("baseline_bytes_per_token"))
    if value is None:
        up_to = f", up to {bytes_text(kept[-1])} per token" if kept else ""
        return f"{family} does not reach {baseline}'s loss with the variants measured{up_to} ({bounds})."
    share = f", {100 * value / of:.3g} % of its {bytes_text(of)}" if of else ""
    labels = [study.labels[label] for label in entry.get("labels") or [] if label in study.labels]
    if constant := max((variant.first("kv.constant_bytes") or 0 for variant in labels), default=0):
        share += f", beside up to {bytes_text(constant)} a sequence however long it is"
    if entry.get("verdict") == "at most":
        return (
            f"{family} needs at most {bytes_text(value)} per token for {baseline}'s loss{share}: on the mean over "
            f"seeds its smallest variant is already as good ({bounds})."
        )
    return f"{family} reaches {baseline}'s loss with {bytes_text(value)} per token{share} ({bounds})."


def need_table(study: Study) -> Table | None:
    rows = []
    for entry in study.raw.get("bytes_for_baseline") or []:
        value, of = number(entry.get("bytes_per_token")), number(entry.get("baseline_bytes_per_token"))
        said = "at most " * (entry.get("verdict") == "at most") + size_text(value)
        rows.append(
            [
                " ".join(filter(None, (str(entry.get("family")), entry.get("size")))),
                str(entry.get("baseline")),
                size_text(of),
                said if value is not None else "not reached",
                f"{100 * value / of:.3g} %" if value is not None and of else MISSING,
                need_interval(study, entry) or MISSING,
                str(len(entry.get("seeds") or [])),
                ", ".join(map(str, entry.get("labels") or [])),
            ]
        )
    header = [
        "family",
        "baseline",
        "its KV per token",
        "family needs",
        "of the baseline's",
        "interval",
        "seeds",
        "variants",
    ]
    kept: dict[str, int] = {}  # what the bytes a token leave out, of a family at its largest
    for entry in study.raw.get("bytes_for_baseline") or []:
        labels = [study.labels[label] for label in entry.get("labels") or [] if label in study.labels]
        held, family = [label.first("kv.constant_bytes") or 0 for label in labels], str(entry.get("family"))
        kept[family] = max([kept.get(family, 0), *held])
    beside = [f"{family} up to {size_text(most)}" for family, most in kept.items() if most]
    levels = {number(entry.get("level")) or 0.95 for entry in study.raw.get("bytes_for_baseline") or []}
    notes = [
        "Interpolated along each family's variants over the logarithm of bytes, never extrapolated. Intervals "
        f"({', '.join(f'{100 * level:g} %' for level in levels)}): Student's t over seed-paired differences; an end "
        'that runs past the variants measured is written "under" the smallest or "over" the largest.',
        *[f"Beside these bytes a sequence holds, however long it is: {', '.join(beside)}."] * bool(beside),
    ]
    return Table(header, rows, "llrrrrrl", notes, "KV bytes per token for the baseline's loss") if rows else None


FIGURE = Drawing(
    "frontier", 10, "Memory against quality",
    frontier_rows, draw_frontier, frontier_caption, frontier_findings, need_table,
)  # fmt: skip
