"""The learning rates that were tried, and how sure the choice is. A rate that is 10 to 25 % off moves the loss of a
small model as much as a change of its attention does, so a comparison is only as good as its learning rates."""

import math
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from plots import drawing as d
from plots import style
from plots.results import Results, VariantResults, mean, number
from plots.tables import SHIFTED

NEAR = 4.0  # rates further from the best one than this factor were not fitted (train/tuning.py)


def rate_rows(results: Results) -> d.Rows:
    """A row for each rate that was tried (`kind` tried or diverged), and one for each fit: the rate that was chosen."""
    rows = []
    for variant in results.shown_variants:
        names = {key: value for key, value in d.named(variant).items() if key != "seeds"}
        names["tuning_seeds"] = " ".join(map(str, variant.tuning_seeds))
        rows += [names | row for row in _rows_of(variant)]
    if not rows:
        raise d.NotInResults("no learning rates tried (`tuning`)")
    return rows


def _rows_of(variant: VariantResults) -> d.Rows:
    tuning, cost, used = variant.first("tuning") or {}, variant.cost_of_sqrt2, variant.first("train.lr")
    choice = tuning.get("tuned_on") or used  # the choice among the rates tried
    rows = []
    for rate in tuning.get("rates", []):
        loss = number(rate.get("val_bpb"))
        about = {"kind": "diverged" if loss is None else "tried", "lr": rate["lr"], "val_bpb": loss}
        about |= {"chosen": cost is None and rate["lr"] == choice, "compared_lr": used}
        rows.append(about | dict.fromkeys(("optimum", "optimum_bpb", "lr_low", "lr_high", "cost_of_sqrt2")))
    if rows and cost is not None:
        best = tuning.get("optimum") or choice  # once the minimum was chosen
        least = mean(row["val_bpb"] - height(row["lr"], best, cost) for row in near(rows))
        error = number(tuning.get("octaves_error"))
        ends = [None, None] if error is None else [best / 2**error, best * 2**error]
        about = {"kind": "fit", "lr": choice, "val_bpb": least + height(choice, best, cost), "chosen": True}
        about |= {"compared_lr": used, "optimum": best, "optimum_bpb": least}
        rows.append(about | {"lr_low": ends[0], "lr_high": ends[1], "cost_of_sqrt2": cost})
    return rows


def height(lr: float, vertex: float, cost_of_sqrt2: float) -> float:
    """How far the fitted parabola lies above its minimum: half an octave costs a quarter of what an octave does."""
    return 4 * cost_of_sqrt2 * math.log2(lr / vertex) ** 2


def below_minimum(variant: VariantResults) -> tuple[float, float]:
    """(by what factor the rate that was chosen is below the one at the minimum, what that costs)."""
    tuning = variant.first("tuning")
    choice, best = tuning.get("tuned_on") or variant.first("train.lr"), tuning["optimum"]
    return best / choice, height(choice, best, variant.cost_of_sqrt2)


def near(rows: d.Rows) -> d.Rows:
    """The rows of the rates that were fitted, of one variant."""
    tried = [row for row in rows if row["kind"] == "tried"]
    best = min(tried, key=lambda row: row["val_bpb"])["lr"]
    return [row for row in tried if best / NEAR <= row["lr"] <= best * NEAR]


def draw_rates(rows: d.Rows, results: Results, width: float) -> Figure:
    parts = d.by_panel(rows, results)
    alone = len(parts) == 1
    fig, axes = d.panels(width, len(parts), 1.9 if alone else 1.35, 2.5 if alone else 1.7)
    for ax, (title, part) in zip(axes, parts, strict=True):
        ax.set_xscale("log")
        ax.set_title(title)
        for index, (label, group) in enumerate(d.grouped(part, "label").items()):
            draw_variant(ax, group, results.labels[label].look, index)
        ax.margins(y=0.1)
        low, high = ax.get_ylim()
        ax.set_ylim(top=high + 0.07 * sum(row["kind"] == "diverged" for row in part) * (high - low))
        rates = {row["lr"] for row in part if row["kind"] != "fit"}
        spare = max((max(rates) / min(rates)) ** 0.1, 1.2)
        ax.set_xlim(min(rates) / spare, max(rates) * spare)
        style.octave_ticks(ax.xaxis, rates, lambda rate: f"{rate:.3g}", d.panel_inches(ax), 0.42)
        ax.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    name = d.tuning_axis_name(results, results.tuning_seeds_text, len(axes) > 1)
    d.label_outer(axes, "learning rate", name)
    entries = d.legend_entries(rows, results)
    for handle, _ in entries:
        handle.set_fillstyle("full")  # filled as in the panels, where a hollow marker means that a rate was not chosen
    kinds, grey = {row["kind"] for row in rows}, {"color": style.GREY}
    is_sure = any(row["lr_low"] for row in rows)
    entries.append((Line2D([], [], marker="o", linestyle="none", **grey), "filled: chosen"))
    if is_sure:
        entries.append(
            (Line2D([], [], marker="|", markersize=3.6, linewidth=BAR, **grey), "best rate ± standard error")
        )
    if "fit" in kinds:
        entries.append((Line2D([], [], linestyle=DASHED, linewidth=THIN, **grey), "fitted parabola"))
    if "diverged" in kinds:
        entries.append((Line2D([], [], marker="x", linestyle="none", **grey), "diverged"))
    style.add_legend(fig, entries)
    return fig


