"""The report: one HTML file that opens anywhere, and that says in words what the numbers do and do not support. Those
sentences are derived from the data here, so that they cannot promise more than the runs behind them."""

import base64
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from plots.figures import FIGURES
from plots.results import Study, dig, number
from plots.tables import Table, options_table

MEANINGS = {
    "KV per token": "What the KV cache grows by for each further token, once every window is full: measured from the "
    "storages at two lengths, and computed by formula; the two must agree.",
    "constant": "What a sequence holds in the cache however long it grows: windows and recurrent states.",
    "learning rate": "The peak of the schedule.",
    "val bits/byte": "Loss on held-out text in bits per byte of text; the only loss that compares across tokenizers.",
    "val nats/token": "The same loss per token; it depends on the tokenizer.",
    "decode ms/token": "Median time of one decode step, prefill excluded, caches allocated beforehand, after warm-up.",
    "decode tokens/s": "Tokens that the whole batch gains per second of decoding.",
    "of memory roof": "(Weights and KV bytes that one step must read) / step time / the read bandwidth measured on the "
    "same device in the same run. Only near 100 % does saving bytes save time in proportion; more than that is "
    "read from the processor's own caches.",
    "not bound by memory": "Launches, Python or arithmetic set the time of this point, not memory.",
    "train tokens/s": "Training throughput, for orientation: it depends on what else the machine did.",
}


FEW = 60  # rows of a figure's data that the report shows itself


