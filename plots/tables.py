"""The results as tables. Cells are made once, as plain text with readable units, and rendered three ways: Markdown,
LaTeX, and HTML by the report's template. Every cell is escaped where it is rendered, as a label may hold anything."""

from dataclasses import dataclass

from plots.results import Results, VariantResults, is_in_cache, mean, number
from plots.style import bytes_text

MISSING = "–"  # noqa: RUF001  an en dash, what papers print for "not measured"
NOT_BOUND = "†"
TUNED = "‡"
NOT_FINITE = "§"
IN_CACHE = "in cache"
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
    "±": r"$\pm$",
} | {sign: "\\" + sign for sign in "$&#_%"}
MARKDOWN = {sign: "\\" + sign for sign in "\\`*_[]"} | {sign: f"&#{ord(sign)};" for sign in "<>&|~$"}


CACHED = "the model fits into the processor's cache, so it is no statement about memory"

SHIFTED = (
    " Rates were tried on fewer tokens, and the choice was multiplied by the ratio that the smallest size measured "
    "between the best rates on all tokens and on as few."
)


@dataclass(frozen=True)
class Table:
    header: list[str]
    rows: list[list[str]]
    align: str  # one letter a column, l or r
    notes: list[str]
    title: str = ""
    folded: bool = False  # closed in the report until a reader opens it


def latex(text: str) -> str:
    return "".join(LATEX.get(sign, sign) for sign in text)


def markdown(text: str) -> str:
    return "".join(MARKDOWN.get(sign, sign) for sign in text)


def significant(value, digits: int = 3) -> str:
    """A value with `digits` significant digits and a comma after thousands: 0.0312, 4.57, 12,300."""
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


def share_text(value, of) -> str:
    return MISSING if number(value) is None or not number(of) else f"{100 * value / of:.3g} %"


def results_table(results: Results) -> Table:
    at = results.reference
    timed = {variant.label: variant.decode[at] for variant in results.variants if at in variant.decode}
    rows = [_row(variant, timed.get(variant.label, {})) for variant in results.variants]
    notes = [f"Losses and training speeds: {results.seeds_text}. KV{results.cache_text}: KiB, MiB are powers of 1024."]
    if at:
        others = [variant.label for variant in results.variants if variant.label not in timed]
        which = f"at which most variants were timed (not {', '.join(others)})" if others else "at which all were timed"
        notes.append(f"Decode at batch {at[0]}, context {at[1]:,}, the largest grid point {which}.")
        if any(point["seeds"] > 1 for point in timed.values()):
            notes.append("Decode speed is that of the fastest seed, as it depends on shapes and not on the seed.")
    if tuned := [variant for variant in results.variants if variant.first("tuning")]:
        best = [variant.label for variant in tuned if variant.cost_of_sqrt2 is None]
        how = "from a parabola over the rates" if len(best) < len(tuned) else "the best of the rates"
        note = f"{TUNED} Tuned for each variant: {how} tried with {results.tuning_seeds_text}, used by no comparison."
        if 0 < len(best) < len(tuned):
            note += f" Nothing could be fitted for {', '.join(best)}: the best of the rates tried."
        notes.append(note + (SHIFTED if any(variant.first("tuning.tuned_on") for variant in tuned) else ""))
    if any(row[-3] == IN_CACHE for row in rows):
        notes.append(f"{IN_CACHE}: above the memory roof, as {CACHED}.")
    if any(row[-3].endswith(NOT_BOUND) for row in rows):
        notes.append(f"{NOT_BOUND} Not bound by memory: launches, Python, arithmetic or another program set the time.")
    if results.gaps:
        notes.append(results.gaps)
    header = "variant,arch,parameters,FFN width,KV per token,constant,learning rate,bits/byte,nats/token,"
    header += "decode ms/token,decode tokens/s,of memory roof,train tokens/s,seeds"
    return Table(header.split(","), rows, "ll" + 12 * "r", notes)


def _row(variant: VariantResults, decode: dict) -> list[str]:
    roof, mark = decode.get("roof_fraction"), NOT_BOUND if decode.get("memory_bound") is False else ""
    share = (MISSING if number(roof) is None else f"{significant(100 * roof, 2)} %") + mark
    return [
        variant.label,
        variant.arch,
        count_text(variant.first("params")),
        count_text(variant.first("options.ffn_width")),
        size_text(variant.bytes_per_token),
        size_text(variant.constant_bytes),
        rate_text(variant),
        fixed_text(variant.mean("loss.val_bpb"), 4),
        fixed_text(variant.mean("loss.val_nats"), 4),
        significant(decode.get("token_ms")),
        significant(decode.get("tokens_per_s")),
        IN_CACHE if is_in_cache(decode) else share,
        significant(variant.mean("train.tokens_per_s")),
        str(variant.seeds),
    ]


