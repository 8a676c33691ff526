"""Tables on techniques: every variant's cache under every technique, and what is best at the bytes of each full
cache."""

from dataclasses import replace

from plots.results import Difference, Results, TechniqueResult, one_line
from plots.tables import MISSING, NOT_FINITE, Table, fixed_text, share_text, significant, size_text


def option_text(key: str, value) -> str:
    if key == "budget":
        return f"budget {100 * value:.4g} %" if isinstance(value, float) else f"budget {value} tokens"
    return f"{value} bit" if key == "bits" else f"{key} {value}"


def settings_text(result: TechniqueResult) -> str:
    options = [option_text(key, value) for key, value in result.settings.items() if key != "technique"]
    return ", ".join(options) or MISSING


def by_baseline(results: Results) -> dict[str, list[TechniqueResult]]:
    """For each variant the entries that hold at most the bytes of its full cache, the best first."""
    groups: dict[str, list[TechniqueResult]] = {}
    for result in results.equal_bytes:
        groups.setdefault(result.difference.baseline, []).append(result)
    return groups


def count_candidates(group: list[TechniqueResult]) -> int:
    return sum(result.chosen_from for result in group)


def unchanged_caches(results: Results) -> dict[str, TechniqueResult]:
    return {result.label: result for result in results.techniques if result.is_unchanged}


def trained_further_note(group: list[TechniqueResult]) -> list[str]:
    """A note on techniques whose models were trained further, if there are any."""
    names = dict.fromkeys(result.technique for result in group if result.trained_further)
    if not names:
        return []
    return [
        f"Models under {', '.join(names)} were trained further. They are compared with the same models after as much "
        "further training under a full cache, which differ from the other full caches by what more tokens buy."
    ]


def winner_table(results: Results) -> Table | None:
    """The best at the bytes of each variant's full cache."""
    full, rows = unchanged_caches(results), []
    for baseline, group in by_baseline(results).items():
        best, cells = group[0], [*what_cells(full[baseline]), *[MISSING] * 4]
        if best.best:
            cells = [*what_cells(best), *difference_cells(best.difference)]
        own_bytes, own_quality = size_text(best.baseline_bytes), fixed_text(full[baseline].mean, 4)
        rows.append([baseline, own_bytes, own_quality, *cells, str(count_candidates(group))])
    if not rows:
        return None
    quality = heading(results.equal_bytes)
    header = ["at the bytes of", "its full cache", f"its {quality}", "best", "technique", "settings", "cache held"]
    header += [quality, "difference", "interval", "seeds", "verdict", "chosen from"]
    notes = [*chosen_notes(results), *measured_notes(results)]
    return Table(header, rows, "lrrlllrrrrrlr", notes, "Best at equal bytes")


def technique_tables(results: Results) -> list[Table]:
    firsts = sorted({variants[0].baseline for variants in results.sizes.values()})
    of_each, of_first = {}, {}
    for baseline, group in by_baseline(results).items():
        labels: dict[str, list[TechniqueResult]] = {}
        for result in group:
            labels.setdefault(result.label, []).append(result)
        of_each[baseline] = [replace(own[0], chosen_from=count_candidates(own)) for own in labels.values()]
        of_first[baseline] = [result for result in group if result.label in firsts]
    tables = [
        chosen_table(results, "Best of each variant at equal bytes", of_each),
        chosen_table(results, f"Best of each technique on {', '.join(firsts)} at equal bytes", of_first),
        all_table(results),
    ]
    return [table for table in tables if table]


def chosen_table(results: Results, title: str, chosen: dict[str, list[TechniqueResult]]) -> Table | None:
    rows = []
    for baseline, group in chosen.items():
        for best in group:
            cells = [*what_cells(best), *difference_cells(best.difference), str(best.chosen_from)]
            rows.append([baseline, size_text(best.baseline_bytes), *cells])
    if not rows:
        return None
    header = ["at the bytes of", "its full cache", "variant", "technique", "settings", "cache held"]
    header += [heading(results.equal_bytes), "difference", "interval", "seeds", "verdict", "best of"]
    return Table(header, rows, "lrlllrrrrrlr", chosen_notes(results), title, folded=True)


def all_table(results: Results) -> Table | None:
    if not results.techniques:
        return None
    full, rows = unchanged_caches(results), []
    for result in results.techniques:
        *what, quality = what_cells(result)
        if result.not_finite:
            quality += NOT_FINITE
        share = share_text(result.bytes_held, full[result.label].bytes_held)
        cells = [*what, share, size_text(result.notes_bytes), quality, *difference_cells(result.difference)]
        rows.append([*cells, significant(result.tokens_per_s)])
    notes = [f"Differences are to the same variant's full cache, paired by seed. {level_text(results)}: Student's t."]
    notes += measured_notes(results)
    if any(result.not_finite for result in results.techniques):
        notes.append(
            f"{NOT_FINITE} Not finite for some seed: the mean is over the others, and it is no candidate in the tables "
            "of the best."
        )
    skipped: dict[tuple[str, str], list[str]] = {}  # (label, reason) -> techniques
    for entry in results.raw["techniques"]:
        if "skipped" in entry:
            names = skipped.setdefault((entry["label"], one_line(entry["skipped"])), [])
            if entry["kind"] not in names:
                names.append(entry["kind"])
    notes += [f"Not measured: {label} under {', '.join(names)}: {why}." for (label, why), names in skipped.items()]
    header = ["variant", "technique", "settings", "cache held", "of its full cache", "metadata"]
    header += [heading(results.techniques), "difference", "interval", "seeds", "verdict", "decode tokens/s"]
    return Table(header, rows, "lllrrrrrrrlr", notes, "Techniques on the cache", folded=True)


def what_cells(result: TechniqueResult) -> list[str]:
    size, quality = size_text(result.bytes_held), fixed_text(result.mean, 4)
    return [result.label, result.kind, settings_text(result), size, quality]


def difference_cells(each: Difference) -> list[str]:
    if each.mean is None:
        return [MISSING, MISSING, str(each.seeds), MISSING]
    interval = f"{each.low:+.4f} to {each.high:+.4f}" if each.low is not None else MISSING
    return [f"{each.mean:+.4f}", interval, str(each.seeds), each.verdict]


def heading(group: list[TechniqueResult]) -> str:
    return "bits/byte" if group[0].metric == "val_bpb" else "accuracy"


def level_text(results: Results) -> str:
    levels = ", ".join(f"{level:g} %" for level in results.levels)
    return f"Intervals ({levels})" if levels else "No intervals"


def measured_notes(results: Results) -> list[str]:
    return [
        "Bytes are those of one sequence's cache at its end, without the technique's metadata. Quality is that of the "
        "second half, decoded with the technique active.",
        *trained_further_note(results.techniques),
    ]


def chosen_notes(results: Results) -> list[str]:
    return [
        "Chosen from all variants of the same size under all techniques and settings measured, and from the other "
        "variants' full caches, where they hold at most those bytes plus 1 % (slots and groups are whole). Differences "
        f"are to the variant trained for those bytes, paired by seed. {level_text(results)}: Student's t.",
        "The best is chosen by its mean: among many candidates this flatters it, and its interval is that of a single "
        "comparison.",
    ]