def page(study: Study, figures: list[dict], left_out: dict[str, str], result_tables: list[Table]) -> str:
    """`figures`: name, title, caption, rows and the SVG of both pages; `left_out`: figure -> why it could not be drawn;
    `result_tables`: as in tables/."""
    folder = FileSystemLoader(Path(__file__).parent)
    html = Environment(loader=folder, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    html.filters["svg_uri"] = lambda svg: "data:image/svg+xml;base64," + base64.b64encode(svg).decode()
    return html.get_template("report.html.j2").render(
        study=study,
        figures=[figure | {"data": data_table(figure["rows"])} for figure in figures],
        left_out=[(FIGURES[name].title, why) for name, why in left_out.items()],
        tables=result_tables,
        options=options_table(study),
        facts={title: flat(study.raw.get(key)) for title, key in FACTS.items()},
        findings=findings(study),
        conclusions=[(about, [sentence]) for about, sentence in conclusions(study)],
        meanings=MEANINGS,
    )


FACTS = {"Settings": "study_settings", "Corpus": "corpus", "Machine": "machine", "Versions": "versions"}


def data_table(rows: list[dict]) -> Table | None:
    """What a figure draws, where that is little enough to be read."""
    if len(rows) > FEW:
        return None
    text = lambda value: "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)  # noqa: E731
    numeric = [all(isinstance(row[key], int | float | None) for row in rows) for key in rows[0]]
    align = "".join("r" if each else "l" for each in numeric)
    return Table(list(rows[0]), [list(map(text, row.values())) for row in rows], align, [])


def findings(study: Study) -> list[tuple[str, list[str]]]:
    """(what it is about, sentences) of all figures' quantities, whether they could be drawn or not."""
    found: dict[str, list[str]] = {}
    for figure in FIGURES.values():
        for about, sentence in figure.findings(study):
            found.setdefault(about, []).append(sentence)
    return list(found.items())


def flat(value, key: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted key, text) rows; a list of objects gets one row an object."""
    if isinstance(value, dict):
        return [row for name, inner in value.items() for row in flat(inner, f"{key}.{name}" if key else str(name))]
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        lines = [", ".join(f"{name}: {text}" for name, text in flat(item)) for item in value]
        return [(f"{key} {index}", line) for index, line in enumerate(lines, 1)]
    if isinstance(value, list):
        return [(key, ", ".join(map(str, value)))]
    return (
        []
        if value is None and not key
        else [(key, f"{value:,}" if type(value) is int and value > 9999 else str(value))]
    )


def conclusions(study: Study) -> list[tuple[str, str]]:
    """(what it is about, what may be said) for every claim that a reader might take from the figures."""
    return [
        *gap_conclusions(study),
        ("Loss", loss_conclusion(study)),
        *chance_conclusions(study),
        ("Memory", memory_conclusion(study)),
        ("Speed", speed_conclusion(study)),
        ("Size", size_conclusion(study)),
        ("Reach", reach_conclusion(study)),
    ]


def gap_conclusions(study: Study) -> list[tuple[str, str]]:
    """A gap may be no accident: where a variant diverges, the seeds that are left flatter it."""
    return [("Gaps", f"{study.gaps} Means and intervals are over the other runs alone.")] if study.gaps else []


def loss_conclusion(study: Study) -> str:
    means = {v.label: value for v in study.largest if (value := v.mean("loss.val_nats")) is not None}
    lost = [v.label for v in study.variants if len(v.values("loss.val_bpb")) < len(v.runs)]
    text = f" Without a finite loss in some run: {', '.join(lost)}." if lost else ""
    if len(means) > 1:
        low, high = min(means, key=means.get), max(means, key=means.get)
        text = f" Here {means[high] - means[low]:.4f} nats lie between {low} and {high}.{text}"
    low, high = study.seeds
    if high == 1:
        return (
            "One seed: nothing can be concluded about which variant has the lower loss. Published differences between "
            "these architectures are 0.002 to 0.04 nats per token, and another seed alone can move the loss by more."
            + text
        )
    if low == 1:
        return "Some variants have one seed only: nothing can be concluded about their order in loss." + text
    return (
        f'{low if low == high else f"{low} to {high}"} seeds: only a difference whose verdict is "lower" or "higher" '
        "may be called a difference; the order of the means alone shows nothing." + text
    )


def chance_conclusions(study: Study) -> list[tuple[str, str]]:
    many, separated = len(study.comparisons), sum(each.separable for each in study.comparisons)
    if many < 2 or not separated:
        return []
    said = f"{many} comparisons, {separated} separable, each at its own level: the more there are, the likelier a false"
    return [("Chance", f"{said} one.")]


def memory_conclusion(study: Study) -> str:
    pairs = (("bytes_per_token", "formula_bytes_per_token"), ("constant_bytes", "formula_constant_bytes"))
    runs = [run for variant in study.variants for run in variant.runs]
    odd = {run["label"] for run in runs for a, b in pairs if dig(run, f"kv.{b}") not in (None, dig(run, f"kv.{a}"))}
    if odd:
        return (
            f"Measured and computed cache bytes differ for {', '.join(sorted(odd))}: do not use them until explained."
        )
    return (
        "Exact: cache bytes are counted, not estimated. They hold for these shapes on any machine and depend on no "
        "seed; another data type scales them."
    )


def speed_conclusion(study: Study) -> str:
    bounds = [point["memory_bound"] for variant in study.variants for point in variant.decode.values()]
    if not bounds:
        return "Decoding was not timed."
    devices = sorted(
        {str(entry.get("device")) for v in study.variants for run in v.runs for entry in run.get("decode") or []}
    )
    text = f"Timings on this one machine ({', '.join(devices)}): another machine, kernel or size may turn their order. "
    if skipped := [(v.label, point) for v in study.variants for point in v.first("decode_skipped") or []]:
        places = "; ".join(f"{label} at batch {p['batch']}, context {p['context']}" for label, p in skipped)
        text += f"Not timed, as it did not fit in memory: {places}. "
    free = sum(bound is False for bound in bounds)
    if None in bounds:
        return text + "The results do not say which points memory bounds: credit no speed to fewer cache bytes."
    if not free:
        return text + "Every decode point is bound by memory traffic: there, fewer bytes are the reason for more speed."
    return text + (
        f"{free} of {len(bounds)} decode points (hollow in the figure) are not bound by memory: credit no speed there "
        "to fewer cache bytes."
    )


def size_conclusion(study: Study) -> str:
    counts = [count for v in study.variants if (count := number(v.first("params")))]
    if len(counts) < len(study.variants):
        return "Parameter counts are missing: nothing is known about whether the variants are of one size."
    if missing := sorted({v.baseline for v in study.variants} - set(study.labels)):
        return f"The first variant, {', '.join(missing)}, to whose size the others were matched, has no results."
    off = max(abs(v.first("params") / study.labels[v.baseline].first("params") - 1) for v in study.variants)
    of = " of the same size" if len(study.sizes) > 1 else ""
    fair = "so parameter count explains no difference" if off <= 0.005 else "so a difference in loss may be one of size"
    return f"Parameters differ by at most {100 * off:.2f} % from the first variant's{of}, {fair}."


def reach_conclusion(study: Study) -> str:
    baselines = [variants[0] for variants in study.sizes.values()]
    smallest_and_largest = baselines if len(baselines) == 1 else [baselines[0], baselines[-1]]
    ends = [(number(v.first("params")), number(v.first("train_tokens"))) for v in smallest_and_largest]
    if not all(params and tokens for params, tokens in ends):
        return "Nothing here speaks about larger models or longer training."
    shapes = [
        f"{params / 1e6:.3g} M parameters after {seen / 1e6:.3g} M training tokens ({seen / params:.2g} a parameter)"
        for params, seen in ends
    ]
    return f"Models of {' to '.join(shapes)}: nothing here speaks about larger models or longer training."