BAR, THIN, DASHED = 1.1, 0.7, (0, (2, 1.2))


def draw_variant(ax: Axes, rows: d.Rows, look: style.Look, index: int) -> None:
    """Draw the rates and the fit of one variant, the `index`-th of its panel."""
    kinds, hollow = d.grouped(rows, "kind"), look.marks(hollow=True)
    filled = hollow | {"markerfacecolor": look.color}
    tried, fits = kinds.get("tried", []), kinds.get("fit", [])
    curve = [[row["lr"] for row in tried], [row["val_bpb"] for row in tried]]
    ax.plot(*curve, color=look.color, linestyle=look.line, linewidth=0.9, alpha=0.35 if fits else 1)
    for row in kinds.get("diverged", []):  # a step lower for each variant, so that no mark hides another
        at, marks = (row["lr"], 1 - 0.07 * index), {"marker": "x", "color": look.color, "clip_on": False}
        ax.plot(*at, transform=ax.get_xaxis_transform(), linestyle="none", zorder=4, **marks)
    for row in tried:
        ax.plot(row["lr"], row["val_bpb"], linestyle="none", zorder=3, **(filled if row["chosen"] else hollow))
    for row in fits:
        low, *_, high = (math.log2(rate["lr"]) for rate in near(rows))
        xs = [2 ** (low + step / 50 * (high - low)) for step in range(51)]
        ys = [row["optimum_bpb"] + height(x, row["optimum"], row["cost_of_sqrt2"]) for x in xs]
        ax.plot(xs, ys, color=look.color, linestyle=DASHED, linewidth=THIN, zorder=2)
        if row["lr_low"]:
            ends, caps = [row["lr_low"], row["lr_high"]], {"marker": "|", "markersize": 3.6}
            ax.plot(ends, [row["optimum_bpb"]] * 2, color=look.color, linewidth=BAR, zorder=4, **caps)
        ax.plot(row["lr"], row["val_bpb"], linestyle="none", zorder=5, **filled)


def tuned_at_edge(results: Results) -> list[str]:
    return [variant.label for variant in results.variants if (variant.first("tuning") or {}).get("at_edge")]


CHOSEN = "the rate that was chosen, the lowest at which the parabola is within one standard error of its minimum"


def has_margin(results: Results) -> bool:
    """True if rates were chosen by the one-standard-error rule, as all are but those of earlier versions."""
    return any(variant.first("tuning.optimum") for variant in results.variants)


def unfitted(results: Results) -> list[VariantResults]:
    return [variant for variant in results.variants if variant.first("tuning") and variant.cost_of_sqrt2 is None]


def rate_caption(results: Results, rows: d.Rows) -> str:
    text = "Validation bits per byte"
    if results.has_tuning_text:
        text = "Bits per byte of the tuning text (the split `tune`; comparisons read `test`)"
    sentences = [
        f"{text} at the end of training against learning rate (logarithmic axis), with {results.tuning_seeds_text}, "
        "which no comparison uses."
    ]
    several = " (mean of these seeds)" if any(len(v.tuning_seeds) > 1 for v in results.variants) else ""
    fitted = any(row["kind"] == "fit" for row in rows)
    if fitted:
        sentences.append(
            f"Hollow: the rates tried{several}. Thin, dashed: the parabola in the logarithm of the rate, fitted to "
            f"those within a factor of {NEAR:g} of the best. Bars: the rate at its minimum, plus and minus one "
            f"standard error. Filled: {CHOSEN if has_margin(results) else 'that rate, which was chosen'}."
        )
        if others := unfitted(results):
            names = ", ".join(variant.label for variant in others)
            sentences.append(f"Nothing could be fitted for {names}: filled is the best of the rates tried.")
    else:
        sentences.append(f"Filled: the best of the rates tried{several}, which was chosen for the comparison.")
    edge = tuned_at_edge(results)
    where = f"The best rate lies at the edge of the rates tried for {', '.join(edge)}."
    sentences.append(where if edge else "No best rate lies at the edge of the rates tried.")
    if any(row["compared_lr"] and row["chosen"] and row["lr"] != row["compared_lr"] for row in rows):
        sentences.append(SHIFTED.strip())
    return " ".join(sentences) + d.sizes_caption(results)


