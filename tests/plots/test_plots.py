"""Figures, tables and the report, from a small fixed results file (`five.json`: five variants, one seed, made by hand
in the shape and size of a laptop run) and from studies derived from it here."""

import copy
import csv
import json
import random
import re
from itertools import combinations
from pathlib import Path

import matplotlib
import pytest

import plots
from plots import figures, style, tables
from plots.results import load

FIVE = json.loads((Path(__file__).parent / "five.json").read_text())
NAMES = ["frontier", "cache_bytes", "decode", "curves", "recompute"]
HOSTILE = [
    "a_b%&",
    r"\input{x}$^~#",
    "<script>alert(1)</script>",
    "_with | pipe* and a name too long for any legend, `x`",
]


def shifted(run: dict, seed: int, by: float) -> dict:
    """The same run with another seed, its losses moved by `by` bits per byte."""
    run = copy.deepcopy(run) | {"seed": seed}
    run["loss"] = {key: value + by for key, value in run["loss"].items()}
    run["curve"] = [point | {"val_bpb": point["val_bpb"] + by} for point in run["curve"]]
    return run


def many_seeds() -> dict:
    """Three seeds of each variant, and a second label of the fourth architecture."""
    study = copy.deepcopy(FIVE)
    other = shifted(study["runs"][3], 0, 0.011) | {"label": "mla small rank"}
    other["kv"] |= {"bytes_per_token": 768, "formula_bytes_per_token": 768}
    bases = [*study["runs"], other]
    study["runs"] = [shifted(run, seed, by) for run in bases for seed, by in enumerate((0.0, 0.006, -0.003))]
    study["comparisons"] = [
        {"label": "mqa", "baseline": "mha", "metric": "val_bpb", "seeds": [0, 1, 2], "mean_diff": 0.0118,
         "ci_low": 0.004, "ci_high": 0.0196, "level": 0.95, "verdict": "higher"}
    ]  # fmt: skip
    return study


def bare_hostile() -> dict:
    """Labels that break careless writers, without any of the fields that a results file may lack."""
    study = {key: copy.deepcopy(FIVE[key]) for key in ("study", "created", "machine", "versions", "corpus", "runs")}
    for run, label in zip(study["runs"], HOSTILE, strict=False):
        run["label"] = label
    for run in study["runs"]:
        del run["curve"], run["recompute"]
        for point in run["decode"]:
            del point["memory_bound"], point["prefill_ms_iqr"]
    study["runs"][4]["loss"] |= {"val_bpb": float("nan"), "val_nats": None}
    return study


def put(directory: Path, study: dict) -> Path:
    (directory / "results.json").write_text(json.dumps(study))
    return directory


@pytest.fixture(scope="module")
def five(tmp_path_factory) -> Path:
    directory = put(tmp_path_factory.mktemp("five"), FIVE)
    (directory / "study").mkdir()
    (directory / "study" / "events.out.tfevents.1.old").write_text("from an older drawing")
    plots.draw(directory)
    return directory


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    directory = put(tmp_path_factory.mktemp("hostile"), bare_hostile())
    (directory / "figures").mkdir()
    (directory / "figures" / "curves_wide.pdf").write_text("from an older results file")
    plots.draw(directory)
    return directory


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    return load(put(tmp_path_factory.mktemp("seeds"), many_seeds()))


def rows(path: Path) -> list[dict]:
    with path.open(newline="") as lines:
        return list(csv.DictReader(lines))


def every_figure(study, width):
    with matplotlib.rc_context(style.RC):
        for name, figure in figures.FIGURES.items():
            yield name, figure.draw(figure.rows(study), study, width)


# -- files ----------------------------------------------------------------------------------------------------------


def test_every_figure_comes_in_both_widths(five):
    for name in NAMES:
        assert (five / "figures" / f"{name}.csv").exists()
        for suffix, inches in (("", 3.35), ("_wide", 6.9)):
            pdf = (five / "figures" / f"{name}{suffix}.pdf").read_bytes()
            width = float(re.search(rb"/MediaBox \[ 0 0 ([\d.]+)", pdf)[1]) / 72
            assert width == pytest.approx(inches, abs=0.01)
            assert (five / "figures" / f"{name}{suffix}.png").read_bytes().startswith(b"\x89PNG")


def test_fonts_are_embedded_as_type_42(five):
    for path in (five / "figures").glob("*.pdf"):
        content = path.read_bytes()
        assert b"/CIDFontType2" in content or b"/TrueType" in content
        assert b"/FontFile2" in content
        assert b"/Type3" not in content


