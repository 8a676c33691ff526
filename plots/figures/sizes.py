"""Loss by model size: whether a gap between variants persists as models grow, and what it is worth in training compute
and in bytes of cache."""

import math
from itertools import chain

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from plots import drawing as d
from plots import style
from plots.results import Difference, Results, VariantResults, mean, number
from plots.style import plain_text
from plots.tables import MISSING, Table, share_text, significant, size_text

BEYOND = "beyond twice the trained compute"
EQUAL = 1.3  # sizes whose parameters differ by less than this factor differ in the recipe, not in size


def size_rows(results: Results) -> d.Rows:
    if len(results.sizes) < 2:
        raise d.NotInResults("one model size")
    if are_equal(results):
        raise d.NotInResults("sizes of equal parameters")
    rows = []
    for variant in chain(*results.sizes.values()):
        params, loss = number(variant.first("params")), variant.mean("loss.val_bpb")
        if params and loss is not None:
            per_token, tokens = (number(variant.first(path)) for path in ("train.flops_per_token", "train_tokens"))
            cost = {"params": params, "train_flops": per_token * tokens if per_token and tokens else None}
            cost |= {"variant": variant.short, "val_bpb": loss}
            compared = results.difference_row(variant, "val_bpb") | worth_row(results, variant)
            rows.append(d.named(variant) | cost | compared)
    if not rows:
        raise d.NotInResults("no finite validation loss with parameter counts")
    return rows


def worth_row(results: Results, variant: VariantResults) -> dict:
    """The slope of the variant's fitted line, and how many times its training FLOPs the baseline would need."""
    entry = next((each for each in results.raw.get("scaling", []) if each["label"] == variant.short), {})
    found = {at["size"]: at["compute"] for at in entry.get("at", [])}.get(variant.size) or {}
    ends = {f"compute_{end}": found.get(end) for end in ("low", "high")}
    return {"slope": entry["train_flops_slope"]["mean"] if entry else None, "compute": found.get("mean")} | ends


def are_equal(results: Results) -> bool:
    counts = [count for variant in results.variants if (count := number(variant.first("params")))]
    return bool(counts) and max(counts) < EQUAL * min(counts)


def draw_sizes(rows: d.Rows, results: Results, width: float) -> Figure:
    has_flops = any(row["train_flops"] for row in rows)
    across = {"params": "parameters", "train_flops": "training FLOPs of the run"}
    quality = {"val_bpb": "bits per byte\nof held-out text", "difference": "bits per byte\nabove the baseline"}
    quality["compute"] = "compute-equivalent\n(the baseline's is 1)"
    shown = [("params", "val_bpb"), *([("train_flops", "val_bpb")] if has_flops else []), ("params", "difference")]
    shown += [("train_flops", "compute")] if any(row["compute"] for row in rows) else []
    fig, axes = d.panels(width, len(shown), 1.6, 2.4, across=(1, 3))
    lines = d.grouped(rows, "variant")
    for ax, (x, y) in zip(axes, shown, strict=True):
        ax.set_xscale("log")
        if y != "val_bpb":
            compared = {name: [row for row in group if row[y] is not None] for name, group in lines.items()}
            compared = {name: group for name, group in compared.items() if group}
            d.draw_differences(ax, x, compared, results, 1.03, y, base=1 if y == "compute" else 0)
        else:
            for group in lines.values():
                look, known = results.labels[group[0]["label"]].look, [row for row in group if row[x]]
                fit = fitted_line(known) if x == "train_flops" else None
                points, line = ([row[key] for row in known] for key in (x, y)), "" if fit else look.line
                ax.plot(*points, linestyle=line, **look.marks())
                if fit:
                    ax.plot(*fit, color=look.color, linestyle=look.line, linewidth=0.7)
        ax.margins(0.1)
        style.decimal_ticks(ax.xaxis, lambda value: plain_text(value, 3), 4)
        if y == "compute":
            ax.set_yscale("log")
            style.decimal_ticks(ax.yaxis, at_most=5)
        else:
            ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        ax.set_xlabel(across[x])
        ax.set_ylabel(quality[y])
    style.add_legend(fig, d.legend_entries(rows, results))
    return fig


