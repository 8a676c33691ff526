"""What pages say of results is in the results: every number, and every sentence that stands between marks.

`python tests/test_results.py` writes the marked parts of all pages again.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from plots import tables
from plots.report import sentences_as_markdown
from plots.results import load
from train.store import STUDIES as SHIPPED
from train.study import parse_study, read_yaml
from train.variants import resolve_variants

ROOT = Path(__file__).resolve().parent.parent
STUDIES = sorted(path.parent for path in ROOT.glob("results/**/results.json"))
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("results/**/README.md"))]
MARKED = re.compile(r"<!-- (results/\S+) ([^\n]+) -->\n(.*?)<!-- end -->", re.S)
NUMBER = re.compile(r"(?<![\w.#-])(?>([-+]?\d[\d,]*+(?:\.\d++)?+))(?:\s?(%|B|KiB|MiB|M|k)(?!\w))?(?!\w)")
NOT_STATED = r"^    [^\n]*$", r"```.*?```", r"`[^`]*`", r"\]\([^)]*\)", r"<[^>]*>", r"arXiv [\d.]+"
PATH = re.compile(r"(?:^|[\s\",>(|])(?:[A-Z]:)?[/\\](?:[\w.-]+[/\\])+[\w.-]+", re.M)
SCALES = {"%": 100.0, "KiB": 2**-10, "MiB": 2**-20, "M": 1e-6, "k": 1e-3, "": 100.0}


def marked(folder: Path, name: str) -> str:
    """The part of a results' page that is called `name`: a heading of findings.md, or the title of a table."""
    results = load(folder)
    parts = re.findall(r"^## (.+)\n\n((?:.+\n)+)", sentences_as_markdown(results), re.M)
    found = dict(reversed(parts))  # the findings, where conclusions have the same heading
    return (found | {table.title: tables.to_markdown(table) for table in every_table(results) if table})[name]


def every_table(results) -> list:
    from plots.figures import FIGURES

    of_figures = [table for figure in FIGURES.values() for make in figure.tables for table in [make(results)]]
    return [tables.comparison_table(results), *of_figures]


def filled(text: str) -> str:
    """The text of a page with its marked parts made again."""
    part = lambda m: f"<!-- {m[1]} {m[2]} -->\n{marked(ROOT / m[1], m[2])}<!-- end -->"  # noqa: E731
    return MARKED.sub(part, text)


def stated(text: str) -> list[tuple[str, str]]:
    """(number, unit) of every number of a page, outside of code, links, marks and the sources of papers."""
    for left_out in (MARKED.pattern, *NOT_STATED):
        text = re.sub(left_out, " ", text, flags=re.M | re.S)
    return [(number.rstrip(","), unit) for number, unit in NUMBER.findall(text)]


def values(folder: Path) -> np.ndarray:
    """Every number in results.json, and in what is drawn from it: means over seeds stand there."""
    drawn = [*folder.glob("figures/*.csv"), *folder.glob("tables/*.md")]
    texts = [path.read_text(encoding="utf-8") for path in (folder / "results.json", *drawn)]
    found = {each for text in texts for each in re.findall(r"\d[\d,]*\.?\d*(?:e-?\d+)?", text)}
    return np.array([float(each.replace(",", "")) for each in found])


def is_among(number: str, unit: str, known: np.ndarray) -> bool:
    """True if a known value is this number once it is rounded to as many digits."""
    wanted, decimals = abs(float(number.replace(",", ""))), len(number.partition(".")[2])
    error = 0.5 * 10.0**-decimals * (1 + 1e-9)
    return any((np.abs(known * scale - wanted) <= error).any() for scale in (1.0, SCALES.get(unit, 1.0)))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_number_of_a_page_is_in_its_results(page):
    folders = [folder for folder in STUDIES if page.parent == ROOT or folder.is_relative_to(page.parent)]
    known = np.concatenate([np.arange(13.0), *map(values, folders)])  # what is counted in words and figures alike
    text = page.read_text(encoding="utf-8")
    assert [f"{number} {unit}" for number, unit in stated(text) if not is_among(number, unit, known)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_marked_sentences_are_those_of_the_results(page):
    text = page.read_text(encoding="utf-8")
    assert filled(text) == text


@pytest.mark.parametrize("folder", STUDIES, ids=lambda folder: folder.relative_to(ROOT).as_posix())
def test_tables_are_those_of_the_results(folder):
    results = load(folder)
    assert (folder / "tables" / "findings.md").read_text(encoding="utf-8") == sentences_as_markdown(results)


@pytest.mark.parametrize("folder", STUDIES, ids=lambda folder: folder.relative_to(ROOT).as_posix())
def test_no_path_of_a_machine_is_published(folder):
    files = [path for path in folder.rglob("*") if path.suffix in (".json", ".csv", ".md", ".tex", ".html")]
    found = {path.name: PATH.findall(path.read_text(encoding="utf-8")) for path in files}
    assert {name: paths for name, paths in found.items() if paths} == {}


@pytest.mark.parametrize("name", ["techniques", "mla", "ladder", "neighbours"])
def test_rates_that_studies_take_from_frontier_are_those_that_it_chose(name):
    records = json.loads((ROOT / "results/cpu-frontier/results.json").read_text(encoding="utf-8"))["runs"]
    chosen = {(r["arch"], json.dumps(r["options"], sort_keys=True)): r["tuning"]["lr"] for r in records}
    study = parse_study(read_yaml(SHIPPED / f"{name}.yaml"))
    given = [variant for variant in resolve_variants(study, study.tokenizer.vocab_size, SHIPPED) if variant.lr]
    if name != "neighbours":  # their MLA's FFN is 126 wide, frontier's 125, and their rate was chosen for that
        given = [variant for variant in given if variant.lr != 5.17e-3]
    assert given
    rates = {
        variant.label: chosen.get((variant.arch, json.dumps(variant.options, sort_keys=True))) for variant in given
    }
    assert {variant.label: variant.lr for variant in given} == rates


def test_a_number_that_is_in_no_results_is_found():
    text = "A gap of -0.0312 (32.1 % of 1,024 B, see [that](4.md), `9.9`, arXiv 2405.05254) after 2.72M tokens, n = 10."
    assert stated(text) == [("-0.0312", ""), ("32.1", "%"), ("1,024", "B"), ("2.72", "M"), ("10", "")]
    known = np.array([0.031249, 0.32149, 1024.0, 2_720_000.0, 10.0])
    assert all(is_among(*each, known) for each in stated(text))
    assert not is_among("0.0313", "", known)
    assert not is_among("33", "%", known)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
