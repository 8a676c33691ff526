"""What techniques on a trained model's KV cache cost and save: quality against the bytes that one sequence's cache
holds."""

import json

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from plots import drawing as d
from plots import style
from plots.choose import spread_evenly, without_size
from plots.labels import Point, label_points
from plots.results import Results, TechniqueResult
from plots.style import bytes_text
from plots.tables import MISSING
from plots.technique_tables import (
    by_baseline,
    count_candidates,
    option_text,
    settings_text,
    technique_tables,
    trained_further_note,
    winner_table,
)  # fmt: skip

PANELS = 6
LINES = 10  # a legend has no room for more
# No colour is black or grey and no marker is an architecture's, as those mark the full caches.
COLOURS = ("#0b4a9e", "#bf3a1b", "#33b38f", "#edb120", "#a45bb0", "#79c3ec", "#7a4a12", "#e58cb8")
MARKERS = ("<", "x", "*", ">", "d", "+", "p", "h")
QUALITY = {"val_bpb": "bits per byte of held-out text", "accuracy": "queries answered correctly"}
UNIT = {"val_bpb": "bits per byte", "accuracy": "of the queries"}
CONTROLS = ("budget", "threshold")  # options that a technique's line runs over; without any it runs over bits


def full_name(result: TechniqueResult) -> str:
    """The label with the technique and its settings in brackets; for its full cache the label alone."""
    if result.is_unchanged:
        return result.label
    options = settings_text(result)
    return f"{result.label} ({result.kind})" if options == MISSING else f"{result.label} ({result.kind}, {options})"


def line_names(drawn: list[TechniqueResult]) -> dict[str, str]:
    """Settings as JSON -> the name of their line: the technique, with the options that distinguish its lines."""
    fixed = {}
    for result in drawn:
        if not result.is_unchanged:
            runs_over = [key for key in CONTROLS if key in result.settings] or ["bits"]
            options = {key: value for key, value in result.settings.items() if key not in ("technique", *runs_over)}
            fixed[settings_key(result)] = result.technique, options
    names = {}
    for key, (technique, options) in fixed.items():
        siblings = [other for name, other in fixed.values() if name == technique]
        telling = [key for key in options if any(other.get(key) != options[key] for other in siblings)]
        names[key] = ", ".join([technique, *(option_text(key, options[key]) for key in telling)])
    return names


def settings_key(result: TechniqueResult) -> str:
    return json.dumps(result.settings, sort_keys=True)


# Figure


def drawable(results: Results) -> list[TechniqueResult]:
    """The results that can be drawn, of the largest size that has any."""
    by_size: dict[str, list[TechniqueResult]] = {}
    for result in results.techniques:
        if result.mean is not None and result.bytes_held > 0:
            by_size.setdefault(results.labels[result.label].size, []).append(result)
    return next((by_size[size] for size in reversed(results.sizes) if size in by_size), [])


def with_lines(drawn: list[TechniqueResult]) -> list[str]:
    """The labels that have more than a full cache."""
    return list(dict.fromkeys(result.label for result in drawn if not result.is_unchanged))


def technique_rows(results: Results) -> d.Rows:
    drawn = drawable(results)
    names = line_names(drawn)
    lines = list(dict.fromkeys(names.values()))[:LINES]
    shown = spread_evenly(with_lines(drawn), PANELS)
    if not shown:
        raise d.NotInResults("no techniques on the cache (`eval.techniques`)")
    rows = []
    for result in drawn:
        line, each = names.get(settings_key(result), ""), result.difference
        if line and (result.label not in shown or line not in lines):
            continue
        low, high = (result.mean + end - each.mean if end is not None else None for end in (each.low, each.high))
        what = {"technique": result.technique, "settings": settings_text(result), "line": line}
        what |= {"has_panel": result.label in shown, "bytes_held": result.bytes_held, "metric": result.metric}
        what |= {"quality": result.mean, "quality_low": low, "quality_high": high}
        rows.append(d.named(results.labels[result.label]) | what | each.row())
    return rows


