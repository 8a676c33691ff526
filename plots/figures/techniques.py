"""What techniques on a trained model's cache cost and buy: quality against the bytes that one sequence's cache then
holds; and, at the bytes of each architecture's full cache, which variant under which technique is best."""

import json

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from plots import style
from plots.drawing import (
    Drawing,
    Findings,
    NotInResults,
    Rows,
    grouped,
    interval_caption,
    is_narrow,
    label_outer,
    named,
    panel_inches,
    panels,
    widened,
)
from plots.figures.frontier import crosses, is_nearest, label_points
from plots.results import Difference, Study, number, spread_evenly, tidy, without_size
from plots.style import bytes_text
from plots.tables import MISSING, NOT_FINITE, Table, figures_text, fixed_text, size_text

PANELS = 6
LINES = 10  # with more no legend has room
# None is black or grey: those are the architectures' points. Markers are none of theirs either.
COLOURS = ("#0b4a9e", "#bf3a1b", "#33b38f", "#edb120", "#a45bb0", "#79c3ec", "#7a4a12", "#e58cb8")
MARKERS = ("<", "x", "*", ">", "d", "+", "p", "h")
QUALITY = {"val_bpb": "validation bits per byte", "accuracy": "queries answered right"}
UNIT = {"val_bpb": "bits per byte", "accuracy": "of the queries"}
FURTHER = "dmc"  # acts on models that were trained further for it
CONTROLS = ("budget", "threshold")  # what a technique's line runs over; quantisation's runs over bits


# What an entry is called


def is_full(settings: dict) -> bool:
    return settings["technique"] == "full" and not settings.get("bits")


def option_text(key: str, value) -> str:
    if key == "budget" and number(value) is not None:
        return f"budget {100 * value:.4g} %" if isinstance(value, float) else f"budget {value} tokens"
    if key == "bits":
        return f"{tidy(value)} bit"
    return f"{tidy(key)} {tidy(value if isinstance(value, str | int | float) else json.dumps(value))}"


def technique_text(settings: dict) -> str:
    name = tidy(settings["technique"])
    return "quantised" if name == "full" and settings.get("bits") else name


def settings_text(settings: dict) -> str:
    return ", ".join(option_text(key, value) for key, value in settings.items() if key != "technique") or MISSING


def whole_text(entry: dict) -> str:
    """mha under h2o (budget 50 %); or the label alone, where its cache is full."""
    label, settings = tidy(entry["label"]), entry["settings"]
    if is_full(settings):
        return label
    name, options = technique_text(settings), settings_text(settings)
    return f"{label} {'' if name == 'quantised' else 'under '}{name}" + f" ({options})" * (options != MISSING)


def line_names(entries: list[dict]) -> dict[str, str]:
    """Settings as JSON -> the line that they are a point of: the technique, with those options that tell its lines
    apart."""
    fixed = {}
    for entry in (entry for entry in entries if not is_full(entry["settings"])):
        settings, name = entry["settings"], technique_text(entry["settings"])
        over = ("technique", *(["bits"] if name == "quantised" else CONTROLS))
        fixed[key_of(settings)] = name, {key: value for key, value in settings.items() if key not in over}
    found = {}
    for at, (name, options) in fixed.items():
        siblings = [other for of, other in fixed.values() if of == name]
        telling = [key for key in options if any(other.get(key) != options[key] for other in siblings)]
        found[at] = ", ".join([name, *(option_text(key, options[key]) for key in telling)])
    return found


def key_of(settings: dict) -> str:
    return json.dumps(settings, sort_keys=True)


# Figure


def measured(study: Study) -> list[dict]:
    """The entries that can be drawn: of the largest size that has any."""
    by_size: dict[str, list[dict]] = {}
    for entry in study.raw.get("techniques") or []:
        if number(entry.get("mean")) is not None and entry["bytes_held"] > 0:
            by_size.setdefault(study.labels[tidy(entry["label"])].size, []).append(entry)
    return next((by_size[size] for size in reversed(study.sizes) if size in by_size), [])


