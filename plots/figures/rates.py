"""The learning rates that were tried, and how close the choice was. A rate that is 10 to 25 % off moves the loss of a
small model as much as a change of its attention does, so a comparison is only as good as its learning rates."""

import statistics
from itertools import pairwise

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from plots import drawing as d
from plots import style
from plots.results import Results, number


def rate_rows(results: Results) -> d.Rows:
    rows = []
    for variant in results.shown_variants:
        tuning = variant.first("tuning") or {}
        for rate in tuning.get("rates", []):
            lr, loss = number(rate.get("lr")), number(rate.get("val_bpb"))
            if lr:
                tried = {"tuning_seed": tuning.get("seed"), "lr": lr, "val_bpb": loss, "diverged": loss is None}
                chosen = {"chosen": lr == variant.first("train.lr"), "best_at_edge": bool(tuning.get("at_edge"))}
                rows.append({key: value for key, value in d.named(variant).items() if key != "seeds"} | tried | chosen)
    if not rows:
        raise d.NotInResults("no learning rates tried (`tuning`)")
    return rows


def draw_rates(rows: d.Rows, results: Results, width: float) -> Figure:
    parts = d.by_panel(rows, results)
    alone = len(parts) == 1
    fig, axes = d.panels(width, len(parts), 1.9 if alone else 1.35, 2.5 if alone else 1.7)
    for ax, (title, part) in zip(axes, parts, strict=True):
        ax.set_xscale("log")
        ax.set_title(title)
        for index, (label, group) in enumerate(d.grouped(part, "label").items()):
            look, tried = results.labels[label].look, [row for row in group if not row["diverged"]]
            curve = [[row["lr"] for row in tried], [row["val_bpb"] for row in tried]]
            ax.plot(*curve, color=look.color, linestyle=look.line, linewidth=0.9)
            for row in group:
                if row["diverged"]:  # a step lower for each variant, so that no mark hides another
                    at, marks = (row["lr"], 1 - 0.07 * index), {"marker": "x", "color": look.color, "clip_on": False}
                    ax.plot(*at, transform=ax.get_xaxis_transform(), linestyle="none", zorder=4, **marks)
                else:
                    marks = look.marks(hollow=True) | ({"markerfacecolor": look.color} if row["chosen"] else {})
                    ax.plot(row["lr"], row["val_bpb"], linestyle="none", zorder=3, **marks)
        ax.margins(0.1)
        low, high = ax.get_ylim()
        ax.set_ylim(top=high + 0.07 * sum(row["diverged"] for row in part) * (high - low))
        rates = [row["lr"] for row in part]
        if len(set(rates)) == 1:
            ax.set_xlim(rates[0] / 2, rates[0] * 2)
        style.octave_ticks(ax.xaxis, set(rates), lambda rate: f"{rate:.3g}", d.panel_inches(ax), 0.42)
        ax.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    d.label_outer(
        axes, "learning rate", "val bits/byte" if len(axes) > 1 else "validation bits per byte\n(tuning seed)"
    )
    grey = {"color": style.GREY, "linestyle": "none"}
    entries = d.legend_entries(rows, results)
    for handle, _ in entries:
        handle.set_fillstyle("full")  # filled as in the panels, where a hollow marker means that a rate was not chosen
    entries.append((Line2D([], [], marker="o", **grey), "filled: chosen"))
    if any(row["diverged"] for row in rows):
        entries.append((Line2D([], [], marker="x", **grey), "diverged"))
    style.add_legend(fig, entries)
    return fig


def tuned_at_edge(results: Results) -> list[str]:
    return [variant.label for variant in results.variants if (variant.first("tuning") or {}).get("at_edge")]


def rate_caption(results: Results, rows: d.Rows) -> str:
    seeds = ", ".join(sorted({str(row["tuning_seed"]) for row in rows}))
    edge = tuned_at_edge(results)
    where = "No best rate lies at the edge of the rates tried."
    if edge:
        where = f"The best rate lies at the edge of the rates tried for {', '.join(edge)}."
    return (
        "Validation bits per byte at the end of training against learning rate (logarithmic axis), each tried once on "
        f"seed {seeds}, which is none of the seeds compared. Filled: the rate that was chosen for the comparison. "
        f"{where}{d.sizes_caption(results)}"
    )


def rate_findings(results: Results) -> d.Findings:
    about = "Learning rate"
    if edge := tuned_at_edge(results):
        text = (
            f"the best rate lies at the edge of the rates tried for {', '.join(edge)}: a better one may lie beyond it"
        )
        return [(about, f"Warning: {text}.")]
    if any(variant.first("tuning") for variant in results.variants) or len(results.variants) < 2:
        return [(about, sentence) for sentence in [coarseness(results)] if sentence]
    rates = sorted({rate for variant in results.variants for rate in variant.values("train.lr")})
    if len(rates) > 1:
        text = f"the learning rates ({', '.join(f'{rate:g}' for rate in rates)}) were given by the study, not tuned"
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


def coarseness(results: Results) -> str:
    """A sentence on how certain the choice of rates is, given the scatter of losses over seeds; empty if unknown."""
    unsure, steps, tuned = [], set(), 0
    for variant in results.variants:
        tried = sorted(
            (loss, rate["lr"])
            for rate in (variant.first("tuning") or {}).get("rates") or []
            if (loss := number(rate.get("val_bpb"))) is not None
        )
        losses = variant.values("loss.val_bpb")
        if len(tried) < 2 or len(losses) < 2:
            continue
        tuned += 1
        rates = sorted(rate for _, rate in tried)
        steps |= {round(high / low, 2) for low, high in pairwise(rates)}
        if tried[1][0] - tried[0][0] < statistics.stdev(losses):
            unsure.append(variant.label)
    if not tuned:
        return ""
    apart = " to ".join(f"{step:g}" for step in sorted({min(steps), max(steps)}))
    text = f"Rates were tried a factor of {apart} apart, on one seed and on the held-out text of the comparison"
    if not unsure:
        return f"{text}; each best rate leads by more than the standard deviation of the loss over seeds."
    return (
        f"{text}. For {len(unsure)} of {tuned} variants ({', '.join(unsure)}) the next best rate is within one "
        "standard deviation over seeds: part of a difference may come from the rates."
    )


FIGURE = d.Drawing("rates", 100, "Learning rates tried", rate_rows, draw_rates, rate_caption, rate_findings)
