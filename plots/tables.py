"""The results as tables: cells are made once, as plain text in units for people, and rendered three ways (Markdown,
LaTeX, and by the report's template as HTML). Every cell is escaped where it is rendered: a label may hold anything."""

from dataclasses import dataclass

from plots.results import Study, Variant, dig, number
from plots.style import bytes_text

MISSING = "–"  # noqa: RUF001  an en dash, what papers print for "not measured"
NOT_BOUND = "†"
TUNED = "‡"
NOT_FINITE = "§"
LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    MISSING: "--",
    NOT_BOUND: r"$^{\dagger}$",
    TUNED: r"$^{\ddagger}$",
    NOT_FINITE: r"\textsuperscript{\S}",
} | {sign: "\\" + sign for sign in "$&#_%"}
MARKDOWN = {sign: "\\" + sign for sign in "\\`*_[]"} | {sign: f"&#{ord(sign)};" for sign in "<>&|~$"}


@dataclass(frozen=True)
class Table:
    header: list[str]
    rows: list[list[str]]
    align: str  # one letter a column, l or r
    notes: list[str]
    title: str = ""
    folded: bool = False  # in the report, until it is opened


def latex(text: str) -> str:
    return "".join(LATEX.get(sign, sign) for sign in text)


def markdown(text: str) -> str:
    return "".join(MARKDOWN.get(sign, sign) for sign in text)


def figures_text(value, digits: int = 3) -> str:
    """A measured value with `digits` significant digits and thousands marked: 0.0312, 4.57, 12,300."""
    if number(value) is None:
        return MISSING
    text = f"{value:.{digits}g}"
    return f"{float(text):,.0f}" if "e" in text or abs(value) >= 10 ** (digits - 1) else text


def count_text(value) -> str:
    return MISSING if number(value) is None else f"{value:,.0f}"


def fixed_text(value, digits: int) -> str:
    return MISSING if number(value) is None else f"{value:.{digits}f}"


def size_text(value) -> str:
    return MISSING if number(value) is None else bytes_text(value)


def results_table(study: Study) -> Table:
    at = study.reference
    timed = {variant.label: variant.decode[at] for variant in study.variants if at in variant.decode}
    rows = [_row(variant, timed.get(variant.label, {})) for variant in study.variants]
    notes = [f"Losses and training speeds: {study.seeds_text}. KV{study.cache_text}: KiB, MiB are powers of 1024."]
    if at:
        others = [variant.label for variant in study.variants if variant.label not in timed]
        which = f"that most variants were timed at ({', '.join(others)} not)" if others else "that all were timed at"
        several = any(point["seeds"] > 1 for point in timed.values())
        fastest = "; of several seeds the fastest, as a shape's speed depends on none" if several else ""
        notes.append(f"Decode at batch {at[0]}, context {at[1]:,}, the largest grid point {which}{fastest}.")
    if tuned := [variant for variant in study.variants if variant.first("tuning")]:
        seeds = sorted({str(variant.first("tuning.seed")) for variant in tuned})
        notes.append(
            f"{TUNED} Tuned for each variant: the best of the rates tried on seed {', '.join(seeds)}, which is none of "
            "the seeds compared."
        )
    if any(row[-3].endswith(NOT_BOUND) for row in rows):
        notes.append(f"{NOT_BOUND} Not bound by memory: launches, Python, arithmetic or another program set the time.")
    if study.gaps:
        notes.append(study.gaps)
    header = "variant,arch,parameters,FFN width,KV per token,constant,learning rate,val bits/byte,val nats/token,"
    header += "decode ms/token,decode tokens/s,of memory roof,train tokens/s,seeds"
    return Table(header.split(","), rows, "ll" + 12 * "r", notes)


def _row(variant: Variant, decode: dict) -> list[str]:
    roof = decode.get("roof_fraction")
    share = MISSING if number(roof) is None else f"{figures_text(100 * roof, 2)} %"
    return [
        variant.label,
        variant.arch,
        count_text(variant.first("params")),
        count_text(variant.first("options.ffn_width")),
        size_text(variant.first("kv.bytes_per_token")),
        size_text(variant.first("kv.constant_bytes")),
        rate_text(variant),
        fixed_text(variant.mean("loss.val_bpb"), 4),
        fixed_text(variant.mean("loss.val_nats"), 4),
        figures_text(decode.get("token_ms")),
        figures_text(decode.get("tokens_per_s")),
        share + (NOT_BOUND if decode.get("memory_bound") is False else ""),
        figures_text(variant.mean("train.tokens_per_s")),
        str(variant.seeds),
    ]


def rate_text(variant: Variant) -> str:
    rates = sorted(set(variant.values("train.lr")))
    return "; ".join(f"{rate:g}" for rate in rates) + TUNED * bool(variant.first("tuning")) if rates else MISSING