def with_lines(entries: list[dict]) -> list[str]:
    """The labels that have more than a full cache."""
    return list(dict.fromkeys(tidy(entry["label"]) for entry in entries if not is_full(entry["settings"])))


def technique_rows(study: Study) -> Rows:
    entries = measured(study)
    names = line_names(entries)
    lines = list(dict.fromkeys(names.values()))[:LINES]
    shown = spread_evenly(with_lines(entries), PANELS)
    if not shown:
        raise NotInResults("no techniques on the cache (`eval.techniques`)")
    rows = []
    for entry in entries:
        variant, settings, middle = study.labels[tidy(entry["label"])], entry["settings"], entry["mean"]
        line = names.get(key_of(settings), "")
        if line and (variant.label not in shown or line not in lines):
            continue
        of = Difference.of(entry)
        low, high = (middle + end - of.mean if end is not None else None for end in (of.low, of.high))
        what = {"technique": technique_text(settings), "settings": settings_text(settings), "line": line}
        what |= {"has_panel": variant.label in shown, "bytes_held": entry["bytes_held"], "metric": entry["metric"]}
        what |= {"quality": middle, "quality_low": low, "quality_high": high}
        rows.append(named(variant) | what | of.row())
    return rows


def line_looks(rows: Rows) -> dict[str, dict]:
    """A colour and a marker for each technique, a line style for each of its lines."""
    techniques: dict[str, list[str]] = {}
    for row in rows:
        if row["line"]:
            lines = techniques.setdefault(row["technique"], [])
            lines += [row["line"]] * (row["line"] not in lines)
    return {
        line: {
            "color": COLOURS[index % len(COLOURS)],
            "marker": MARKERS[index % len(MARKERS)],
            "linestyle": style.LINES[(n + index // len(COLOURS)) % len(style.LINES)],
        }
        for index, lines in enumerate(techniques.values())
        for n, line in enumerate(lines)
    }


def limits(rows: Rows) -> tuple[float, float]:
    """Of the axis of quality. What a technique ruins is not to press all the rest together: of losses the highest
    quarter may lie above the axis, so far as the full caches' spread is a quarter of it."""
    if rows[0]["metric"] == "accuracy":
        return -0.06, 1.07
    ends = [row[key] for row in rows for key in ("quality", "quality_low", "quality_high") if row[key] is not None]
    full = [row["quality"] for row in rows if not row["line"]]
    others = sorted(row["quality"] for row in rows if row["line"])
    low, high = min(ends), max(ends)
    spread = max([0.01 * low, *(value - low for value in full)])
    return widened(low, min(high, max(low + 4 * spread, others[3 * (len(others) - 1) // 4])))


def draw_techniques(rows: Rows, study: Study, width: float) -> Figure:
    labels = [label for label, group in grouped(rows, "label").items() if group[0]["has_panel"]]
    alone, looks = len(labels) == 1, line_looks(rows)
    fig, axes = panels(width, len(labels), 2.3 if alone else 1.35, 3.0 if alone else 1.9, sharex=True, sharey=True)
    held = [row["bytes_held"] for row in rows]
    full = [row for row in rows if not row["line"]]
    plots = []
    for ax, label in zip(axes, labels, strict=True):
        ax.set_xscale("log", base=2)
        ax.set_title(style.wrapped(label))
        own = [row for row in full if row["label"] == label]
        lines = []
        for line, group in grouped([row for row in rows if row["label"] == label and row["line"]], "line").items():
            group = sorted(group, key=lambda row: -row["bytes_held"])
            start = [] if group[0]["technique"] == FURTHER else own  # that is another model
            curve = [[row[key] for row in [*start, *group]] for key in ("bytes_held", "quality")]
            look = looks[line]
            ax.plot(*curve, color=look["color"], linestyle=look["linestyle"], linewidth=0.8, zorder=2)
            lines.append(list(zip(*curve, strict=True)))
            for row in group:
                if row["quality_low"] is not None:
                    bar = [row["quality_low"], row["quality_high"]]
                    ax.plot([row["bytes_held"]] * 2, bar, color=look["color"], linewidth=0.6, zorder=2)
                ax.plot(row["bytes_held"], row["quality"], linestyle="none", zorder=3, **marks(look))
        for row in full:
            ax.plot(row["bytes_held"], row["quality"], linestyle="none", **full_marks(study, row, label))
        plots.append((ax, label, lines))
    axes[0].set_xlim(min(held) / 1.6, max(held) * 1.6)
    axes[0].set_ylim(*limits(rows))
    style.octave_ticks(
        axes[0].xaxis, style.powers_of_two(min(held) / 1.6, max(held) * 1.6), bytes_text, panel_inches(axes[0]), 0.5
    )
    axes[0].yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    quality = rows[0]["metric"]
    if quality == "accuracy":
        axes[0].yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    short = "val bits/byte" if quality == "val_bpb" else "answered right"
    label_outer(axes, "cache of one sequence", short if is_narrow(width) else QUALITY[quality])
    for ax in axes:
        ax.tick_params(labelbottom=bool(ax.get_xlabel()))
    trained = {row["line"] for row in rows if row["technique"] == FURTHER}
    entries = [
        (Line2D([], [], **look, markersize=4), style.wrapped(f"{line}, trained further" if line in trained else line))
        for line, look in looks.items()
    ]
    of_family = {row["label" if len(full) <= LINES else "family"]: row for row in reversed(full)}
    entries += [
        (Line2D([], [], linestyle="none", **full_marks(study, row)), style.wrapped(without_size(name, row["size"])))
        for name, row in reversed(of_family.items())
    ]
    style.add_legend(fig, entries)
    fig.draw_without_rendering()
    for ax, label, lines in plots:
        label_points(fig, ax, *labelled(rows, study, label, lines), must=False, reaches=(6, 8))
        near = [row for row in rows if not row["line"] or row["label"] == label]
        points = ax.transData.transform([(row["bytes_held"], row["quality"]) for row in near])
        for text in list(ax.texts):
            crossed = any(crosses(text.get_window_extent(), ax.transData.transform(line)) for line in lines)
            own = ax.transData.transform(text.xy)
            if crossed or not is_nearest(text.get_window_extent(), own, points):
                text.remove()  # the legend has the marker
    return fig


def marks(look: dict) -> dict:
    return {"color": look["color"], "marker": look["marker"], "markersize": 3.6, "markeredgewidth": 0.8}


def full_marks(study: Study, row: dict, own: str | None = None) -> dict:
    """An architecture's marker in grey, the panel's own in black: colours are the techniques'."""
    look, is_own = study.labels[row["label"]].look, row["label"] == own
    colour = "#111111" if is_own else style.GREY
    filled = is_own or look.fill != "full"  # hollow, and half filled where another of its architecture is hollow
    return {"color": colour, "marker": look.marker, "markersize": 4.5, "markeredgewidth": 0.9, "zorder": 4} | {
        "fillstyle": "full" if is_own else look.fill,
        "markerfacecolor": colour if filled else "white",
        "markerfacecoloralt": "white",
    }


def labelled(rows: Rows, study: Study, label: str, lines: list) -> tuple[list, list, dict[str, str]]:
    """What `label_points` takes: the full caches' points by name, the others' as places to keep off."""
    points = [
        {"label": "" if row["line"] else row["label"], "x": row["bytes_held"], "val_bpb": row["quality"]}
        | {"val_bpb_low": row["quality_low"], "val_bpb_high": row["quality_high"]}
        for row in rows
        if not row["line"] or row["label"] == label
    ]
    names = {
        point["label"]: "" if point["label"] == label else study.labels[point["label"]].short
        for point in points
        if point["label"]
    }
    return points, lines, names | {"": ""}


def technique_caption(study: Study, rows: Rows) -> str:
    metric, entries = rows[0]["metric"], measured(study)
    shown, lines = ({row[key] for row in rows if row["line"]} for key in ("label", "line"))
    all_shown, all_lines = with_lines(entries), set(line_names(entries).values())
    beyond = [row["quality"] for row in rows if row["quality"] > limits(rows)[1]]
    better, quality = ("lower", "") if metric == "val_bpb" else ("upper", "the share of ")
    return (
        "Techniques on the caches of the trained models, a panel a model: bytes that the cache of one sequence holds "
        f"at its end (logarithmic axis) against {quality}{QUALITY[metric]} in the second halves of held-out sequences, "
        f"decoded with the technique active ({study.seeds_text}). A line starts at the model's full cache (black) and "
        "runs over what the technique may keep, or over bits where the cache is quantised. Grey: the full caches of "
        f"the other models. Axes alike; {better} left is better. "
        + interval_caption(study, rows, "quality_low", "Bars, of the difference to the same model's full cache")
        + f" {len(beyond)} of {len(rows)} points lie above the panels, up to {max(beyond, default=0):.3g}."
        * bool(beyond)
        + f" {len(shown)} of {len(all_shown)} models, {len(lines)} of {len(all_lines)} lines."
        * (len(shown) < len(all_shown) or len(lines) < len(all_lines))
        + f" Models of the size {rows[0]['size']}." * (len(study.sizes) > 1)
        + trained_on(entries)
    )


def trained_on(entries: list[dict]) -> str:
    """What is unlike the others about a technique that changes the weights."""
    if not any(entry["settings"]["technique"] == FURTHER for entry in entries):
        return ""
    return (
        " dmc's models were trained further: they are compared with the same models trained as much further under a "
        "full cache (dmc, budget 100 %), which differ from the others' by what more tokens buy."
    )


# Findings


def by_baseline(study: Study) -> dict[str, list[dict]]:
    """Of each variant what holds at most the bytes of its full cache, the best first."""
    found: dict[str, list[dict]] = {}
    for entry in study.raw.get("equal_bytes") or []:
        found.setdefault(tidy(entry["baseline"]), []).append(entry)
    return {
        label: sorted(of, key=lambda entry: entry["mean_diff"] * (1 if entry["metric"] == "val_bpb" else -1))
        for label, of in found.items()
    }


def count_of(entries: list[dict]) -> int:
    return sum(int(number(entry.get("chosen_from")) or 1) for entry in entries)


def technique_findings(study: Study) -> Findings:
    return [("At equal bytes", said) for said in equal_bytes_findings(study)] + [
        ("Techniques on the cache", said) for said in own_findings(study)
    ]


def equal_bytes_findings(study: Study) -> list[str]:
    found, single = [], []
    for baseline, entries in by_baseline(study).items():
        at = f"At the {bytes_text(entries[0]['baseline_bytes'])} of {baseline}'s full cache"
        if Difference.of(entries[0]).low is None:
            single.append(f"{baseline}: {against(entries[0])}")
            continue
        if entries[0].get("best"):
            said = f"{at} the best of {count_of(entries)} is {against(entries[0])}"
        else:
            said = f"{at} none of {count_of(entries)} has a better mean than {baseline} itself; the next is "
            said += against(entries[0])
        first = study.labels[baseline].baseline
        if first not in (baseline, tidy(entries[0]["label"])):
            of_first = [entry for entry in entries if tidy(entry["label"]) == first]
            said += (
                f"; of {first}'s caches the best is {against(of_first[0])}" if of_first else f"; none of {first}'s fits"
            )
        found.append(f"{said}.")
    if found:
        found.append(
            "Each of these was chosen by its mean from so many: that flatters it, and its interval is that of a single "
            "comparison."
        )
    if single:
        found.append(
            "One seed: nothing can be concluded about what is best at equal bytes. Best means seen at the bytes of "
            f"{'; '.join(single)}."
        )
    return found


def against(entry: dict) -> str:
    each = Difference.of(entry)
    told = f", {each.verdict if each.separable else 'not separable'}" if each.low is not None else ""
    return (
        f"{whole_text(entry)}, {bytes_text(entry['bytes_held'])}: {each.mean:+.4f} {UNIT[each.metric]}{told} "
        f"({each.interval})"
    )


def own_findings(study: Study) -> list[str]:
    """How often each technique's quality was told apart from the same model's full cache."""
    found = []
    compared = [entry for entry in study.raw.get("techniques") or [] if number(entry.get("mean_diff")) is not None]
    if compared and all(Difference.of(entry).low is None for entry in compared):
        return ["One seed: nothing can be concluded about what a technique costs against the full cache."]
    kinds: dict[str, list[dict]] = {}
    for entry in compared:
        if Difference.of(entry).low is not None:
            kinds.setdefault(kind_of(entry), []).append(entry)
    for kind, entries in kinds.items():
        verdicts = [Difference.of(entry).verdict for entry in entries]
        quality = "loss" if entries[0]["metric"] == "val_bpb" else "accuracy"
        most = max(entries, key=lambda entry: abs(entry["mean_diff"]))
        each = Difference.of(most)
        as_much = " after as much training" * (entries[0]["settings"]["technique"] == FURTHER)
        higher, lower, unclear = (verdicts.count(verdict) for verdict in ("higher", "lower", "not separable"))
        found.append(
            f"{kind}: against the same model's full cache{as_much} the {quality} is higher in {higher}, "
            f"lower in {lower} and not separable in {unclear} of {len(entries)} cases; the largest difference is "
            f"{each.mean:+.4f} {UNIT[each.metric]} ({whole_text(most)}; {each.interval})."
        )
    return found


def kind_of(entry: dict) -> str:
    return tidy(entry.get("kind") or technique_text(entry["settings"]))


# Tables


def difference_cells(entry: dict) -> list[str]:
    each = Difference.of(entry)
    interval = f"{each.low:+.4f} to {each.high:+.4f}" if each.low is not None else MISSING
    compared = each.mean is not None
    return [
        f"{each.mean:+.4f}" if compared else MISSING,
        interval,
        str(each.seeds),
        each.verdict if compared else MISSING,
    ]


def what_cells(entry: dict) -> list[str]:
    settings = entry["settings"]
    return [
        tidy(entry["label"]),
        technique_text(settings),
        settings_text(settings),
        size_text(entry["bytes_held"]),
        fixed_text(entry.get("mean"), 4),
    ]


def heading(entries: list[dict]) -> str:
    return "val bits/byte" if entries[0]["metric"] == "val_bpb" else "accuracy"


def level_text(study: Study) -> str:
    return f"Intervals ({', '.join(f'{level:g} %' for level in study.levels)})" if study.levels else "No intervals"


def notes(study: Study) -> list[str]:
    entries = study.raw.get("techniques") or []
    return [
        "Bytes: of one sequence's cache at its end, without what a technique notes beside it; quality: over the second "
        "half, decoded with the technique active." + trained_on(entries),
    ]


def chosen_notes(study: Study) -> list[str]:
    return [
        "Chosen from every variant of the same size under every technique and setting measured, and from the others' "
        "full caches, where they hold at most those bytes and 1 % (slots and groups are whole). Differences are to the "
        f"variant trained for those bytes, paired by seed. {level_text(study)}: Student's t.",
        "The best is chosen by its mean: among many that flatters it, and its interval is that of a single comparison.",
    ]


def winner_table(study: Study) -> Table | None:
    """At the bytes of each variant's full cache: what is best."""
    rows = []
    for baseline, entries in by_baseline(study).items():
        first, own = entries[0], own_quality(study, baseline)
        cells = [*what_cells(first), *difference_cells(first)]
        if not first.get("best"):
            cells = [baseline, "full", MISSING, size_text(first["baseline_bytes"]), own, *[MISSING] * 4]
        rows.append([baseline, size_text(first["baseline_bytes"]), own, *cells, str(count_of(entries))])
    if not rows:
        return None
    quality = heading(study.raw["equal_bytes"])
    header = ["at the bytes of", "its full cache", f"its {quality}", "best", "technique", "settings", "cache held"]
    header += [quality, "difference", "interval", "seeds", "verdict", "chosen from"]
    said = [*chosen_notes(study), *notes(study)]
    return Table(header, rows, "lrrlllrrrrrlr", said, "At equal bytes, which is best")


def own_quality(study: Study, label: str) -> str:
    full = [entry for entry in study.raw.get("techniques") or [] if is_full(entry["settings"])]
    return fixed_text(next((entry.get("mean") for entry in full if tidy(entry["label"]) == label), None), 4)


def technique_tables(study: Study) -> list[Table]:
    firsts = {variants[0].baseline for variants in study.sizes.values()}
    chosen = {
        "At equal bytes, the best of each variant": best_of_each(study),
        f"At equal bytes, the best of each technique on {', '.join(sorted(firsts))}": {
            baseline: [entry for entry in entries if tidy(entry["label"]) in firsts]
            for baseline, entries in by_baseline(study).items()
        },
    }
    found = [chosen_table(study, title, of) for title, of in chosen.items()]
    return [table for table in (*found, all_table(study)) if table]


def best_of_each(study: Study) -> dict[str, list[dict]]:
    """Of each baseline's entries the best of each variant, chosen from all of that variant."""
    found = {}
    for baseline, entries in by_baseline(study).items():
        labels: dict[str, list[dict]] = {}
        for entry in entries:
            labels.setdefault(tidy(entry["label"]), []).append(entry)
        found[baseline] = [of[0] | {"chosen_from": count_of(of)} for of in labels.values()]
    return found


def chosen_table(study: Study, title: str, chosen: dict[str, list[dict]]) -> Table | None:
    rows = []
    for baseline, entries in chosen.items():
        for entry in entries:
            at, many = [baseline, size_text(entry["baseline_bytes"])], str(count_of([entry]))
            rows.append([*at, *what_cells(entry), *difference_cells(entry), many])
    if not rows:
        return None
    header = ["at the bytes of", "its full cache", "variant", "technique", "settings", "cache held"]
    header += [heading(study.raw["equal_bytes"]), "difference", "interval", "seeds", "verdict", "best of"]
    return Table(header, rows, "lrlllrrrrrlr", chosen_notes(study), title, folded=True)


def all_table(study: Study) -> Table | None:
    entries = study.raw.get("techniques") or []
    there = [entry for entry in entries if "skipped" not in entry]
    if not there:
        return None
    full = {tidy(entry["label"]): entry["bytes_held"] for entry in there if is_full(entry["settings"])}
    rows = []
    for entry in there:
        *what, quality = what_cells(entry)
        of = full.get(tidy(entry["label"]))
        share = f"{100 * entry['bytes_held'] / of:.3g} %" if of else MISSING
        mark = NOT_FINITE * bool(entry.get("not_finite"))
        compared = difference_cells(entry)
        beside = [share, size_text(entry.get("notes_bytes")), quality + mark]
        rows.append([*what, *beside, *compared, figures_text(entry.get("tokens_per_s"))])
    said = [f"Differences are to the same variant's full cache, paired by seed. {level_text(study)}: Student's t."]
    said += notes(study)
    if any(entry.get("not_finite") for entry in there):
        said.append(f"{NOT_FINITE} Not finite at some seed: the mean is over the others, and it is no candidate above.")
    skipped: dict[tuple[str, str], list[str]] = {}
    for entry in (entry for entry in entries if "skipped" in entry):
        names = skipped.setdefault((tidy(entry["label"]), tidy(entry["skipped"])), [])
        names += [name for name in [kind_of(entry)] if name not in names]
    said += [f"Not measured: {label} under {', '.join(names)}: {why}." for (label, why), names in skipped.items()]
    header = ["variant", "technique", "settings", "cache held", "of its full cache", "notes beside it", heading(there)]
    header += ["difference", "interval", "seeds", "verdict", "decode tokens/s"]
    return Table(header, rows, "lllrrrrrrrlr", said, "Techniques on the cache", folded=True)


FIGURE = Drawing(
    "techniques", 25, "Techniques on the cache",
    technique_rows, draw_techniques, technique_caption, technique_findings, winner_table, technique_tables,
)  # fmt: skip