def fitted_line(rows: d.Rows) -> tuple[list[float], list[float]] | None:
    """The power law through the mean of the points in logarithms, over their range; None where there is no slope."""
    if not rows or rows[0]["slope"] is None:
        return None
    xs, ys = ([math.log(row[key]) for row in rows] for key in ("train_flops", "val_bpb"))
    at = [min(xs) + (max(xs) - min(xs)) * step / 40 for step in range(41)]
    line = [mean(ys) - rows[0]["slope"] * (x - mean(xs)) for x in at]
    return list(map(math.exp, at)), list(map(math.exp, line))


def size_caption(results: Results, rows: d.Rows) -> str:
    baselines = ", ".join(
        dict.fromkeys(results.labels[v.baseline].short for v in results.variants if v.baseline in results.labels)
    )
    fits = ""
    if any(row["slope"] is not None for row in rows):
        fits = "Lines over training FLOPs are fitted power laws, with the mean of the seeds' slopes. "
    if any(row["compute"] is not None for row in rows):
        fits += (
            "Compute-equivalent: how many times its training FLOPs at that size the baseline would need for the same "
            f"loss, by its own fit; not drawn {BEYOND}. "
        )
    return (
        f"Bits per byte of held-out text ({results.seeds_text}) against parameters and against the training FLOPs of "
        f"the run, and the difference to the baseline of the same size ({baselines}; zero line), paired by seed. "
        f"Horizontal axes are logarithmic. {fits}{d.interval_caption(results, rows)}"
    )


def size_findings(results: Results) -> d.Findings:
    """Sentences on `gap_changes`: whether a gap to the baseline grows or closes, with its interval, paired by seed."""
    sentences = []
    for entry in results.raw.get("gap_changes", []):
        change = Difference.of(entry)
        first, last = entry["sizes"]
        if change.low is None:
            verdict = "one seed, so nothing can be concluded from this change"
        elif change.separable:
            verdict = f"it is {change.verdict} at {last}"
        else:
            verdict = "this change cannot be separated from chance"
        sentences.append(
            f"{change.label}: from {first} to {last} its difference to {change.baseline} changes by {change.mean:+.4f} "
            f"bits per byte ({change.interval}): {verdict}."
        )
    gaps = [("Gap by recipe" if are_equal(results) else "Gap by size", sentence) for sentence in sentences]
    return gaps + [("What a gap is worth", sentence) for sentence in worth_sentences(results)]


def worth_sentences(results: Results) -> list[str]:
    """Sentences on `scaling`: what the gaps at the largest size are worth, and whether slopes differ."""
    entries = results.raw.get("scaling", [])
    sentences = [worth_sentence(entry, entry["at"][-1]) for entry in entries if entry["at"]]
    first = next((entry for entry in entries if entry["label"] == entry["baseline"]), None)
    if first is None:
        return sentences
    slopes = {entry["label"]: entry["train_flops_slope"] for entry in entries}
    slope = slopes.pop(first["label"])
    text = f"The slope of {first['label']}'s loss over training FLOPs is {significant(slope['mean'])}"
    if "low" not in slope:
        return [*sentences, f"{text} (n = 1): one seed, so nothing can be concluded about slopes."]
    text += f" ({interval_of(first)} {ends_text(slope, significant)}, n = {len(first['seeds'])})"
    apart = [f"{name} {with_ends(own, significant)}" for name, own in slopes.items() if are_apart(own, slope)]
    verdict = "no other variant's interval lies apart from its, so no slope is said to differ"
    if apart:
        verdict = f"intervals that lie apart from its: {', '.join(apart)}; no other slope is said to differ"
    return [*sentences, f"{text}; {verdict}."]


def worth_sentence(entry: dict, at: dict) -> str:
    label, baseline, compute = entry["label"], entry["baseline"], at["compute"]
    if compute is None:
        return (
            f"{label} at {at['size']}: the training compute that the baseline {baseline} would need for the same loss "
            f"is {BEYOND}, so nothing is said of it."
        )
    start = f"{label} at {at['size']}: the baseline {baseline} would need {significant(compute['mean'])} times its "
    start += "training compute for the same loss"
    if "low" not in compute:
        return f"{start} (n = 1): one seed, so nothing can be concluded from this."
    if compute["low"] <= 1 <= compute["high"]:
        verdict = "which is not separable from 1"
    else:
        verdict = f"so {label} is worth {'more' if compute['mean'] > 1 else 'less'} than {baseline}"
    return (
        f"{start} ({interval_of(entry)} {ends_text(compute, significant)}, n = {len(at['seeds'])}), {verdict}; along "
        f"{baseline}'s sizes, at equal loss {label} keeps {size_text(at['bytes_per_token'])} per token where "
        f"{baseline} keeps {with_ends(at['bytes'], size_text)}."
    )