def harness_table(results: Results) -> Table | None:
    """The results of lm-eval's tasks, mean over seeds; None where none was run."""
    metrics: dict[tuple[str, str], None] = {}
    for run in (run for variant in results.variants for run in variant.runs):
        for task, values in run.get("lm_eval", {}).items():
            names = (name for name in values if not name.startswith(("sample_len", "alias")) and "_stderr" not in name)
            metrics |= dict.fromkeys((task, name) for name in names)
    rows = []
    for variant in results.variants:
        found = [mean(run.get("lm_eval", {}).get(task, {}).get(name) for run in variant.runs) for task, name in metrics]
        if any(value is not None for value in found):
            rows.append([variant.label, *map(significant, found)])
    if not rows:
        return None
    header = ["variant", *(f"{task} {name.partition(',')[0]}" for task, name in metrics)]
    return Table(header, rows, "l" + "r" * len(metrics), ["Mean over the seeds that were measured."], "lm-eval")


def rate_text(variant: VariantResults) -> str:
    rates = sorted(set(variant.values("train.lr")))
    text = "; ".join(f"{rate:g}" for rate in rates) or MISSING
    return text + TUNED if variant.first("tuning") else text


def comparison_table(results: Results) -> Table | None:
    """Each variant against the study's baseline, None where the study made no comparison."""
    rows = []
    for each in results.comparisons:
        interval = f"{each.low:+.4f} to {each.high:+.4f} ({100 * each.level:g} %)" if each.low is not None else MISSING
        difference = MISSING if each.mean is None else f"{each.mean:+.4f}"
        cost = fixed_text(results.cost_of_rates(each), 4)
        cells = [each.label, each.baseline, each.metric, difference, interval, str(each.seeds)]
        rows.append([*cells, each.verdict, cost])
    header = ["variant", "against", "metric", "mean difference", "confidence interval", "seeds", "verdict"]
    header.append("a rate off by 1.41 costs up to")
    note = "Differences are paired by seed; negative: lower than the baseline."
    if all(row[-1] == MISSING for row in rows):
        header, rows = header[:-1], [row[:-1] for row in rows]
    else:
        note += (
            f" Costs in bits per byte, by the fitted parabolas: the larger of the two variants' ({MISSING}: unknown)."
        )
    if all(each.low is None for each in results.comparisons):
        note += " One seed gives no interval, so these differences establish nothing."
    return Table(header, rows, "lllrrrlr"[: len(header)], [note], "Differences to the baseline") if rows else None


RULES = {
    "ffn": "each variant's FFN width is chosen so that it has as many parameters as the first",
    "heads": "each variant's number of query heads is chosen so that it comes nearest to the parameters of the first, "
    "with the same FFN",
    "none": "every variant as the study gives it",
}


def matching_tables(results: Results) -> list[Table]:
    """The shapes that each matching rule gives the study's variants, the rule in use first."""
    used = results.raw.get("match")
    matching = sorted(results.raw.get("matching", {}).items(), key=lambda item: item[0] != used)
    return [_matching_table(results, rule, rows, rule == used) for rule, rows in matching]


def _matching_table(results: Results, rule: str, rows: list[dict], is_used: bool) -> Table:
    first: dict[str, dict] = {}  # size -> its first variant
    cells, failed = [], []
    for row in rows:
        label = row["label"]
        base = first.setdefault(row.get("size", ""), row)
        if row.get("error"):
            failed.append(f"{label}: {row['error']}")
        params, base_params = number(row.get("params")), number(base.get("params"))
        off = f"{100 * (params / base_params - 1):+.2f} %" if params is not None and base_params else MISSING
        counts = [count_text(row.get(key)) for key in ("ffn_width", "heads", "params")]
        flops = [ratio_text(row.get(key), base.get(key)) for key in ("train_flops_per_token", "score_flops_per_token")]
        cells.append([label, *counts, off, *flops])
    of = " of its size" if len(results.sizes) > 1 else ""
    header = ["variant", "FFN width", "heads", "parameters", f"against the first{of}", "training FLOPs", "score FLOPs"]
    notes = [
        f"FLOPs per token, relative to the first variant{of}. Score FLOPs: queries times keys and weights times "
        "values, which involve no parameters.",
        *failed,
    ]
    title = f"Matching rule {rule}: {RULES[rule]} ({'in use' if is_used else 'not used'})"
    return Table(header, cells, "lrrrrrr", notes, title)


def ratio_text(value, base) -> str:
    return f"{value / base:.3f}" if number(value) is not None and number(base) else MISSING


def options_table(results: Results) -> Table:
    """Every resolved option of each variant."""
    rows = []
    for variant in results.variants:
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
