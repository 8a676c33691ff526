"""Which variants are drawn, in which order, under which names and from which studies; single figures for a paper."""

import copy
import json
import shutil
import subprocess

import matplotlib
import pytest
from test_plots import FIVE, families, put
from texts import kvf, refused

import plots
from plots import load, tables
from plots.results import ResultsError


@pytest.fixture
def study(tmp_path):
    return put(tmp_path, families())


def shown(results) -> list[str]:
    return list(results.labels)


def test_variants_are_those_that_were_named_in_their_order(study):
    whole, some = load(study), load(study, variants=["mla-64", "mha-16", "gqa-2"])
    assert shown(some) == ["mla-64", "mha-16", "gqa-2"]
    assert {each.label for each in some.comparisons} == {"mla-64", "gqa-2"}
    for label in shown(some):
        assert some.labels[label].mean("loss.val_bpb") == whole.labels[label].mean("loss.val_bpb")
    with pytest.raises(ResultsError, match="no variant 'mlb' in these results; there are mha-16, "):
        load(study, variants=["mlb"])


def test_another_name_stands_in_all_figures_and_tables(study):
    results = load(study, labels={"gqa-2": "ours $", "mha-16": "base"})
    assert {"ours $", "base"} < {*shown(results)}
    old = {"gqa-2", "mha-16"}
    assert not old & {name for each in results.comparisons for name in (each.label, each.baseline)}
    text = tables.to_markdown(tables.results_table(results), tables.comparison_table(results))
    assert not [line for line in text.splitlines() if any(name in line for name in old)]
    with pytest.raises(ResultsError, match="two variants would be called 'mqa': give each its own name"):
        load(study, labels={"gqa-2": "mqa"})


def test_a_name_without_size_is_meant_at_all_sizes(tmp_path):
    study = put(tmp_path, families(("64x2", "128x4")))
    results = load(study, labels={"gqa-2": "ours"}, variants=["mha-16", "gqa-2"])
    assert shown(results) == [f"{name}-{size}" for name in ("mha-16", "ours") for size in ("64x2", "128x4")]
    assert {variant.short for variant in results.variants} == {"mha-16", "ours"}


def test_what_was_removed_from_a_results_file_or_renamed_there_is_nowhere(study):
    raw = json.loads((study / "results.json").read_text())
    raw["runs"] = [
        run | {"label": "new"} if run["label"] == "gqa-2" else run for run in raw["runs"] if run["arch"] != "mla"
    ]
    put(study, raw | {"missing": []})
    results = load(study)
    assert "new" in shown(results)
    gone = {"gqa-2", "mla-64", "mla-32"}
    made = [tables.results_table(results), tables.comparison_table(results), *tables.matching_tables(results)]
    cells = {cell for table in made for row in table.rows for cell in row}
    assert not gone & cells
    assert not [each for each in results.comparisons if each.label in gone]


def test_studies_of_one_text_stand_on_one_plane(tmp_path):
    one, two = families(), copy.deepcopy(families())
    two |= {"study": "later", "machine": {"device": "another"}}
    for run in two["runs"]:
        run["loss"]["val_bpb"] += 0.5
    places = []
    for name, raw in (("one", one), ("two", two)):
        (tmp_path / name).mkdir()
        places.append(put(tmp_path / name, raw))
    results = load(*places)
    assert len(results.variants) == 2 * len(load(places[0]).variants)
    assert "later mha-16" in results.labels
    assert not any(variant.decode for variant in results.variants)  # timed on two machines
    _, rows = plots.frontier(results)
    losses = {row["label"]: row["val_bpb"] for row in rows}
    study = one["study"]
    assert losses["later gqa-2"] == pytest.approx(losses[f"{study} gqa-2"] + 0.5)
    two["corpus"] = two["corpus"] | {"fingerprint": "another"}
    for run in two["runs"]:
        run["corpus_fingerprint"] = "another"
    put(places[1], two)
    with pytest.raises(ResultsError, match=r"studies that differ in the corpus .* cannot be drawn together"):
        load(*places)


