"""The five figures. Each is two functions: `*_rows` turns a study into the rows of its CSV (or says why it cannot), and
`draw_*` draws those rows and nothing else, so a figure's CSV is exactly what it shows."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from plots import style
from plots.results import Study, Variant, mean, number

Rows = list[dict]


# Where a point's label may stand: right of it, above it to the right, ...
SIDES = ((1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (0, -1), (1, -1), (-1, -1))


class NotInResults(Exception):
    """Raised by a `*_rows` function: the results hold nothing for this figure; the message says what is missing."""


@dataclass(frozen=True)
class Drawing:
    title: str
    rows: Callable[[Study], Rows]
    draw: Callable[[Rows, Study, float], Figure]  # (rows, study, page width in inches)
    caption: Callable[[Study, Rows], str]


def new_figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def by_label(rows: Rows) -> dict[str, Rows]:
    groups: dict[str, Rows] = {}
    for row in rows:
        groups.setdefault(row["label"], []).append(row)
    return groups


def named(variant: Variant) -> dict:
    return {"label": variant.label, "arch": variant.arch, "seeds": variant.seeds}


def spread(values: list[float]) -> dict:
    """Validation bits per byte over seeds."""
    return {"val_bpb": mean(values), "val_bpb_min": min(values), "val_bpb_max": max(values)}


def widened(low: float, high: float) -> tuple[float, float]:
    """Limits for an axis of losses. They span 1 % at least, or the figure would blow differences far below seed noise
    up to its full height."""
    spare = max(0.0, 0.01 * high - (high - low)) / 2
    margin = 0.16 * (high - low + 2 * spare)
    return low - spare - margin, high + spare + margin


def looks(study: Study) -> dict[str, style.Look]:
    return {variant.label: variant.look for variant in study.variants}


# -- frontier: what a kept byte buys --------------------------------------------------------------------------------


def frontier_rows(study: Study) -> Rows:
    rows = [
        named(variant) | {"kv_bytes_per_token": variant.first("kv.bytes_per_token")} | spread(losses)
        for variant in study.variants
        if (losses := variant.values("loss.val_bpb"))
    ]
    if not rows:
        raise NotInResults("no finite validation loss")
    best = float("inf")
    for row in sorted(rows, key=lambda row: (row["kv_bytes_per_token"], row["val_bpb"])):
        row["on_front"] = row["val_bpb"] < best
        best = min(best, row["val_bpb"])
    return rows


def draw_frontier(rows: Rows, study: Study, width: float) -> Figure:
    fig = new_figure(width, 2.45 if width < 5 else 3.1)
    ax = fig.add_subplot()
    sizes = [row["kv_bytes_per_token"] for row in rows if row["kv_bytes_per_token"] > 0] or [1]
    zero = min(sizes) / 4  # where a variant that grows by nothing stands on the logarithmic axis, marked "0 B"
    place = {row["label"]: row["kv_bytes_per_token"] or zero for row in rows}
    left, right = min(place.values()), max(place.values())
    ax.set_xscale("log", base=2)
    ax.set_xlim(left / 2, right * 2)
    ax.set_ylim(*widened(min(row["val_bpb_min"] for row in rows), max(row["val_bpb_max"] for row in rows)))

    front = sorted((row for row in rows if row["on_front"]), key=lambda row: place[row["label"]])
    xs = [place[row["label"]] for row in front]
    ys = [row["val_bpb"] for row in front]
    step = {"drawstyle": "steps-post", "color": style.GREY, "linewidth": 0.7, "linestyle": (0, (3, 2)), "zorder": 1}
    ax.plot([xs[0], *xs, right * 2], [ax.get_ylim()[1], *ys, ys[-1]], **step)
    look = looks(study)
    for row in rows:
        x, marks = place[row["label"]], look[row["label"]].marks()
        if row["seeds"] > 1:
            ax.plot([x, x], [row["val_bpb_min"], row["val_bpb_max"]], color=marks["color"], linewidth=0.8, zorder=2)
        ax.plot([x], [row["val_bpb"]], linestyle="none", markersize=5.5, zorder=3, **marks)
    ticks = style.powers_of_two(max(left / 2, 1), right * 2)
    if zero in place.values():
        ticks = [zero, *(tick for tick in ticks if tick > zero)]
    text = lambda value: "0 B" if value == zero and zero in place.values() else style.bytes_text(value)  # noqa: E731
    style.octave_ticks(ax.xaxis, ticks, text, width - 0.6, 0.5)
    ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    ax.set_xlabel("KV cache per token")
    ax.set_ylabel(f"validation bits per byte\n({study.seeds_text})")
    ax.set_title(
        "lower left is better; dashed: Pareto front", loc="right", fontsize=7, color=style.GREY, style="italic"
    )
    points = [row | {"x": place[row["label"]]} for row in rows]
    if not label_points(fig, ax, points, list(zip(xs, ys, strict=True))):
        style.add_legend(fig, [(look[row["label"]].handle("none"), style.wrapped(row["label"])) for row in rows])
    return fig


def label_points(fig: Figure, ax, points: Rows, front: list[tuple[float, float]]) -> bool:
    """Write each point's label beside it; False, with nothing written, if they cannot all be placed inside the axes
    without touching another label, a marker or a bar. The front's line is avoided where that is possible."""
    fig.draw_without_rendering()
    point = fig.dpi / 72  # pixels
    inside = ax.get_window_extent().padded(-point)
    taken = []
    for row in points:
        ends = ax.transData.transform([(row["x"], row[key]) for key in ("val_bpb", "val_bpb_min", "val_bpb_max")])
        (x, y), (_, low), (_, high) = ends
        taken.append(Bbox.from_extents(x - 4 * point, y - 4 * point, x + 4 * point, y + 4 * point))
        taken.append(Bbox.from_extents(x - point, low, x + point, high))
    corners = [ax.transData.transform(xy) for xy in front]
    corners = [(corners[0][0], inside.y1), *corners, (inside.x1, corners[-1][1])]
    steps = [Bbox.from_extents(x0, y0 - 1, x1, y0 + 1) for (x0, y0), (x1, _) in pairwise(corners)]
    steps += [Bbox.from_extents(x1 - 1, y1, x1 + 1, y0) for (_, y0), (x1, y1) in pairwise(corners)]
    written = []
    for row in points:
        name, at = style.wrapped(row["label"], 24), (row["x"], row["val_bpb"])
        text = ax.annotate(name, at, (0, 0), textcoords="offset points", fontsize=7.5)
        text.set_in_layout(False)
        written.append(text)
        choices = []
        for away, (dx, dy) in product((6, 9, 13), SIDES):
            reach = away * (0.75 if dx and dy else 1.0)
            spot = {"position": (dx * reach, dy * reach), "ha": ("center", "left", "right")[dx]}
            spot["va"] = ("center_baseline", "bottom", "top")[dy]
            text.set(**spot)
            box = text.get_window_extent().padded(0.8 * point)
            within = inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1
            if within and not any(box.overlaps(other) for other in taken):
                crossed = sum(box.overlaps(step) for step in steps)
                choices.append((crossed + away / 6, len(choices), spot, box))  # rather cross the front than stand far
        if not choices:
            for text in written:
                text.remove()
            return False
        *_, spot, box = min(choices, key=lambda choice: choice[:2])
        text.set(**spot)
        taken.append(box)
    return True