def test_the_same_results_give_the_same_bytes(hostile, tmp_path):
    before = dict(matplotlib.rcParams)
    written = plots.draw(put(tmp_path, bare_hostile()))
    assert dict(matplotlib.rcParams) == before
    assert len(written) == len(set(written)) == 3 * 5 + 4  # three figures, two tables, the report, the event file
    for path in written:
        if path.parent.name != "study":  # event files hold the time of day
            assert path.read_bytes() == (hostile / path.relative_to(tmp_path)).read_bytes(), path.name


def test_tensorboard_shows_the_figures_and_the_table_of_the_last_drawing(five):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert len(list((five / "study").iterdir())) == 1
    events = EventAccumulator(str(five / "study"))
    events.Reload()
    assert sorted(events.Tags()["images"]) == sorted(f"figures/{name}" for name in NAMES)
    (tensor,) = events.Tensors("results/text_summary")
    assert b"| mha |" in tensor.tensor_proto.string_val[0]


# -- figures --------------------------------------------------------------------------------------------------------


def test_frontier_csv_holds_the_points_and_the_front(five):
    drawn = rows(five / "figures" / "frontier.csv")
    for row, run in zip(drawn, FIVE["runs"], strict=True):
        assert row["label"] == run["label"]
        assert int(row["kv_bytes_per_token"]) == run["kv"]["bytes_per_token"]
        assert float(row["val_bpb"]) == run["loss"]["val_bpb"]
    # mqa keeps as many bytes per token as yoco and has the higher loss: the only one off the front
    assert [row["label"] for row in drawn if row["on_front"] == "False"] == ["mqa"]


def test_csvs_equal_the_results(five):
    by_label = {run["label"]: run for run in FIVE["runs"]}
    for row in rows(five / "figures" / "cache_bytes.csv"):
        assert int(row["cache_bytes"]) == by_label[row["label"]]["kv"]["stored_bytes"][row["context"]]
    assert {int(row["context"]) for row in rows(five / "figures" / "cache_bytes.csv")} == {2**n for n in range(10, 21)}
    decode = rows(five / "figures" / "decode.csv")
    assert len(decode) == 20
    for row in decode:
        (point,) = (
            p
            for p in by_label[row["label"]]["decode"]
            if (str(p["batch"]), str(p["context"])) == (row["batch"], row["context"])
        )
        assert float(row["tokens_per_s"]) == point["tokens_per_s"]
        slowest = 1000 * point["batch"] / (point["token_ms"] + point["token_ms_iqr"] / 2)
        assert float(row["tokens_per_s_low"]) == pytest.approx(slowest, rel=1e-4)
        assert row["memory_bound"] == str(point["memory_bound"])
    curve = [(row["label"], int(row["tokens"]), float(row["val_bpb"])) for row in rows(five / "figures" / "curves.csv")]
    assert curve == [(run["label"], p["tokens"], p["val_bpb"]) for run in FIVE["runs"] for p in run["curve"]]
    for row in rows(five / "figures" / "recompute.csv"):
        times = by_label[row["label"]]["recompute"]
        assert float(row["speed_up"]) == pytest.approx(times["recomputed_ms"] / times["cached_ms"])


def test_points_are_drawn_where_the_csv_says(seeds):
    with matplotlib.rc_context(style.RC):
        data = figures.frontier_rows(seeds)
        (ax,) = figures.draw_frontier(data, seeds, 3.35).axes
    points = [(line.get_xdata()[0], line.get_ydata()[0]) for line in ax.lines if len(line.get_xdata()) == 1]
    assert points == [(row["kv_bytes_per_token"], row["val_bpb"]) for row in data]


def test_points_not_bound_by_memory_are_hollow(five):
    study = load(five)
    with matplotlib.rc_context(style.RC):
        data = figures.decode_rows(study)
        fig = figures.draw_decode(data, study, 6.9)
    faces = [line.get_markerfacecolor() for ax in fig.axes for line in ax.lines if line.get_linestyle() == "None"]
    faces = [face for face in faces if face != "none"]
    assert faces.count("white") == sum(not row["memory_bound"] for row in data) == 17
    assert any("hollow" in text.get_text() for text in fig.legends[0].get_texts())


def test_seeds_are_averaged_and_their_range_is_kept(seeds):
    row = figures.frontier_rows(seeds)[0]
    base = FIVE["runs"][0]["loss"]["val_bpb"]
    assert row["seeds"] == 3
    assert (row["val_bpb"], row["val_bpb_min"], row["val_bpb_max"]) == pytest.approx(
        (base + 0.001, base - 0.003, base + 0.006)
    )
    assert "mean of 3 seeds" in figures.frontier_caption(seeds, [])


