"""The bytes that one sequence holds in the KV cache, by context."""

import matplotlib
from matplotlib.figure import Figure

from plots import drawing as d
from plots import style
from plots.results import Results, VariantResults


def cache_rows(results: Results) -> d.Rows:
    variants = results.shown_variants
    stored = {v.label: {int(k): n for k, n in (v.first("kv.stored_bytes") or {}).items()} for v in variants}
    contexts = sorted(set.union(*map(set, stored.values())))
    long = [context for context in contexts if context >= 1024 and context & (context - 1) == 0]
    rows = [
        d.named(variant)
        | {"context": context, "cache_bytes": stored[variant.label][context]}
        | {"constant_bytes": variant.constant_bytes, "bytes_per_token": variant.bytes_per_token}
        for variant in variants
        for context in (long if len(long) > 1 else contexts)
        if stored[variant.label].get(context, 0) > 0
    ]
    if not rows:
        raise d.NotInResults("no kv.stored_bytes")
    return rows


def draw_cache(rows: d.Rows, results: Results, width: float) -> Figure:
    sizes = d.grouped(rows, "size")
    fig, axes = d.panels(width, len(sizes), 1.9, 2.6)
    for ax, (size, part) in zip(axes, sizes.items(), strict=True):
        ax.set_xscale("log", base=2)
        ax.set_yscale("log", base=2)
        for index, (label, group) in enumerate(d.grouped(part, "label").items()):
            look, xs = results.labels[label].look, [row["context"] for row in group]
            # Markers stand at different places on each line, so that of two coinciding lines both are visible.
            every = (index % 3, 3) if len(xs) > 6 else 1
            ax.plot(xs, [row["cache_bytes"] for row in group], linestyle=look.line, markevery=every, **look.marks())
        ax.margins(0.03)
        style.measured_ticks(ax.xaxis, [row["context"] for row in part], style.tokens_text, d.panel_inches(ax), 0.32)
        if len(sizes) > 1:
            ax.set_title(results.size_title(size))
    low = min(ax.get_ylim()[0] for ax in axes)
    high = max(ax.get_ylim()[1] for ax in axes)
    if high / low < 4:
        low, high = low / 2, high * 2
    for ax in axes:
        ax.set_ylim(low, high)
        style.octave_ticks(
            ax.yaxis, style.powers_of_two(low, high), style.bytes_text, 1.4 if d.is_narrow(width) else 2.2, 0.3
        )
    d.label_outer(axes, "context (tokens)", "cache of one sequence")
    entries = d.legend_entries(rows, results)
    if len(sizes) == 1:
        entries = [
            (handle, with_cost(name, group[0]))
            for (handle, name), group in zip(entries, d.grouped(rows, "label").values(), strict=True)
        ]
    style.add_legend(fig, entries, "bytes at any length + bytes of each token" if len(sizes) == 1 else "")
    return fig


def with_cost(name: str, row: dict) -> str:
    each = style.bytes_text(row["bytes_per_token"])
    cost = f"{style.bytes_text(row['constant_bytes'])} + {each}" if row["constant_bytes"] else each
    return f"{name}{': ' if len(name) < 14 else ':' + chr(10)}{cost}"


def cache_caption(results: Results, rows: d.Rows) -> str:
    legend = " Legend: the constant part (windows, recurrent states) and the bytes that each further token adds."
    if len(results.sizes) > 1:
        legend = d.sizes_caption(results)
    return (
        f"KV cache of one sequence{results.cache_text} against context; both axes are logarithmic.{legend} Exact byte "
        "counts: no timing and no seeds involved."
    )


def render_models(records: list[dict]) -> dict[str, bytes]:
    """The figure of models that no study has trained, as a PDF, a PNG and an SVG. Each record has a `label` and the
    `kv` of a run's record."""
    variants = []
    for n, record in enumerate(records):
        label, kv = record["label"], record["kv"]
        look, costs = style.Look.of(n, 0), (kv["bytes_per_token"], kv["constant_bytes"])
        variants.append(VariantResults(label, label, label, "", label, look, *costs, [record | {"seed": 0}]))
    results = Results({}, variants, [], [], [], [])
    with matplotlib.rc_context(matplotlib.rcParamsDefault | style.RC):
        return style.render(draw_cache(cache_rows(results), results, style.PAGES["_wide"]))


FIGURE = d.Drawing("cache_bytes", 60, "Cache of one sequence", cache_rows, draw_cache, cache_caption)