def frontier_caption(study: Study, rows: Rows) -> str:
    bars, noise = "; bars reach from the lowest to the highest seed", ""
    if study.seeds[1] == 1:
        bars, noise = "", " With one seed a vertical difference cannot be told from seed noise, nor can the front."
    return (
        "What a kept byte buys: bytes that one further token adds to the KV cache (exact, logarithmic axis) against "
        f"validation bits per byte ({study.seeds_text}{bars}). Lower left is better; dashed: Pareto front.{noise}"
    )


# -- cache_bytes: what one sequence holds ---------------------------------------------------------------------------


def cache_rows(study: Study) -> Rows:
    stored = {v.label: {int(k): n for k, n in (v.first("kv.stored_bytes") or {}).items()} for v in study.variants}
    contexts = sorted(set.union(*map(set, stored.values())))
    long = [context for context in contexts if context >= 1024 and context & (context - 1) == 0]
    cost = {
        v.label: {key: v.first(f"kv.{key}") for key in ("constant_bytes", "bytes_per_token")} for v in study.variants
    }
    rows = [
        named(variant) | {"context": context, "cache_bytes": stored[variant.label][context]} | cost[variant.label]
        for variant in study.variants
        for context in (long if len(long) > 1 else contexts)
        if stored[variant.label].get(context, 0) > 0
    ]
    if not rows:
        raise NotInResults("no kv.stored_bytes")
    return rows