def rate_findings(results: Results) -> d.Findings:
    about = "Learning rate"
    if any(variant.first("tuning") for variant in results.variants) or len(results.variants) < 2:
        return [(about, sentence) for sentence in coarseness(results)]
    rates = sorted({rate for variant in results.variants for rate in variant.values("train.lr")})
    if len(rates) > 1:
        text = (
            f"the learning rates ({', '.join(f'{rate:g}' for rate in rates)}) were given by the study, not tuned in it"
        )
    else:
        text = f"one learning rate{f' ({rates[0]:g})' if rates else ''} was used for all variants and tuned for none"
    return [
        (
            about,
            f"Warning: {text}. Published best rates differ between variants, and a rate 10 to 25 % off moves the loss "
            "as much as a variant does: a difference here may come from the learning rates. Give a list as `train.lr` "
            "to tune.",
        )
    ]


def coarseness(results: Results) -> list[str]:
    """Sentences on how sure the tuned rates are, with a warning where that is not known."""
    tuned, others, edge = [v for v in results.variants if v.first("tuning")], unfitted(results), tuned_at_edge(results)
    fitted = [variant for variant in tuned if variant not in others]
    errors = {v.label: 2**octaves for v in fitted if (octaves := number(v.first("tuning.octaves_error"))) is not None}
    sentences = []
    if fitted:
        count = f"{len(fitted)} of {len(tuned)} variants"
        sentences.append(f"Rates are from parabolas over rates tried with {results.tuning_seeds_text}: {count}.")
        own = [v for v in fitted if v.first("tuning.optimum") and not v.first("tuning.tuned_at")]
        if own:
            pairs = {variant.label: below_minimum(variant) for variant in own}
            factors, prices = ({label: pair[place] for label, pair in pairs.items()} for place in (0, 1))
            sentences[0] += (
                " By the one-standard-error rule they lie below the minima, by a factor of "
                f"{spanned(factors, 2)}, which costs {spanned(prices, 4)} bits per byte."
            )
        if errors:
            sentences[0] += f" The minima are known to a factor of {spanned(errors, 2)}: one standard error."
        costs = {variant.label: variant.cost_of_sqrt2 for variant in fitted}
        sentences[0] += (
            f" A rate off from the minimum by a factor of 1.41 costs, in bits per byte, {spanned(costs, 4)}."
        )
    if others:
        tried = [sorted(rate["lr"] for rate in v.first("tuning.rates") or []) for v in others]
        steps = sorted({f"{high / low:.3g}" for rates in tried for low, high in pairwise(rates)}, key=float)
        apart = f", a factor of {' to '.join(dict.fromkeys([steps[0], steps[-1]]))} apart" if steps else ""
        names = ", ".join(v.label for v in others) if fitted else f"all {len(tuned)} variants"
        sentences.append(
            f"Warning: nothing was fitted for {names}: the rate is the best of those tried{apart}, and what its error "
            "costs is unknown, so part of a difference may come from the rates."
        )
    if edge:
        sentences.append(
            f"Warning: the best rate lies at the edge of the rates tried for {', '.join(edge)}: a better one may lie "
            "beyond it."
        )
    trained = [v for v in results.variants if v.first("train.lr") and not v.first("weights")]
    if tuned and (given := [v.label for v in trained if v not in tuned]):
        sentences.append(f"Given by the study, not tuned in it: the rates of {', '.join(given)}.")
    if tuned and not results.has_tuning_text:
        sentences.append("Rates were chosen on the text that comparisons read.")
    return sentences


def spanned(values: dict[str, float], digits: int) -> str:
    """The range of values by label, with the labels of the largest."""
    texts = {label: f"{value:.{digits}f}" for label, value in values.items()}
    low, high = (texts[most(values, key=values.get)] for most in (min, max))
    largest = ", ".join(label for label, text in texts.items() if text == high)
    return low if low == high else f"{low} to {high} (most: {largest})"


FIGURE = d.Drawing("rates", 100, "Learning rates tried", rate_rows, draw_rates, rate_caption, rate_findings)