def test_no_zoom_into_differences_below_one_percent(five):
    study = load(five)
    near = [row | {"val_bpb": 2.05, "val_bpb_min": 2.05, "val_bpb_max": 2.0501} for row in figures.frontier_rows(study)]
    with matplotlib.rc_context(style.RC):
        (ax,) = figures.draw_frontier(near, study, 3.35).axes
    low, high = ax.get_ylim()
    assert high - low > 0.02


def texts(fig) -> list:
    """Bounding boxes of all visible text, in pixels."""
    fig.draw_without_rendering()
    found = [text for text in fig.findobj(matplotlib.text.Text) if text.get_visible() and text.get_text().strip()]
    ticks = [tick for ax in fig.axes for axis in (ax.xaxis, ax.yaxis) for tick in axis.get_major_ticks()]
    shown = {id(tick.label1) for ax in fig.axes for axis in (ax.xaxis, ax.yaxis) for tick in axis._update_ticks()}
    unshown = {id(label) for tick in ticks for label in (tick.label1, tick.label2)} - shown
    return [(text.get_text(), text.get_window_extent()) for text in found if id(text) not in unshown]


def check_texts(fig, name) -> None:
    boxes = texts(fig)
    page = fig.bbox.padded(1)
    assert boxes
    for text, box in boxes:
        assert page.x0 <= box.x0 < box.x1 <= page.x1, (name, text)
        assert page.y0 <= box.y0 < box.y1 <= page.y1, (name, text)
    for (one, a), (two, b) in combinations(boxes, 2):
        assert not a.padded(-0.5).overlaps(b.padded(-0.5)), (name, one, two)


@pytest.mark.parametrize("width", style.PAGES.values())
def test_no_text_is_cut_off_or_overlaps(seeds, five, tmp_path, width):
    long = copy.deepcopy(FIVE)
    for index, run in enumerate(long["runs"]):
        run["label"] = f"{index} multi-head latent attention of rank {index}, without a query latent, and W{'W' * 40}"
    for study in (load(five), seeds, load(put(tmp_path, long))):
        for name, fig in every_figure(study, width):
            check_texts(fig, name)


def test_frontier_labels_never_overlap_on_random_data(five):
    study, draw = load(five), random.Random(0)
    placed = 0
    for _ in range(12):
        data = figures.frontier_rows(study)
        for row in data:
            middle, spread = 2 + draw.random(), draw.choice((0, 0, 0.01))
            row |= {"kv_bytes_per_token": draw.choice((0, 256, 512, 700, 4096)), "val_bpb": middle, "on_front": False}
            row |= {"val_bpb_min": middle - spread, "val_bpb_max": middle + spread, "seeds": 2 if spread else 1}
        data[0]["on_front"] = True
        with matplotlib.rc_context(style.RC):
            fig = figures.draw_frontier(data, study, draw.choice((3.35, 6.9)))
        check_texts(fig, data)
        placed += not fig.legends
        assert len(fig.axes[0].texts) == (0 if fig.legends else len(data))
    assert placed > 6


def test_architectures_keep_colour_and_marker_and_labels_differ(seeds):
    looks = {variant.label: variant.look for variant in seeds.variants}
    assert looks["mla"].color == looks["mla small rank"].color == style.PALETTE[FIVE["archs"].index("mla")]
    assert looks["mla"].marker == looks["mla small rank"].marker
    assert looks["mla"].fill != looks["mla small rank"].fill
    assert looks["mla"].line != looks["mla small rank"].line
    assert len({style.Look.of(arch, 0) for arch in range(50)}) == 50


def test_first_five_colours_differ_in_grey():
    def lightness(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 116 * (0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]) ** (1 / 3) - 16

    assert all(abs(lightness(a) - lightness(b)) >= 10 for a, b in combinations(style.PALETTE[:5], 2))


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (512, "512 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (5 * 2**20, "5 MiB")]
)
def test_bytes_are_written_in_powers_of_1024(count, text):
    assert style.bytes_text(count) == text


# -- tables ---------------------------------------------------------------------------------------------------------