def draw_cache(rows: Rows, study: Study, width: float) -> Figure:
    fig = new_figure(width, 2.2 if width < 5 else 2.9)
    ax = fig.add_subplot()
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    look, entries = looks(study), []
    for index, (label, group) in enumerate(by_label(rows).items()):
        xs, ys = [row["context"] for row in group], [row["cache_bytes"] for row in group]
        # Markers stand at different places on each line, so that lines on top of each other are both seen.
        ax.plot(
            xs, ys, linestyle=look[label].line, markevery=(index % 3, 3) if len(xs) > 6 else 1, **look[label].marks()
        )
        constant, each = group[0]["constant_bytes"], style.bytes_text(group[0]["bytes_per_token"]) + "/token"
        cost = f"{style.bytes_text(constant)} + {each}" if constant else each
        entries.append(
            (look[label].handle(), f"{style.wrapped(label)}{': ' if len(label) < 14 else ':' + chr(10)}{cost}")
        )
    ax.margins(0.03)
    octave_axis(ax.xaxis, [row["context"] for row in rows], style.tokens_text, width - 0.6, 0.32)
    low, high = ax.get_ylim()
    if high / low < 4:
        low, high = ax.set_ylim(low / 2, high * 2)
    style.octave_ticks(ax.yaxis, style.powers_of_two(low, high), style.bytes_text, fig.get_figheight() - 0.5, 0.3)
    ax.set_xlabel("context (tokens)")
    ax.set_ylabel("cache of one sequence")
    style.add_legend(fig, entries)
    return fig


def octave_axis(axis, values, text, inches: float, gap: float) -> None:
    """Ticks at the values measured; an axis of one value gets an octave either side."""
    values = sorted(set(values))
    if len(values) == 1:
        axis.set_view_interval(values[0] / 2, values[0] * 2, ignore=True)
    style.octave_ticks(axis, values, text, inches, gap)


def cache_caption(study: Study, rows: Rows) -> str:
    dtypes = sorted({str(variant.first("kv.dtype")) for variant in study.variants if variant.first("kv.dtype")})
    return (
        f"KV cache that one sequence holds{' in ' + ' / '.join(dtypes) if dtypes else ''}, against context; both axes "
        "logarithmic. Legend: the constant part (windows, recurrent states) and what each further token adds. Exact "
        "byte counts: no timing and no seeds involved."
    )


# -- decode: tokens per second --------------------------------------------------------------------------------------


def decode_rows(study: Study) -> Rows:
    rows = []
    for variant in study.variants:
        for (batch, context), point in variant.decode.items():
            half = (point["token_ms_iqr"] or 0.0) / 2 / point["token_ms"]
            speed = point["tokens_per_s"]
            ends = {
                "tokens_per_s_low": speed / (1 + half),
                "tokens_per_s_high": speed / max(1 - half, 0.1),
            }  # finite, however noisy
            said = {key: point[key] for key in ("memory_bound", "backend")}
            rows.append(named(variant) | {"batch": batch, "context": context, "tokens_per_s": speed} | ends | said)
    if not rows:
        raise NotInResults("no decode timings")
    return rows


