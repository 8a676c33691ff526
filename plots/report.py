"""The report: one HTML file that opens anywhere and that says in words what the numbers do and do not support. These
sentences are derived from the data, so that they cannot claim more than the runs show."""

import base64
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from plots.figures import FIGURES
from plots.results import Results, dig, number
from plots.tables import CACHED, IN_CACHE, Table, markdown, options_table

MEANINGS = {
    "KV per token": "Bytes that each further token adds to the KV cache once every window is full: measured from the "
    "storages at two lengths, and computed by formula; the two must agree.",
    "constant": "Bytes that a sequence holds in the cache at any length: windows and recurrent states.",
    "learning rate": "The peak of the learning rate schedule.",
    "bits/byte": "Loss on held-out text in bits per byte, the only loss that is compared across tokenizers.",
    "nats/token": "The same loss per token, which depends on the tokenizer.",
    "decode ms/token": "Median time of one decode step, prefill excluded, caches allocated beforehand, after warm-up.",
    "decode tokens/s": "Tokens per second that are decoded for the whole batch.",
    "of memory roof": "(Weights and KV bytes that one step must read) / step time / the read bandwidth measured on the "
    "same device in the same run. Only near 100 % does saving bytes save time in proportion. "
    f'"{IN_CACHE}" stands for more than 100 %: {CACHED}.',
    "not bound by memory": "Launches, Python or arithmetic set the time of this point, or the processor's cache holds "
    "the model.",
    "train tokens/s": "Training throughput, for orientation only: it depends on what else the machine did.",
}


ENOUGH = 5  # training tokens per parameter, below which a study's losses are no finding
FEW = 60  # a figure's data is shown in the report if it has at most this many rows