def test_results_table_holds_exact_values(five):
    lines = (five / "tables" / "results.md").read_text().splitlines()
    assert lines[2] == ("| mha | mha | 917,632 | 384 | 4 KiB | 0 B | 2.0574 | 4.3205 | 8.8 | 909 | 74 % | 21,300 | 1 |")
    assert "| yoco | yoco | 919,040 | 384 | 1 KiB | 64 KiB | 2.0655 |" in lines[6]
    assert "31 %†" in lines[3]
    assert "Decode at batch 8, context 1,024" in "\n".join(lines)
    tex = (five / "tables" / "results.tex").read_text()
    assert r"mha & mha & 917,632 & 384 & 4 KiB & 0 B & 2.0574 & 4.3205 & 8.8 & 909 & 74 \% & 21,300 & 1 \\" in tex
    assert r"31 \%$^{\dagger}$" in tex
    assert all(rule in tex for rule in (r"\toprule", r"\midrule", r"\bottomrule"))


def test_reference_point_is_the_largest_that_all_share(tmp_path):
    study = copy.deepcopy(FIVE)
    study["runs"][1]["decode"].pop()  # batch 8, context 1024
    assert load(put(tmp_path, study)).reference == (8, 256)
    study["runs"][1]["decode"] = []
    bare = load(put(tmp_path, study))
    assert bare.reference is None
    assert tables.results_table(bare).rows[0][8] == tables.MISSING


def test_labels_are_escaped_in_tables(hostile):
    tex = (hostile / "tables" / "results.tex").read_text()
    assert r"a\_b\%\& & mha" in tex
    assert r"\textbackslash{}input\{x\}\$\textasciicircum{}\textasciitilde{}\# & mqa" in tex
    assert r"\textless{}script\textgreater{}" in tex
    text = (hostile / "tables" / "results.md").read_text()
    assert r"| a\_b%&#38; | mha |" in text
    assert "<" not in text
    for line in text.splitlines()[:7]:
        assert line.count("|") == 14  # 13 columns: the pipe in a label is none of them


# -- report ---------------------------------------------------------------------------------------------------------


def test_report_needs_nothing_but_itself(five, hostile):
    for directory in (five, hostile):
        page = (directory / "report.html").read_text()
        assert "<script" not in page
        assert "<link" not in page
        sources = re.findall(r"(?:src|srcset|href)=\"([^\"]*)\"", page)
        assert sources
        assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
        assert "@import" not in page
        assert "url(" not in page


def test_report_says_that_one_seed_shows_no_order(five):
    page = (five / "report.html").read_text()
    assert "One seed: nothing can be concluded about which variant has the lower loss" in page
    assert "17 of 20 decode points (hollow in the figure) are not bound by memory" in page
    for fact in (FIVE["corpus"]["fingerprint"], FIVE["machine"]["cpu"], FIVE["versions"]["torch"], "parameter count"):
        assert fact in page


def test_report_with_seeds_gives_the_verdicts(seeds):
    from plots import report

    said = dict(report.conclusions(seeds))
    assert "One seed" not in said["Loss"]
    assert "3 seeds" in said["Loss"]
    assert said["Verdict: higher"] == "mqa against mha (val_bpb)."


def test_report_escapes_labels(hostile):
    page = (hostile / "report.html").read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "a_b%&amp;" in page


def test_what_is_missing_is_left_out_and_said(hostile):
    assert {path.name.split(".")[0] for path in (hostile / "figures").iterdir()} == {
        name + suffix for name in NAMES[:3] for suffix in style.PAGES
    }
    page = (hostile / "report.html").read_text()
    assert "Left out: Training" in page
    assert "Left out: With and without the cache" in page
    assert "do not say which points memory bounds" in page
    assert "Without a finite loss in some run: yoco" in page


# -- errors ---------------------------------------------------------------------------------------------------------


def broken(change) -> str:
    study = copy.deepcopy(FIVE)
    change(study)
    return json.dumps(study)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "no such file"),
        ("{", "cannot be read as JSON"),
        ("[]", 'no list "runs"'),
        ('{"runs": []}', "no finished runs"),
        (broken(lambda study: study["runs"][2].pop("label")), r'runs\[2\] has no valid "label"'),
        (broken(lambda study: study["runs"][1]["kv"].pop("bytes_per_token")), r'runs\[1\] has no number "kv.bytes_per'),
        (broken(lambda study: study["runs"][0].update(decode=[1])), r"runs\[0\] has a \"decode\""),
        (broken(lambda study: study["runs"][0].update(label="mqa")), "two architectures"),
        (broken(lambda study: study["runs"][0].update(corpus_fingerprint="other")), "different corpora"),
    ],
)
def test_a_bad_results_file_is_one_clear_line(tmp_path, content, says):
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(plots.ResultsError, match=says) as caught:
        plots.draw(tmp_path)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == ([] if content is None else [tmp_path / "results.json"])