def test_a_figure_has_the_size_that_was_asked_for_and_follows_a_style(study):
    results = load(study)
    fig, rows = plots.frontier(results, size=(3.3, 2.2))
    assert tuple(fig.get_size_inches()) == (3.3, 2.2)
    assert {row["label"] for row in rows} == {*shown(results)}
    style = {"axes.labelsize": 5.5, "axes.facecolor": "#eeeeee"}
    fig, _ = plots.decode(results, size=(4.0, 3.0), look=style)
    assert tuple(fig.get_size_inches()) == (4.0, 3.0)
    assert fig.axes[0].xaxis.label.get_size() == 5.5
    with matplotlib.rc_context({"axes.labelsize": 6.5}):  # as a matplotlibrc of the user's sets it
        assert plots.frontier(results)[0].axes[0].xaxis.label.get_size() == 6.5
    assert matplotlib.rcParams["axes.labelsize"] == matplotlib.rcParamsDefault["axes.labelsize"]


def test_ticks_of_an_axis_that_is_made_logarithmic_have_exponents(study):
    fig, _ = plots.frontier(load(study))
    ax = fig.axes[0]
    ax.set_yscale("log")
    ax.set_ylim(1, 100)
    fig.draw_without_rendering()
    ticks = [tick.label1 for tick in ax.yaxis.get_major_ticks() if "$" in tick.label1.get_text()]
    assert ticks
    assert all(tick.get_parse_math() for tick in ticks)


def test_plot_writes_single_figures_and_leaves_the_rest_alone(study, tmp_path, capsys):
    (tmp_path / "names.yaml").write_text("gqa-2: ours\n")
    how = "--only", "frontier,cache_bytes", "--size", "3.3x2.2", "--format", "pdf,svg,eps", "--labels"
    assert kvf("plot", study, *how, tmp_path / "names.yaml", "--style", "grayscale") == 0
    paths = capsys.readouterr().out.split()
    names = {f"{name}.{kind}" for name in ("frontier", "cache_bytes") for kind in ("pdf", "svg", "eps", "csv")}
    assert {path.rpartition("/")[2] for path in paths} == names == {p.name for p in (study / "paper").iterdir()}
    assert "ours" in (study / "paper" / "frontier.csv").read_text()
    assert not (study / "report.html").exists()
    assert b"/MediaBox [ 0 0 237.6 158.4 ]" in (study / "paper" / "frontier.pdf").read_bytes()


@pytest.mark.skipif(not shutil.which("xelatex"), reason="no TeX is installed")
def test_a_pgf_has_the_fonts_of_the_document_that_takes_it(study, tmp_path, capsys):
    how = "--only", "frontier", "--format", "pgf", "--to", tmp_path
    assert kvf("plot", study, *how) == 0
    text = "\\documentclass{article}\\usepackage{pgf}\\begin{document}\\input{frontier.pgf}\\end{document}"
    (tmp_path / "paper.tex").write_text(text)
    subprocess.run(["xelatex", "-interaction=batchmode", "paper.tex"], cwd=tmp_path, check=True, capture_output=True)
    assert b"STIX" not in (tmp_path / "paper.pdf").read_bytes() + (tmp_path / "frontier.pgf").read_bytes()
    (tmp_path / "names.yaml").write_text("mqa: a & b\n")
    line = refused(capsys, "plot", study, *how, "--labels", tmp_path / "names.yaml")
    assert "frontier: TeX cannot set 'a & b': its package pgf is missing, or a label has one of _ & # $" in line


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (["--only", "fronteer"], "--only fronteer: there are frontier, "),
        (["--only", "recall"], "recall: "),
        (["--format", "bmp"], "--format bmp: there are svg, pdf, png, pgf, eps"),
        (["--size", "3"], "'3' must be WIDTHxHEIGHT in inches, 0.5 to 40, such as 3.3x2.2"),
        (["--style", "not-there"], "'not-there' is not a valid package style"),
        (["--variants", "nobody"], "no variant 'nobody' in these results"),
        (["--labels", "not-there.yaml"], "not-there.yaml: No such file"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(tmp_path, capsys, how, message):
    assert message in refused(capsys, "plot", put(tmp_path, FIVE), *how)