def page(results: Results, figures: list[dict], left_out: dict[str, str], result_tables: list[Table]) -> str:
    """The report as HTML. `figures`: name, title, caption, rows and the SVG for both page widths; `left_out`: figure ->
    why it could not be drawn; `result_tables`: as in tables/."""
    folder = FileSystemLoader(Path(__file__).parent)
    html = Environment(loader=folder, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    html.filters["svg_uri"] = lambda svg: "data:image/svg+xml;base64," + base64.b64encode(svg).decode()
    return html.get_template("report.html.j2").render(
        results=results,
        figures=[figure | {"data": data_table(figure["rows"])} for figure in figures],
        left_out=[(FIGURES[name].title, why) for name, why in left_out.items()],
        tables=result_tables,
        options=options_table(results),
        facts={title: flat(results.raw.get(key)) for title, key in FACTS.items()},
        findings=findings(results),
        conclusions=[(about, [sentence]) for about, sentence in conclusions(results)],
        meanings=MEANINGS,
    )


FACTS = {"Settings": "study_settings", "Corpus": "corpus", "Machine": "machine", "Versions": "versions"}


def data_table(rows: list[dict]) -> Table | None:
    """The rows of a figure, if they are few enough to be read."""
    if len(rows) > FEW:
        return None
    text = lambda value: "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)  # noqa: E731
    numeric = [all(isinstance(row[key], int | float | None) for row in rows) for key in rows[0]]
    align = "".join("r" if each else "l" for each in numeric)
    return Table(list(rows[0]), [list(map(text, row.values())) for row in rows], align, [])


def findings(results: Results) -> list[tuple[str, list[str]]]:
    """(what it is about, sentences) for the quantities of all figures, whether they could be drawn or not."""
    groups: dict[str, list[str]] = {}
    for figure in FIGURES.values():
        for about, sentence in figure.findings(results):
            groups.setdefault(about, []).append(sentence)
    return list(groups.items())


def sentences_as_markdown(results: Results) -> str:
    """All findings and conclusions of the report."""
    lines = ["# Findings"]
    for about, sentences in findings(results):
        lines += ["", f"## {markdown(about)}", "", *(f"- {markdown(sentence)}" for sentence in sentences)]
    lines += ["", "# What may and may not be concluded"]
    for about, sentence in conclusions(results):
        lines += ["", f"## {markdown(about)}", "", f"- {markdown(sentence)}"]
    return "\n".join(lines) + "\n"


def flat(value, key: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted key, text) rows; a list of objects gets a row per object."""
    if isinstance(value, dict):
        return [row for name, inner in value.items() for row in flat(inner, f"{key}.{name}" if key else str(name))]
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        lines = [", ".join(f"{name}: {text}" for name, text in flat(item)) for item in value]
        return [(f"{key} {index}", line) for index, line in enumerate(lines, 1)]
    if isinstance(value, list):
        return [(key, ", ".join(map(str, value)))]
    if value is None and not key:
        return []
    return [(key, f"{value:,}" if type(value) is int and value > 9999 else str(value))]


def conclusions(results: Results) -> list[tuple[str, str]]:
    """(what it is about, what may be concluded) for every claim that a reader might derive from the figures."""
    sentences = [
        ("Loss", loss_conclusion(results)),
        *chance_conclusions(results),
        ("Memory", memory_conclusion(results)),
        ("Speed", speed_conclusion(results)),
        ("Size", size_conclusion(results)),
        ("Reach", reach_conclusion(results)),
    ]
    if demonstration := demonstration_conclusion(results):
        sentences.insert(0, ("Demonstration", demonstration))
    if results.gaps:  # these may be no accident: where a variant diverges, the seeds that are left flatter it
        sentences.insert(0, ("Gaps", f"{results.gaps} Means and intervals are over the other runs alone."))
    return sentences


def demonstration_conclusion(results: Results) -> str:
    """A sentence on a study that is too small for its losses to mean anything, else empty."""
    shapes = [[number(variant.first(key)) for key in ("train_tokens", "params")] for variant in results.variants]
    trained = max((tokens / params for tokens, params in shapes if tokens and params), default=ENOUGH)
    why = ["one seed"] if results.seeds[1] == 1 else []
    if trained < ENOUGH:
        why.append(f"{trained:.2g} training tokens per parameter at most")
    return f"This study shows the method: with {' and '.join(why)}, its losses are no finding." if why else ""


def loss_conclusion(results: Results) -> str:
    low, high = results.seeds
    if high == 1:
        text = (
            "One seed: nothing can be concluded about which variant has the lower loss. Published differences between "
            "these architectures are 0.002 to 0.04 nats per token, and another seed alone can move the loss by more."
        )
    elif low == 1:
        text = "Some variants have one seed only: nothing can be concluded about their order in loss."
    else:
        count = low if low == high else f"{low} to {high}"
        text = (
            f'{count} seeds: only a difference with the verdict "lower" or "higher" may be called a difference; the '
            "order of the means alone shows nothing."
        )
    means = {v.label: value for v in results.largest if (value := v.mean("loss.val_nats")) is not None}
    if len(means) > 1:
        least, most = min(means, key=means.get), max(means, key=means.get)
        text += f" Here {means[most] - means[least]:.4f} nats lie between {least} and {most}."
    if diverged := [v.label for v in results.variants if len(v.values("loss.val_bpb")) < len(v.runs)]:
        text += f" Without a finite loss in some run: {', '.join(diverged)}."
    return text


def chance_conclusions(results: Results) -> list[tuple[str, str]]:
    many, separable = len(results.comparisons), sum(each.separable for each in results.comparisons)
    if many < 2 or not separable:
        return []
    text = f"{many} comparisons, {separable} of them separable, each at its own level"
    text += ": with more comparisons, a false one becomes more likely."
    if together := [each.holds_together for each in results.comparisons if each.holds_together is not None]:
        text += f" At a level at which all hold together (Holm's method) {sum(together)} are separable."
    return [("Chance", text)]


def memory_conclusion(results: Results) -> str:
    pairs = (("bytes_per_token", "formula_bytes_per_token"), ("constant_bytes", "formula_constant_bytes"))
    runs = [run for variant in results.variants for run in variant.runs]
    odd = {run["label"] for run in runs for a, b in pairs if dig(run, f"kv.{b}") not in (None, dig(run, f"kv.{a}"))}
    if odd:
        names = ", ".join(sorted(odd))
        return f"Measured and computed cache bytes differ for {names}: do not use them until this is explained."
    return (
        "Cache bytes are exact: counted, not estimated. They hold for these shapes on any machine and do not depend "
        "on the seed; another data type scales them."
    )


def speed_conclusion(results: Results) -> str:
    bounds = [point["memory_bound"] for variant in results.variants for point in variant.decode.values()]
    if not bounds:
        return "Decoding was not timed."
    devices = sorted(
        {str(entry.get("device")) for v in results.variants for run in v.runs for entry in run.get("decode") or []}
    )
    text = f"Timings of one machine ({', '.join(devices)}): another machine, kernel or size may reverse their order. "
    if skipped := [(v.label, point) for v in results.variants for point in v.first("decode_skipped") or []]:
        places = "; ".join(f"{label} at batch {p['batch']}, context {p['context']}" for label, p in skipped)
        text += f"Not timed, as it did not fit into memory: {places}. "
    free = sum(bound is False for bound in bounds)
    if None in bounds:
        text += "The results do not say which points are bound by memory: "
        return text + "do not attribute speed to fewer cache bytes."
    if not free:
        return text + "Every decode point is bound by memory traffic: fewer bytes are the reason for more speed."
    return text + (
        f"{free} of {len(bounds)} decode points (hollow in the figure) are not bound by memory: do not attribute "
        "their speed to fewer cache bytes."
    )


def size_conclusion(results: Results) -> str:
    if missing := sorted({v.baseline for v in results.variants} - set(results.labels)):
        return f"The first variant, {', '.join(missing)}, to whose size the others were matched, has no results."
    off = max(abs(v.first("params") / results.labels[v.baseline].first("params") - 1) for v in results.variants)
    of = " of the same size" if len(results.sizes) > 1 else ""
    effect = "so parameter counts explain no difference"
    if off > 0.005:
        effect = "so a difference in loss may come from the parameter count"
    return f"Parameters differ by at most {100 * off:.2f} % from those of the first variant{of}, {effect}."


def reach_conclusion(results: Results) -> str:
    baselines = [variants[0] for variants in results.sizes.values()]
    shapes = []
    for variant in baselines if len(baselines) == 1 else (baselines[0], baselines[-1]):
        params, tokens = variant.first("params"), variant.first("train_tokens")
        seen = f"{tokens / 1e6:.3g} M training tokens ({tokens / params:.2g} per parameter)"
        shapes.append(f"{params / 1e6:.3g} M parameters after {seen}")
    return f"Models of {' to '.join(shapes)}: nothing here speaks about larger models or longer training."
