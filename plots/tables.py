"""The results as tables: cells are made once, as plain text in units for people, and rendered three ways (Markdown,
LaTeX, and by the report's template as HTML). Every cell is escaped where it is rendered: a label may hold anything."""

from dataclasses import dataclass

from plots.results import Study, Variant, dig, number
from plots.style import bytes_text

MISSING = "–"  # noqa: RUF001  an en dash, what papers print for "not measured"
NOT_BOUND = "†"
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
} | {sign: "\\" + sign for sign in "$&#_%"}
MARKDOWN = {sign: "\\" + sign for sign in "\\`*_[]"} | {sign: f"&#{ord(sign)};" for sign in "<>&|~$"}


@dataclass(frozen=True)
class Table:
    header: list[str]
    rows: list[list[str]]
    align: str  # one letter a column, l or r
    notes: list[str]


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
    rows = [_row(variant, variant.decode[at] if at else {}) for variant in study.variants]
    notes = [f"Losses, times and speeds: {study.seeds_text}. KiB, MiB: powers of 1024."]
    notes += (
        [f"Decode at batch {at[0]}, context {at[1]:,}, the largest grid point that all variants were timed at."]
        if at
        else []
    )
    if any(row[-3].endswith(NOT_BOUND) for row in rows):
        notes.append(f"{NOT_BOUND} Not bound by memory: launches, Python or arithmetic set the time.")
    header = "variant,arch,parameters,FFN width,KV per token,constant,val bits/byte,val nats/token,"
    header += "decode ms/token,decode tokens/s,of memory roof,train tokens/s,seeds"
    return Table(header.split(","), rows, "ll" + 11 * "r", notes)


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
        fixed_text(variant.mean("loss.val_bpb"), 4),
        fixed_text(variant.mean("loss.val_nats"), 4),
        figures_text(decode.get("token_ms")),
        figures_text(decode.get("tokens_per_s")),
        share + (NOT_BOUND if decode.get("memory_bound") is False else ""),
        figures_text(variant.mean("train.tokens_per_s")),
        str(variant.seeds),
    ]


def comparison_table(study: Study) -> Table | None:
    """Each variant against the study's baseline, None where the study made no comparison."""
    rows = []
    for entry in study.raw.get("comparisons") or []:
        seeds, level = entry.get("seeds"), number(entry.get("level"))
        ends = [
            f"{end:+.4f}" if (end := number(entry.get(key))) is not None else MISSING for key in ("ci_low", "ci_high")
        ]
        difference = number(entry.get("mean_diff"))
        rows.append(
            [
                str(entry.get("label")),
                str(entry.get("baseline")),
                str(entry.get("metric")),
                MISSING if difference is None else f"{difference:+.4f}",
                MISSING if MISSING in ends else f"{ends[0]} to {ends[1]}" + (f" ({100 * level:g} %)" if level else ""),
                str(len(seeds) if isinstance(seeds, list) else seeds),
                str(entry.get("verdict")),
            ]
        )
    header = ["variant", "against", "metric", "mean difference", "confidence interval", "seeds", "verdict"]
    note = "Differences are paired by seed; negative: lower than the baseline."
    return Table(header, rows, "lllrrrl", [note]) if rows else None


def matching_table(study: Study) -> Table:
    """What the matching rule made of each variant, with every resolved option."""
    base = number(study.variants[0].first("params"))
    rows = []
    for variant in study.variants:
        params, options = number(variant.first("params")), dig(variant.runs[0], "options") or {}
        off = f"{100 * (params / base - 1):+.2f} %" if base and params is not None else MISSING
        others = ", ".join(f"{key} {value}" for key, value in options.items() if key != "ffn_width")
        rows.append(
            [variant.label, variant.arch, count_text(options.get("ffn_width")), count_text(params), off, others]
        )
    header = ["variant", "arch", "FFN width", "parameters", "against the first", "options"]
    return Table(header, rows, "llrrrl", [])


def to_markdown(*tables: Table) -> str:
    blocks = []
    for table in tables:
        lines = [table.header, [{"l": "---", "r": "---:"}[side] for side in table.align], *table.rows]
        cells = [line if i == 1 else list(map(markdown, line)) for i, line in enumerate(lines)]
        blocks.append("\n".join("| " + " | ".join(line) + " |" for line in cells))
        blocks.append("\n".join(markdown(note) + "  " for note in table.notes).rstrip())
    return "\n\n".join(block for block in blocks if block) + "\n"


def to_latex(table: Table) -> str:
    lines = [
        r"% \usepackage{booktabs} in the preamble, then \input this file inside a table or table* environment.",
        *("% " + note.replace(NOT_BOUND, "dagger:") for note in table.notes),
        r"\begin{tabular}{" + table.align + "}",
        r"\toprule",
        *(" & ".join(map(latex, line)) + r" \\" for line in [table.header]),
        r"\midrule",
        *(" & ".join(map(latex, row)) + r" \\" for row in table.rows),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines) + "\n"
