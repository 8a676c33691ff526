"""The documentation holds: its code runs, its studies and commands are accepted, its links lead somewhere."""

import re
import shlex

import pytest
from texts import write_texts

from archs import VARIANTS
from archs.decoder import Options
from kvfrontier import main
from train.options import parser
from train.store import STUDIES
from train.study import parse_study, read_yaml

ROOT = STUDIES.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("results/*/README.md"))]
}


def blocks(language):
    """(page, its blocks of code in a language) for each page that has some."""
    found = {page: re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S) for page, text in PAGES.items()}
    return [pytest.param(page, code, id=page) for page, code in found.items() if code]


@pytest.mark.parametrize(("page", "code"), blocks("python"))
def test_the_code_of_a_page_runs(page, code, tmp_path, monkeypatch):
    """A block whose first line names a file is written to that file as well."""
    write_texts(tmp_path)
    (tmp_path / "results").symlink_to(ROOT / "results")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("KVFRONTIER_CACHE", str(tmp_path / "cache"))
    names: dict = {"__name__": "page"}
    for block in code:
        if file := re.match(r"# (\w+\.py)\n", block):
            (tmp_path / file[1]).write_text(block, encoding="utf-8")
        exec(compile(block, page, "exec"), names)


@pytest.mark.parametrize(("page", "code"), blocks("yaml"))
def test_the_studies_of_a_page_are_accepted(page, code, tmp_path):
    for block in code:
        (tmp_path / "study.yaml").write_text(block, encoding="utf-8")
        parse_study(read_yaml(tmp_path / "study.yaml"))


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_are_commands(page):
    """The command line's parser ends the process for any other."""
    lines = re.sub(r"\\\n", "", PAGES[page])
    for command in re.findall(r"^    [^#\n]*\bkvfrontier (.+)$", lines, re.M):
        parser().parse_args(shlex.split(command, comments=True))


def test_figures_of_shipped_results_are_drawn_as_the_page_says(tmp_path, monkeypatch, capsys):
    command = re.search(r"kvfrontier (plot results/.+) --to paper", PAGES["docs/figures.md"])[1]
    monkeypatch.chdir(ROOT)
    assert main([*shlex.split(command), "--to", str(tmp_path)]) == 0, capsys.readouterr().err
    assert {file.name for file in tmp_path.iterdir()} >= {"frontier.pdf", "decode.pdf", "frontier.csv"}


def anchors(text):
    """The names by which a page's headings can be linked to."""
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_the_links_of_a_page_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.M | re.S)
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    for link in links:
        place, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / place).resolve() if place else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


def test_the_readme_links_to_every_page():
    for page in PAGES:
        assert page == "README.md" or f"]({page})" in PAGES["README.md"], page


def test_the_table_of_options_is_that_of_the_variants():
    table = PAGES["docs/write-a-study.md"].partition("| arch | options |\n")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| (`.*?) \| (.*) \|$", table, re.M)
    listed = {arch: options for archs, options in rows for arch in re.findall(r"`(\w+)`", archs)}
    assert listed.keys() == VARIANTS.keys()
    for arch, options in listed.items():
        own = VARIANTS[arch].Options.model_fields.keys() - Options.model_fields.keys()
        assert own == set(re.findall(r"(?:^|, )`(\w+)`", options)), arch


def test_the_readme_names_the_commands_that_ci_runs():
    commands = re.findall(r"^    (pip install .*)$", PAGES["README.md"], re.M)
    run, test = commands
    assert run == "pip install -q uv && uv run kvfrontier run"
    assert test in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