def comparison_table(study: Study) -> Table | None:
    """Each variant against the study's baseline, None where the study made no comparison."""
    rows = []
    for each in study.comparisons:
        interval = f"{each.low:+.4f} to {each.high:+.4f} ({100 * each.level:g} %)" if each.low is not None else MISSING
        difference = MISSING if each.mean is None else f"{each.mean:+.4f}"
        rows.append([each.label, each.baseline, each.metric, difference, interval, str(each.seeds), each.verdict])
    header = ["variant", "against", "metric", "mean difference", "confidence interval", "seeds", "verdict"]
    note = "Differences are paired by seed; negative: lower than the baseline."
    if all(each.low is None for each in study.comparisons):
        note += " One seed gives no interval: no difference is shown by it."
    return Table(header, rows, "lllrrrl", [note], "Differences to the baseline") if rows else None


RULES = {
    "ffn": "FFN widths change until each variant has the parameters of the first",
    "heads": "numbers of query heads change until each variant comes nearest to the parameters of the first, FFN held",
    "none": "every variant as it is written",
}


def matching_tables(study: Study) -> list[Table]:
    """What each rule makes of the study's variants, the rule in use first."""
    used = study.raw.get("match") or dig(study.raw, "study_settings.match")
    as_built = {
        "params": "params", "ffn_width": "options.ffn_width", "heads": "options.heads",
        "train_flops_per_token": "train.flops_per_token",
    }  # fmt: skip
    built = [{key: v.first(path) for key, path in as_built.items()} | {"label": v.label} for v in study.variants]
    matching = study.raw.get("matching") or {used: built}
    return [
        _matching_table(study, rule, rows, rule == used)
        for rule, rows in sorted(matching.items(), key=lambda item: item[0] != used)
    ]


def _matching_table(study: Study, rule: str | None, rows: list[dict], used: bool) -> Table:
    first: dict[str, dict] = {}
    cells, failed = [], []
    for row in rows:
        label = str(row.get("label"))
        base = first.setdefault(str(row.get("size", "")), row)
        if row.get("error"):
            failed.append(f"{label}: {row['error']}")
        params, base_params = number(row.get("params")), number(base.get("params"))
        off = f"{100 * (params / base_params - 1):+.2f} %" if params is not None and base_params else MISSING
        counts = [count_text(row.get(key)) for key in ("ffn_width", "heads", "params")]
        flops = [ratio_text(row.get(key), base.get(key)) for key in ("train_flops_per_token", "score_flops_per_token")]
        cells.append([label, *counts, off, *flops])
    of = " of its size" if len(study.sizes) > 1 else ""
    header = ["variant", "FFN width", "heads", "parameters", f"against the first{of}", "training FLOPs", "score FLOPs"]
    notes = [
        f"FLOPs: a token, relative to the first variant{of}. Score FLOPs: queries against keys and weights against "
        "values, which no parameter count holds.",
        *failed,
    ]
    said = f"Matching rule {rule}: {RULES.get(rule, '')}".rstrip(": ") if rule else "Shapes (matching rule not given)"
    return Table(header, cells, "lrrrrrr", notes, said + (" (in use)" if used and rule else " (not used)" * bool(rule)))


def ratio_text(value, base) -> str:
    return f"{value / base:.3f}" if number(value) is not None and number(base) else MISSING


def options_table(study: Study) -> Table:
    """Every resolved option of each variant."""
    rows = []
    for variant in study.variants:
        options = (variant.first("options") or {}).items()
        rows.append([variant.label, variant.arch, ", ".join(f"{key} {value}" for key, value in options)])
    return Table(["variant", "arch", "options"], rows, "lll", [], "Options of each variant, as built")


def to_markdown(*tables: Table) -> str:
    blocks = []
    for table in tables:
        lines = [table.header, [{"l": "---", "r": "---:"}[side] for side in table.align], *table.rows]
        cells = [line if i == 1 else list(map(markdown, line)) for i, line in enumerate(lines)]
        blocks.append(f"**{markdown(table.title)}**" if table.title else "")
        blocks.append("\n".join("| " + " | ".join(line) + " |" for line in cells))
        blocks.append("\n".join(markdown(note) + "  " for note in table.notes).rstrip())
    return "\n\n".join(block for block in blocks if block) + "\n"


def to_latex(*tables: Table) -> str:
    lines = [r"% \usepackage{booktabs} in the preamble, then \input this file inside a table or table* environment."]
    for index, table in enumerate(tables):
        marks = {NOT_BOUND: "dagger:", TUNED: "ddagger:", NOT_FINITE: "section sign:"}
        notes = ["".join(marks.get(sign, sign) for sign in note) for note in [table.title, *table.notes] if note]
        lines += ["", r"\bigskip", ""] if index else []
        lines += [
            *("% " + note for note in notes),
            r"\begin{tabular}{" + table.align + "}",
            r"\toprule",
            " & ".join(map(latex, table.header)) + r" \\",
            r"\midrule",
            *(" & ".join(map(latex, row)) + r" \\" for row in table.rows),
            r"\bottomrule",
            r"\end{tabular}",
        ]
    return "\n".join(lines) + "\n"