def are_apart(one: dict, two: dict) -> bool:
    """True if both have intervals, which do not overlap."""
    return "low" in one and "low" in two and max(one["low"], two["low"]) > min(one["high"], two["high"])


def interval_of(entry: dict) -> str:
    return f"{100 * entry['level']:g} % interval"


def ends_text(of: dict, text) -> str:
    return f"{text(of['low'])} to {text(of['high'])}"


def with_ends(of: dict, text) -> str:
    """The mean, and in brackets the interval if there is one."""
    return text(of["mean"]) + (f" ({ends_text(of, text)})" if "low" in of else "")


def difference_table(results: Results) -> Table | None:
    """Each variant's difference to the baseline at every size, None where there is one size or no comparison."""
    sizes = dict.fromkeys(variant.size for variant in results.variants)  # in the study's order
    if len(sizes) < 2 or not results.comparisons:
        return None
    metric = results.comparisons[-1].metric  # the last is the one that the study is about
    compared = [each for each in results.comparisons if each.metric == metric]
    cells: dict[str, dict[str, str]] = {}  # short label -> size
    for each in compared:
        variant = results.labels[each.label]
        cells.setdefault(variant.short, {})[variant.size] = difference_cell(each)
    rows = [[name, *(of_size.get(size, MISSING) for size in sizes)] for name, of_size in cells.items()]
    levels = " / ".join(f"{level:g} %" for level in sorted({100 * e.level for e in compared if e.low is not None}))
    bars = f"± half the width of the {levels} interval; *: separable from zero" if levels else "one seed: no intervals"
    note = f"Mean differences in {metric} to the baseline of the same size, paired by seed; {bars}."
    return Table(["variant", *sizes], rows, "l" + "r" * len(sizes), [note], "Difference to the baseline by size")


def worth_table(results: Results) -> Table | None:
    """What each variant's loss is worth in the baseline's training compute and bytes; None without fits over sizes."""
    rows, beyond = [], False
    for entry in results.raw.get("scaling", []):
        slope, found = with_ends(entry["train_flops_slope"], significant), {at["size"]: at for at in entry["at"]}
        for size in entry["sizes"]:
            own, at, cells = results.labels[f"{entry['label']}-{size}"].bytes_per_token, found.get(size), [MISSING] * 3
            if at and at["compute"]:
                cells = [with_ends(at["compute"], significant), with_ends(at["bytes"], size_text)]
                cells.append(share_text(own, at["bytes"]["mean"]))
            elif at:
                cells, beyond = [BEYOND, MISSING, MISSING], True
            rows.append([entry["label"], size, size_text(own), slope, *cells])
    if not rows:
        return None
    levels = sorted({100 * entry["level"] for entry in results.raw["scaling"] if "low" in entry["train_flops_slope"]})
    bars = "One seed: no intervals, so nothing can be concluded."
    if levels:
        bars = (
            f"In brackets: {', '.join(f'{level:g} %' for level in levels)} intervals over seeds (Student), which do "
            "not count how far from the truth a power law is."
        )
    notes = [
        "Slope: of -ln(loss) over ln(training FLOPs). Compute-equivalent: how many times its training FLOPs at that "
        "size the baseline would need for the same loss, by its own slope. Bytes-equivalent: what the baseline keeps "
        "where it has this loss, along its sizes.",
        bars,
    ]
    if beyond:
        notes.append(
            f"{BEYOND.capitalize()}: the baseline would need more than twice its largest training FLOPs or less than "
            "half of its smallest, where its fit says nothing."
        )
    header = ["variant", "size", "KV per token", "slope", "compute-equivalent", "bytes-equivalent per token"]
    return Table([*header, "kept of these bytes"], rows, "llrrrrr", notes, "What a gap is worth")


def difference_cell(each: Difference) -> str:
    if each.mean is None:
        return MISSING
    half = "" if each.low is None else f" ± {(each.high - each.low) / 2:.4f}"
    return f"{each.mean:+.4f}{half}{'*' if each.separable else ''}"


FIGURE = d.Drawing(
    "sizes", 20, "Model sizes",
    size_rows, draw_sizes, size_caption, size_findings, (difference_table, worth_table),
)  # fmt: skip