def draw_decode(rows: Rows, study: Study, width: float) -> Figure:
    batches = sorted({row["batch"] for row in rows})
    across = min(len(batches), 2 if width < 5 else 4)
    down = -(-len(batches) // across)
    fig = new_figure(width, 0.3 + down * (1.65 if width < 5 else 2.1))
    grid = fig.subplots(down, across, squeeze=False).flat
    look = looks(study)
    for index, (ax, batch) in enumerate(zip(grid, batches, strict=False)):
        panel = [row for row in rows if row["batch"] == batch]
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        for label, group in by_label(panel).items():
            xs, ys = [row["context"] for row in group], [row["tokens_per_s"] for row in group]
            down_up = [
                [row["tokens_per_s"] - row["tokens_per_s_low"] for row in group],
                [row["tokens_per_s_high"] - row["tokens_per_s"] for row in group],
            ]
            color = look[label].color
            ax.errorbar(xs, ys, yerr=down_up, fmt="none", ecolor=color, elinewidth=0.6, capsize=1.5, capthick=0.6)
            ax.plot(xs, ys, linestyle=look[label].line, color=color, linewidth=0.9)
            for x, y, row in zip(xs, ys, group, strict=True):
                ax.plot([x], [y], linestyle="none", **look[label].marks(hollow=row["memory_bound"] is False))
        ax.margins(0.08)
        octave_axis(ax.xaxis, [row["context"] for row in panel], style.tokens_text, width / across - 0.6, 0.26)
        style.decimal_ticks(ax.yaxis)
        ax.set_title(f"batch {batch}")
        if index % across == 0:
            ax.set_ylabel("decode tokens/s")
        if index + across >= len(batches):
            ax.set_xlabel("context (tokens)")
    for ax in list(fig.axes)[len(batches) :]:
        ax.remove()
    entries = [(look[label].handle(), style.wrapped(label)) for label in by_label(rows)]
    if any(row["memory_bound"] is False for row in rows):
        hollow = Line2D([], [], color=style.GREY, marker="o", markerfacecolor="white", linestyle="none")
        entries.append((hollow, "hollow: not memory-bound"))
    style.add_legend(fig, entries)
    return fig


def decode_caption(study: Study, rows: Rows) -> str:
    flags = [row["memory_bound"] for row in rows]
    bound = (
        f"Hollow points ({flags.count(False)} of {len(flags)}): launches, Python or arithmetic set the time, not "
        "memory; they say nothing about what a smaller cache saves."
    )
    if None in flags:
        bound = "The results do not say which points memory bounds."
    elif all(flags):
        bound = "Every point is bound by memory traffic."
    return (
        "Tokens decoded per second by the whole batch, prefill excluded, against the context held in the cache; one "
        f"panel a batch size, each with its own scale; both axes logarithmic. Median ({study.seeds_text}); bars: "
        f"interquartile range of the step time. {bound}"
    )


# -- curves: loss while training ------------------------------------------------------------------------------------


def curve_rows(study: Study) -> Rows:
    rows = []
    for variant in study.variants:
        points: dict[int, list[float]] = {}
        for run in variant.runs:
            for point in run.get("curve") or []:
                if number(point.get("tokens")) is not None and number(point.get("val_bpb")) is not None:
                    points.setdefault(point["tokens"], []).append(point["val_bpb"])
        for tokens, values in sorted(points.items()):
            rows.append(named(variant) | {"tokens": tokens} | spread(values) | {"seeds": len(values)})
    if not rows:
        raise NotInResults("no training curves (`curve`)")
    return rows


def draw_curves(rows: Rows, study: Study, width: float) -> Figure:
    """All of training, and beside it the last third on a scale of its own: there the curves come apart."""
    fig = new_figure(width, 1.9 if width < 5 else 2.6)
    late = [row for row in rows if row["tokens"] >= 2 / 3 * max(row["tokens"] for row in rows)]
    panels = [("whole training", rows), ("last third", late)][: 2 if len({row["tokens"] for row in late}) > 1 else 1]
    look, axes = looks(study), fig.subplots(1, len(panels), squeeze=False)[0]
    for ax, (title, part) in zip(axes, panels, strict=True):
        for index, (label, group) in enumerate(by_label(part).items()):
            xs, low, high = ([row[key] for row in group] for key in ("tokens", "val_bpb_min", "val_bpb_max"))
            every = max(1, len(xs) // 5)
            marks = look[label].marks() | {"markevery": (index % every, every), "linestyle": look[label].line}
            ax.plot(xs, [row["val_bpb"] for row in group], markersize=3.2, **marks)
            if low != high:
                ax.fill_between(xs, low, high, color=look[label].color, alpha=0.18, linewidth=0)
        if part is late:
            ax.set_ylim(*widened(min(row["val_bpb_min"] for row in late), max(row["val_bpb_max"] for row in late)))
        ax.margins(0.04)
        ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        ax.xaxis.set_major_locator(MaxNLocator(3 if width < 5 else 5, steps=[1, 2, 4, 5, 10]))
        ax.xaxis.set_major_formatter(lambda value, _: style.plain_text(value))
        ax.set_title(title)
        ax.set_xlabel("training tokens")
    axes[0].set_ylabel(f"validation bits per byte\n({study.seeds_text})")
    style.add_legend(fig, [(look[label].handle(), style.wrapped(label)) for label in by_label(rows)])
    return fig


def curve_caption(study: Study, rows: Rows) -> str:
    band = "" if study.seeds[1] == 1 else "; bands reach from the lowest to the highest seed"
    return (
        f"Validation bits per byte against training tokens seen ({study.seeds_text}{band}); right: the last third, on "
        "a scale of its own. All variants of a seed see the same tokens in the same order."
    )


# -- recompute: why the cache exists --------------------------------------------------------------------------------


def recompute_rows(study: Study) -> Rows:
    rows = []
    for variant in study.variants:
        cached, recomputed = variant.mean("recompute.cached_ms"), variant.mean("recompute.recomputed_ms")
        if cached and recomputed and min(cached, recomputed) > 0:
            at = {key: variant.first(f"recompute.{key}") for key in ("batch", "context")}
            times = {"cached_ms": cached, "recomputed_ms": recomputed, "speed_up": recomputed / cached}
            rows.append(named(variant) | at | times)
    if not rows:
        raise NotInResults("no timings with and without the cache (`recompute`)")
    return rows


def draw_recompute(rows: Rows, study: Study, width: float) -> Figure:
    names = [style.wrapped(row["label"], 20) for row in rows]
    fig = new_figure(width, 0.55 + (0.34 if any("\n" in name for name in names) else 0.24) * len(rows))
    ax = fig.add_subplot()
    look = looks(study)
    beside = partial(ax.annotate, textcoords="offset points", fontsize=7.5, annotation_clip=False)
    for y, row in enumerate(rows):
        marks, ms = look[row["label"]].marks(), (row["cached_ms"], row["recomputed_ms"])
        ax.plot(ms, (y, y), color=marks["color"], linewidth=0.7, zorder=2)
        ax.plot(ms[:1], [y], linestyle="none", zorder=3, **marks)
        ax.plot(ms[1:], [y], linestyle="none", marker="x", color=marks["color"], markeredgewidth=1.1, zorder=3)
        beside(f"{row['speed_up']:.1f}\u00d7", (1, y), (4, 0), xycoords=("axes fraction", "data"), va="center")
    beside("speed-up", (1, 1), (4, 2), xycoords="axes fraction", color=style.GREY, style="italic")
    ax.set_xscale("log")
    ax.margins(x=0.06)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_yticks(range(len(rows)), names)
    ax.tick_params(axis="y", length=0)
    ax.yaxis.grid(False)
    style.decimal_ticks(ax.xaxis)
    ax.set_xlabel("time per token (ms)")
    filled = Line2D([], [], color=style.GREY, marker="o", linestyle="none")
    cross = Line2D([], [], color=style.GREY, marker="x", markeredgewidth=1.1, linestyle="none")
    style.add_legend(fig, [(filled, "with the cache"), (cross, "whole prefix recomputed")])
    return fig


def recompute_caption(study: Study, rows: Rows) -> str:
    at = " / ".join(sorted({f"batch {row['batch']}, context {row['context']}" for row in rows}))
    return (
        f"Time for one further token at {at}: from the cache, and by recomputing the whole prefix (logarithmic axis; "
        f"{study.seeds_text}). The factor is the second over the first: what keeping keys and values is for."
    )


FIGURES = {
    "frontier": Drawing("Memory against quality", frontier_rows, draw_frontier, frontier_caption),
    "cache_bytes": Drawing("Cache of one sequence", cache_rows, draw_cache, cache_caption),
    "decode": Drawing("Decode speed", decode_rows, draw_decode, decode_caption),
    "curves": Drawing("Training", curve_rows, draw_curves, curve_caption),
    "recompute": Drawing("With and without the cache", recompute_rows, draw_recompute, recompute_caption),
}