def line_looks(rows: d.Rows) -> dict[str, dict]:
    """A colour and a marker for each technique, a line style for each of its lines."""
    return {
        line: {
            "color": COLOURS[index % len(COLOURS)],
            "marker": MARKERS[index % len(MARKERS)],
            "linestyle": style.LINES[(n + index // len(COLOURS)) % len(style.LINES)],
        }
        for index, group in enumerate(d.grouped([row for row in rows if row["line"]], "technique").values())
        for n, line in enumerate(d.grouped(group, "line"))
    }


def limits(rows: d.Rows) -> tuple[float, float]:
    """Limits of the axis of quality. So that a ruined model does not compress all other points, up to a quarter of the
    losses may lie above the axis, as long as it spans twice the spread of the full caches."""
    if rows[0]["metric"] == "accuracy":
        return -0.06, 1.07
    ends = [row[key] for row in rows for key in ("quality", "quality_low", "quality_high") if row[key] is not None]
    full = [row["quality"] for row in rows if not row["line"]]
    others = sorted(row["quality"] for row in rows if row["line"])
    low, high = min(ends), max(ends)
    spread = max([0.01 * low, *(value - low for value in full)])
    return d.widened(low, min(high, max(low + 2 * spread, others[3 * (len(others) - 1) // 4])))


def draw_techniques(rows: d.Rows, results: Results, width: float) -> Figure:
    labels = [label for label, group in d.grouped(rows, "label").items() if group[0]["has_panel"]]
    alone, looks = len(labels) == 1, line_looks(rows)
    fig, axes = d.panels(width, len(labels), 2.3 if alone else 1.35, 3.0 if alone else 1.9, sharex=True, sharey=True)
    full = [row for row in rows if not row["line"]]
    trained_further = {result.technique for result in results.techniques if result.trained_further}
    lines = {}
    for ax, label in zip(axes, labels, strict=True):
        ax.set_xscale("log", base=2)
        ax.set_title(style.wrapped(label))
        lines[label] = draw_lines(ax, [row for row in rows if row["label"] == label], looks, trained_further)
        for row in full:
            ax.plot(row["bytes_held"], row["quality"], linestyle="none", **full_marks(results, row, label))
    low, high = min(row["bytes_held"] for row in rows) / 1.6, max(row["bytes_held"] for row in rows) * 1.6
    axes[0].set_xlim(low, high)
    axes[0].set_ylim(*limits(rows))
    style.octave_ticks(axes[0].xaxis, style.powers_of_two(low, high), bytes_text, d.panel_inches(axes[0]), 0.5)
    axes[0].yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    quality = rows[0]["metric"]
    if quality == "accuracy":
        axes[0].yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    short = "bits/byte" if quality == "val_bpb" else "answered correctly"
    d.label_outer(axes, "cache of one sequence", short if d.is_narrow(width) else QUALITY[quality])
    for ax in axes:
        ax.tick_params(labelbottom=bool(ax.get_xlabel()))
    add_legend(fig, rows, results, trained_further)
    fig.draw_without_rendering()
    for ax, label in zip(axes, labels, strict=True):
        points = []
        for row in rows:
            if row["line"] and row["label"] != label:
                continue
            is_named = not row["line"] and row["label"] != label
            name = results.labels[row["label"]].short if is_named else ""
            points.append(Point(row["bytes_held"], row["quality"], row["quality_low"], row["quality_high"], name))
        # What is left out has its marker in the legend.
        label_points(ax, points, lines[label], may_cross=False, distances=(6, 8))
    return fig


def draw_lines(ax, rows: d.Rows, looks: dict[str, dict], trained_further: set[str]) -> list[list]:
    """Draw one model's lines, each from the model's full cache, and return their points."""
    own = [row for row in rows if not row["line"]]
    lines = []
    for line, group in d.grouped([row for row in rows if row["line"]], "line").items():
        group, look = sorted(group, key=lambda row: -row["bytes_held"]), looks[line]
        start = [] if group[0]["technique"] in trained_further else own  # it is a different model
        curve = [[row[key] for row in [*start, *group]] for key in ("bytes_held", "quality")]
        ax.plot(*curve, color=look["color"], linestyle=look["linestyle"], linewidth=0.8, zorder=2)
        lines.append(list(zip(*curve, strict=True)))
        marks = {"color": look["color"], "marker": look["marker"], "markersize": 3.6, "markeredgewidth": 0.8}
        for row in group:
            if row["quality_low"] is not None:
                bar = [row["quality_low"], row["quality_high"]]
                ax.plot([row["bytes_held"]] * 2, bar, color=look["color"], linewidth=0.6, zorder=2)
            ax.plot(row["bytes_held"], row["quality"], linestyle="none", zorder=3, **marks)
    return lines


def full_marks(results: Results, row: dict, panel: str | None = None) -> dict:
    """The marker of a full cache: black in the panel of its own model, else grey, as colours mean techniques."""
    look, is_own = results.labels[row["label"]].look, row["label"] == panel
    colour = "#111111" if is_own else style.GREY
    filled = is_own or look.fill != "full"  # hollow; half filled where another variant of its architecture is hollow
    return {"color": colour, "marker": look.marker, "markersize": 4.5, "markeredgewidth": 0.9, "zorder": 4} | {
        "fillstyle": "full" if is_own else look.fill,
        "markerfacecolor": colour if filled else "white",
        "markerfacecoloralt": "white",
    }


def add_legend(fig: Figure, rows: d.Rows, results: Results, trained_further: set[str]) -> None:
    names = {row["line"]: row["line"] for row in rows}
    names |= {row["line"]: f"{row['line']}, trained further" for row in rows if row["technique"] in trained_further}
    entries = [
        (Line2D([], [], **look, markersize=4), style.wrapped(names[line])) for line, look in line_looks(rows).items()
    ]
    full = [row for row in rows if not row["line"]]
    of_family = {row["label" if len(full) <= LINES else "family"]: row for row in reversed(full)}
    entries += [
        (Line2D([], [], linestyle="none", **full_marks(results, row)), style.wrapped(without_size(name, row["size"])))
        for name, row in reversed(of_family.items())
    ]
    style.add_legend(fig, entries)


def technique_caption(results: Results, rows: d.Rows) -> str:
    metric, drawn = rows[0]["metric"], drawable(results)
    quality, corner = QUALITY[metric], "lower"
    if metric == "accuracy":
        quality, corner = f"the share of {quality}", "upper"
    sentences = [
        "Techniques on the caches of the trained models, a panel per model: bytes that the cache of one sequence "
        f"holds at its end (logarithmic axis) against {quality} in the second halves of held-out sequences, decoded "
        f"with the technique active ({results.seeds_text}). A line starts at the model's full cache (black) and runs "
        "over what the technique may keep, or over bits where the cache is quantised. Grey: the full caches of the "
        f"other models. All panels have the same axes; {corner} left is better.",
        d.interval_caption(results, rows, "quality_low", "Bars, of the difference to the same model's full cache"),
    ]
    if above := [row["quality"] for row in rows if row["quality"] > limits(rows)[1]]:
        sentences.append(f"{len(above)} of {len(rows)} points lie above the panels, up to {max(above):.3g}.")
    shown, lines = ({row[key] for row in rows if row["line"]} for key in ("label", "line"))
    all_shown, all_lines = with_lines(drawn), set(line_names(drawn).values())
    if len(shown) < len(all_shown) or len(lines) < len(all_lines):
        sentences.append(
            f"{len(shown)} of {len(all_shown)} models and {len(lines)} of {len(all_lines)} lines are shown."
        )
    if len(results.sizes) > 1:
        sentences.append(f"Models of the size {rows[0]['size']}.")
    return " ".join([*sentences, *trained_further_note(drawn)])


# Findings


def technique_findings(results: Results) -> d.Findings:
    findings = [("At equal bytes", sentence) for sentence in equal_bytes_sentences(results)]
    return findings + [("Techniques on the cache", sentence) for sentence in cost_sentences(results)]


def equal_bytes_sentences(results: Results) -> list[str]:
    sentences, single = [], []
    for baseline, group in by_baseline(results).items():
        best, first = group[0], results.labels[baseline].baseline
        if best.difference.low is None:
            single.append(f"{baseline}: {difference_text(best)}")
            continue
        sentence = f"At the {bytes_text(best.baseline_bytes)} of {baseline}'s full cache "
        if best.best:
            sentence += f"the best of {count_candidates(group)} is {difference_text(best)}"
        else:
            sentence += f"none of {count_candidates(group)} has a better mean than {baseline} itself; the next is "
            sentence += difference_text(best)
        if first not in (baseline, best.label):
            of_first = [result for result in group if result.label == first]
            if of_first:
                sentence += f"; the best of {first}'s caches is {difference_text(of_first[0])}"
            else:
                sentence += f"; none of {first}'s caches fits"
        sentences.append(f"{sentence}.")
    if sentences:
        sentences.append(
            "Each of these was chosen by its mean from many candidates: this flatters it, and its interval is that of "
            "a single comparison."
        )
    if single:
        sentences.append(
            "One seed: nothing can be concluded about what is best at equal bytes. The best means at the bytes of each "
            f"variant are {'; '.join(single)}."
        )
    return sentences


def difference_text(result: TechniqueResult) -> str:
    each = result.difference
    text = f"{full_name(result)}, {bytes_text(result.bytes_held)}: {each.mean:+.4f} {UNIT[each.metric]}"
    return f"{text} ({each.interval})" if each.low is None else f"{text}, {each.verdict} ({each.interval})"


def cost_sentences(results: Results) -> list[str]:
    """For each technique, how often its quality is separable from the same model's full cache."""
    compared = [result for result in results.techniques if result.difference.mean is not None]
    if compared and all(result.difference.low is None for result in compared):
        return ["One seed: nothing can be concluded about what a technique costs against the full cache."]
    kinds: dict[str, list[TechniqueResult]] = {}
    for result in compared:
        if result.difference.low is not None:
            kinds.setdefault(result.kind, []).append(result)
    sentences = []
    for kind, group in kinds.items():
        verdicts = [result.difference.verdict for result in group]
        higher, lower, unclear = (verdicts.count(verdict) for verdict in ("higher", "lower", "not separable"))
        quality = "loss" if group[0].metric == "val_bpb" else "accuracy"
        most = max(group, key=lambda result: abs(result.difference.mean))
        full = "the same model's full cache"
        if most.trained_further:
            full += " after as much training"
        sentences.append(
            f"{kind}: against {full} the {quality} is higher in {higher}, lower in {lower} and not separable in "
            f"{unclear} of {len(group)} cases; the largest difference is {most.difference.mean:+.4f} "
            f"{UNIT[most.metric]} ({full_name(most)}; {most.difference.interval})."
        )
    return sentences


FIGURE = d.Drawing(
    "techniques", 25, "Techniques on the cache",
    technique_rows, draw_techniques, technique_caption, technique_findings, (winner_table,), technique_tables,
)  # fmt: skip
