"""Figures, tables and the report, from `five.json` (a results file made by hand: five variants, one seed) and from
studies that are derived from it here."""

import copy
import csv
import dataclasses
import io
import json
import math
import random
import re
import statistics
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import matplotlib.image
import pytest

import plots
from eval.compare import compare
from eval.equal_bytes import bytes_for_accuracy, equal_bytes, technique_differences
from eval.scaling import scaling
from plots import drawing, figures, labels, report, style, tables, technique_tables
from plots.figures import frontier, rates, recall, sizes, techniques
from plots.results import TechniqueResult, load
from train.tuning import choose, facts

FIVE = json.loads((Path(__file__).parent / "five.json").read_text())
NAMES = ["frontier", "cache_bytes", "decode", "curves", "recompute"]  # the figures of five.json
HOSTILE = ["a_b%&", r"\input{x}$^~#", "<script>alert(1)</script>", "_with | pipe* and a name long for legends, `x`"]


def relabelled(study: dict, names: list[str]) -> dict:
    """The same study with other labels, the first of them the baseline."""
    study = copy.deepcopy(study)
    for run, name in zip(study["runs"], names, strict=True):
        run |= {"label": name, "family": name, "baseline": names[0]}
    return study


SHAPES = {  # label: family, bytes per token, what it adds to the loss of mha-16
    "mha-16": ("mha", 1024, 0.0), "mha-8": ("mha", 512, 0.015), "mqa": ("mqa", 128, 0.03), "gqa-4": ("gqa", 512, 0.0),
    "gqa-2": ("gqa", 256, 0.02), "mla-64": ("mla", 576, -0.03), "mla-32": ("mla", 320, 0.001),
    "yoco-8": ("yoco", 256, 0.002), "yoco-2": ("yoco", 64, 0.02),
}  # fmt: skip


def tuned(worse: float, falling: bool = False) -> dict:
    """A tuning with two seeds whose best rate is 0.005, or which nothing could be fitted to, as the loss falls on."""
    draw, losses = random.Random(worse), {}
    for rate in (0.001, 0.002, 0.004, 0.008, 0.016):
        octaves = math.log2(rate / 0.005)
        loss = 2.1 + worse - (0.02 * octaves if falling else -0.01 * octaves**2)
        losses[rate] = {seed: loss + 0.05 * (seed == 1001) + draw.gauss(0, 0.003) for seed in (1000, 1001)}
    if not falling:
        losses[0.032] = {1000: math.inf, 1001: 9.0}
    return facts(choose(losses), losses)


def families(sizes: tuple[str, ...] = ("",), seeds: int = 3, task: str = "text", labels=tuple(SHAPES)) -> dict:
    """A study with all that comparisons record: families, sizes, tuned rates, details, bytes for a baseline's loss."""
    draw, runs = random.Random(0), []
    for (scale, size), label, seed in ((a, b, c) for a in enumerate(sizes, 1) for b in labels for c in range(seeds)):
        family, kept, worse = SHAPES[label]
        scale = 1 if "muon" in size else scale
        run = copy.deepcopy(FIVE["runs"][FIVE["archs"].index(family)])
        full, first = (f"{name}-{size}" if size else name for name in (label, labels[0]))
        run |= {"label": full, "family": family, "size": size, "baseline": first, "seed": seed, "match": "ffn"}
        run["corpus_fingerprint"] = FIVE["corpus"]["fingerprint"]
        run |= {"params": run["params"] * scale**2, "tokenizer": {"name": "bpe", "vocab_size": 1024}}
        run["kv"] |= {"bytes_per_token": kept * scale, "formula_bytes_per_token": kept * scale}
        run["tuning"] = tuned(worse, falling=label == "mqa")
        run["train"] |= {"lr": run["tuning"]["lr"], "flops_per_token": 6e6 * scale**2}
        bpb = 2.1 - 0.2 * math.log(scale) + 0.02 * seed + worse + draw.gauss(0, 0.001)
        run["loss"] = {"val_bpb": bpb, "val_nats": 2 * bpb, "tokens": 1000}
        if task == "text":
            at = {str(2**k): 2 * bpb + 0.6**k + k * worse for k in range(6)}
            run["loss"] |= {"hit_nats": bpb + worse, "rest_nats": 2.2 * bpb, "hit_tokens": 130, "rest_tokens": 870}
            run["loss"] |= {"nats_at": at}
        else:
            at = {str(pairs): 1 / (1 + pairs * max(worse + 0.03, 0)) + draw.gauss(0, 0.001) for pairs in (4, 16, 64)}
            back = {
                str(distance): value / distance**0.05 for distance, value in zip((2, 8, 64), at.values(), strict=True)
            }
            run["loss"] |= {"accuracy": statistics.fmean(at.values()), "accuracy_at": at, "accuracy_at_distance": back}
        runs.append(run)
    of = f"mha-16-{sizes[0]}" if sizes[0] else "mha-16"
    need = {"size": sizes[0], "baseline": of, "baseline_bytes_per_token": 1024, "seeds": list(range(seeds))}
    need |= {"level": 0.95, "low": None, "high": None}
    reached = {"verdict": "reached", "bytes_per_token": 340.0} | ({"low": 330.0} if seeds > 1 else {})
    mla, mqa = ([run["label"] for run in runs if run["family"] == name and run["seed"] == 0] for name in ("mla", "mqa"))
    shapes = [
        {"label": run["label"], "size": run["size"], "ffn_width": 384, "heads": 4, "params": run["params"]}
        | {"train_flops_per_token": 6e6, "score_flops_per_token": 1e5 * (1 + (run["arch"] == "mla"))}
        for run in runs
        if run["seed"] == 0
    ]
    return FIVE | {
        "runs": runs,
        **dict(zip(("comparisons", "details"), compare(runs), strict=True)),
        "bytes_for_baseline": [
            need | {"family": "mla", "labels": mla} | reached,
            need | {"family": "mqa", "labels": mqa, "verdict": "not reached", "bytes_per_token": None, "low": 128},
            need | {"family": "gqa", "labels": mqa, "verdict": "at most", "bytes_per_token": 128},
        ],
        "gap_changes": [
            {
                "label": "gqa-2",
                "baseline": "mha-16",
                "metric": "val_bpb",
                "sizes": [sizes[0], sizes[-1]],
                "seeds": [0, 1, 2],
            }
            | {"mean_diff": 0.01, "ci_low": low, "ci_high": 0.03, "level": 0.95, "verdict": verdict}
            for low, verdict in ((-0.01, "not separable"), (0.005, "higher"))
            if len(sizes) > 1
        ],
        "matching": {"none": shapes, "ffn": shapes, "heads": [{"label": "mla-64", "error": "cannot be done"}]},
    }


def power_laws(seeds: int = 3) -> dict:
    """Three sizes, whose baseline's loss falls with its training FLOPs to the power of 0.07. Of the others one has the
    loss that it has after 0.8 times these FLOPs, one nearly its loss, and one ever better ones."""
    names, draw = ("64x2", "128x4", "256x6"), random.Random(0)
    study = families(names, seeds=seeds, labels=("mha-16", "gqa-2", "mla-32", "mqa"))
    for run in study["runs"]:
        scale = 1 + names.index(run["size"])
        run["train"]["flops_per_token"] = 6e6 * scale**2
        worth = {"mha": 1, "gqa": 0.8, "mla": 1.01, "mqa": 1.3 * scale**0.6}[run["arch"]]
        law = (2.5 + 0.1 * run["seed"]) * (worth * scale**2) ** -0.07
        run["loss"]["val_bpb"] = law * math.exp(draw.gauss(0, 0.003 if run["arch"] == "mla" else 1e-6))
    return study | {"comparisons": compare(study["runs"])[0], "scaling": scaling(study["runs"])}


SHARES = {("contiguous", None): 0.5, ("doubling", None): 0.2, ("paged", 16): 0.02, ("paged", 64): 0.05}  # wasted


def with_paging(unit: int = 1000) -> dict:
    study = copy.deepcopy(FIVE)
    for needed, run in enumerate(study["runs"], 1):
        shape = {"lengths": "documents", "sequences": 4, "max_tokens": 512, "tokens": 600}
        run["paging"] = [
            shape | {"needed_bytes": needed * unit, "cache": cache, "block_size": block_size}
            | {"held_bytes": needed * unit / (1 - share), "wasted_bytes": needed * unit * share / (1 - share)}
            for (cache, block_size), share in SHARES.items()
        ]  # fmt: skip
    return study


EVICTION = ("h2o", "streaming-llm", "vatp", "snapkv", "l2-norm", "fastgen")


def under_techniques(seeds=3, task="text", copies=1, names=("h2o", "streaming-llm", "dmc"), more=()) -> dict:
    """Five architectures (each `copies` times) with techniques on their caches; YOCO skips one, and one loss is NaN."""
    draw, runs = random.Random(0), []
    shares = {"mha": (1.0, 0.0), "mqa": (0.25, 0.03), "gqa": (0.5, 0.012), "mla": (0.31, -0.01), "yoco": (0.28, 0.02)}
    entries = [{"technique": "full"}, *({"technique": "full", "bits": bits, "residual": 16} for bits in (8, 2))]
    entries += [{"technique": name, "budget": budget} for name in names for budget in (0.25, 0.5)]
    entries += [{"technique": "dmc", "budget": 1.0}] if "dmc" in names else []
    entries = [entry | ({"train_tokens": 9, "lr": 0.1} if entry["technique"] == "dmc" else {}) for entry in entries]
    entries += more
    for base, copied, seed in ((a, b, c) for a in FIVE["runs"] for b in range(copies) for c in range(seeds)):
        run = copy.deepcopy(base) | {"seed": seed, "size": "", "family": base["label"], "baseline": "mha"}
        run["label"] += f"-{copied}" if copied else ""
        share, worse = shares[base["arch"]]
        share, own = share * (1 - 0.02 * copied), 0.02 * seed + worse + draw.gauss(0, 0.003)
        run["techniques"] = []
        for settings in entries:
            if settings["technique"] == names[0] and base["arch"] == "yoco":
                run["techniques"].append(settings | {"skipped": "it sees no attention"})
                continue
            kept = settings.get("budget", (2 + settings.get("bits", 30)) / 32)
            lost = own + 0.02 * (1 / kept - 1) + draw.gauss(0, 0.0005)
            if (settings["technique"], kept) == (names[1], 0.25):
                lost += 0.5
            elif (base["arch"], seed, settings["technique"], kept) == ("mha", 1, names[-1], 0.25):
                lost = math.nan
            measured = {"val_bpb": math.nan if task == "recall" else 2.1 + lost, "accuracy": max(0.0, 0.9 - 4 * lost)}
            measured["accuracy_at"] = {"4": min(1.0, measured["accuracy"] + 0.12), "16": measured["accuracy"] / 1.5}
            measured |= {"bytes_held": 2**19 * share * kept, "notes_bytes": 512.0, "tokens_per_s": 900.0 + seed}
            run["techniques"].append(settings | measured | {"prompt": 64, "tokens": 128, "val_nats": 4.0})
        if task == "recall":
            run["loss"] |= {"accuracy": 0.9 - 4 * own, "accuracy_at": {"4": 0.9 - 4 * own}}
        runs.append(run)
    compared = {"techniques": technique_differences(runs), "equal_bytes": equal_bytes(runs)}
    if task == "recall":
        compared["bytes_for_accuracy"] = bytes_for_accuracy(runs)
    return json.loads(json.dumps(FIVE | {"runs": runs} | compared))


LONG = [f"{n} multi-head latent attention of rank {n}, without a query latent, and W{'W' * 40}" for n in range(5)]
STUDIES = {
    "long labels": relabelled(FIVE, LONG),
    "long labels, one context": relabelled(
        FIVE | {"runs": [run | {"decode": run["decode"][-1:]} for run in FIVE["runs"]]}, LONG
    ),
    "paging": with_paging(),
    "techniques": under_techniques(),
    "techniques, recall": under_techniques(task="recall"),
    "techniques, one seed": under_techniques(seeds=1),
    "techniques, many": under_techniques(
        2, copies=2, names=EVICTION, more=[{"technique": name, "budget": 0.5, "bits": 4} for name in EVICTION]
    ),
    "families": families(),
    "sizes": families(("64x2", "128x4"), labels=("mha-16", "gqa-2", "mla-32", "mqa")),
    "recall": families(task="recall", labels=("mha-16", "mha-8", "gqa-2", "mla-32", "yoco-2", "mqa")),
    "one seed": families(seeds=1),
    "scaling": power_laws(),
    "recipes": families(("64x2", "64x2-muon"), labels=("mha-16", "gqa-2", "mqa")),
}


def bare_hostile() -> dict:
    """Labels that break careless writers, without any of the fields that a results file may lack."""
    keys = "study", "created", "machine", "versions", "corpus", "runs"
    study = relabelled({key: FIVE[key] for key in keys}, [*HOSTILE, "yoco"])
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
    for name in ("figures/curves_wide.pdf", "figures/techniques.csv", "tables/techniques.md"):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text("from an older results file")
    plots.draw(directory)
    return directory


@pytest.fixture(scope="module")
def studies(tmp_path_factory) -> dict:
    return {name: load(put(tmp_path_factory.mktemp("studies"), raw)) for name, raw in STUDIES.items()}


def rows(path: Path) -> list[dict]:
    with path.open(newline="") as lines:
        return list(csv.DictReader(lines))


def drawn(name: str, study, width: float = 6.9, data: list[dict] | None = None) -> tuple:
    """The rows of a figure, which are `data` if given, and the figure."""
    figure = figures.FIGURES[name]
    data = figure.rows(study) if data is None else data
    with matplotlib.rc_context(style.RC):
        return data, figure.draw(data, study, width)


def findings(study) -> list[str]:
    return [sentence for _, sentences in report.findings(study) for sentence in sentences]


def test_every_figure_comes_in_both_widths_with_fonts_of_type_42(five):
    for name in NAMES:
        assert (five / "figures" / f"{name}.csv").exists()
        for suffix, inches in (("", 3.35), ("_wide", 6.9)):
            pdf = (five / "figures" / f"{name}{suffix}.pdf").read_bytes()
            width = float(re.search(rb"/MediaBox \[ 0 0 ([\d.]+)", pdf)[1]) / 72
            assert width == pytest.approx(inches, abs=0.01)
            assert b"/CIDFontType2" in pdf or b"/TrueType" in pdf
            assert b"/FontFile2" in pdf
            assert b"/Type3" not in pdf
            assert (five / "figures" / f"{name}{suffix}.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_results_give_the_same_bytes(hostile, tmp_path):
    before = dict(matplotlib.rcParams)
    written = plots.draw(put(tmp_path, bare_hostile()))
    assert dict(matplotlib.rcParams) == before
    assert len(written) == len(set(written)) == 3 * 5 + 6  # three figures, four tables, the report, the event file
    for path in written:
        if path.parent.name != "study":  # event files hold the time of day
            assert path.read_bytes() == (hostile / path.relative_to(tmp_path)).read_bytes(), path.name


def test_tensorboard_shows_the_figures_and_the_table_of_the_last_drawing(five):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert len(list((five / "study").iterdir())) == 1
    events = EventAccumulator(str(five / "study")).Reload()
    assert sorted(events.Tags()["images"]) == sorted(f"figures/{name}" for name in NAMES)
    (image,) = events.Images("figures/frontier")
    png = (five / "figures" / "frontier_wide.png").read_bytes()
    assert image.encoded_image_string == png
    assert (image.height, image.width) == matplotlib.image.imread(io.BytesIO(png)).shape[:2]
    (tensor,) = events.Tensors("results/text_summary")
    assert b"| mha |" in tensor.tensor_proto.string_val[0]


def test_csvs_equal_the_results(five):
    by_label = {run["label"]: run for run in FIVE["runs"]}
    csvs = {name: rows(five / "figures" / f"{name}.csv") for name in NAMES}
    points = [(row["label"], int(row["kv_bytes_per_token"]), float(row["val_bpb"])) for row in csvs["frontier"]]
    assert points == [(run["label"], run["kv"]["bytes_per_token"], run["loss"]["val_bpb"]) for run in FIVE["runs"]]
    # mqa keeps as many bytes per token as yoco and has the higher loss: the only one off the front
    assert [row["label"] for row in csvs["frontier"] if row["on_front"] == "False"] == ["mqa"]
    for row in csvs["cache_bytes"]:
        assert int(row["cache_bytes"]) == by_label[row["label"]]["kv"]["stored_bytes"][row["context"]]
    assert {int(row["context"]) for row in csvs["cache_bytes"]} == {2**n for n in range(10, 21)}
    assert len(csvs["decode"]) == 20
    for row in csvs["decode"]:
        at = int(row["batch"]), int(row["context"])
        (point,) = (p for p in by_label[row["label"]]["decode"] if (p["batch"], p["context"]) == at)
        assert float(row["tokens_per_s"]) == point["tokens_per_s"]
        slowest = 1000 * point["batch"] / (point["token_ms"] + point["token_ms_iqr"] / 2)
        assert float(row["tokens_per_s_low"]) == pytest.approx(slowest, rel=1e-4)
        assert row["memory_bound"] == str(point["memory_bound"])
    curve = [(row["label"], int(row["tokens"]), float(row["val_bpb"])) for row in csvs["curves"]]
    assert curve == [(run["label"], p["tokens"], p["val_bpb"]) for run in FIVE["runs"] for p in run["curve"]]
    for row in csvs["recompute"]:
        times = by_label[row["label"]]["recompute"]
        assert float(row["speed_up"]) == pytest.approx(times["recomputed_ms"] / times["cached_ms"])


def test_points_not_bound_by_memory_are_hollow(five):
    data, fig = drawn("decode", load(five))
    faces = [line.get_markerfacecolor() for ax in fig.axes for line in ax.lines if line.get_linestyle() == "None"]
    faces = [face for face in faces if face != "none"]
    assert faces.count("white") == sum(not row["memory_bound"] for row in data) == 17
    assert any("hollow" in text.get_text() for text in fig.legends[0].get_texts())


def test_seeds_are_averaged_and_bars_are_paired_intervals(studies):
    study = studies["families"]
    first, second, *_ = frontier.frontier_rows(study)
    base, other = (statistics.fmean(study.labels[row["label"]].values("loss.val_bpb")) for row in (first, second))
    assert first["seeds"] == 3
    assert (first["val_bpb"], second["val_bpb"]) == pytest.approx((base, other))
    assert first["baseline"]
    assert first["val_bpb_low"] is first["val_bpb_high"] is None  # it is compared with nothing
    each = study.differences[second["label"], "val_bpb"]
    assert (second["val_bpb_low"], second["val_bpb_high"]) == pytest.approx((base + each.low, base + each.high))
    caption = frontier.frontier_caption(study, [first, second])
    assert "mean of 3 seeds" in caption
    assert "95 % intervals (Student, paired by seed, n = 3)" in caption


def test_no_zoom_into_differences_below_one_percent(five):
    study = load(five)
    near = [row | {"val_bpb": 2.05 + index / 1e6} for index, row in enumerate(frontier.frontier_rows(study))]
    _, fig = drawn("frontier", study, 3.35, near)
    low, high = fig.axes[0].get_ylim()
    assert high - low > 0.02


NUMBERS = {  # figure: (study, columns of its CSV that are drawn, the axis that holds them)
    "frontier": ("families", ["val_bpb", "val_bpb_low", "val_bpb_high"], "y"),
    "rates": ("families", ["val_bpb", "optimum_bpb"], "y"),
    "sizes": ("sizes", ["val_bpb", "difference", "difference_low", "difference_high"], "y"),
    "positions": ("families", ["val_nats", "difference", "difference_low", "difference_high"], "y"),
    "recall_hits": ("families", ["hits", "hits_low", "hits_high", "rest", "rest_low", "rest_high"], "x"),
    "techniques": ("techniques", ["quality", "quality_low", "quality_high"], "y"),
    "recall": ("recall", ["accuracy", "accuracy_min", "accuracy_max"], "y"),
    "paging": ("paging", ["held_bytes", "needed_bytes"], "x"),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_what_is_drawn_is_what_the_csv_holds(studies, name):
    study, columns, axis = NUMBERS[name]
    data, fig = drawn(name, studies[study])
    in_csv = {round(float(row[column]), 9) for row in data for column in columns if row[column] is not None}
    lines = [line for ax in fig.axes for line in ax.lines if line.get_transform() == ax.transData]
    values = {line: {round(float(v), 9) for v in getattr(line, f"get_{axis}data")() if v is not None} for line in lines}
    assert in_csv <= set.union(*values.values())
    assert set.union(*(values[line] for line in lines if line.get_marker() != "None")) <= in_csv


def test_drawing_needs_neither_torch_nor_what_measured():
    code = "import sys, plots; print({'torch', 'lightning', 'archs', 'train', 'eval'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_a_file_in_the_folder_is_a_figure(five, tmp_path, monkeypatch):
    source = """
import dataclasses
from matplotlib.figure import Figure
from plots.figures.recompute import FIGURE as old

own = {"draw": lambda rows, study, width: Figure((width, 1)), "findings": lambda study: [("New", "Said.")]}
FIGURE = dataclasses.replace(old, name="new_one", order=15, **own)
"""
    (tmp_path / "new_one.py").write_text(source)
    monkeypatch.setattr(figures, "__path__", [*figures.__path__, str(tmp_path)])
    found = figures.scan()
    assert list(found)[:3] == ["frontier", "new_one", "sizes"]
    assert set(found) == {*figures.FIGURES, "new_one"}
    for module in (plots, report):
        monkeypatch.setattr(module, "FIGURES", {"new_one": found["new_one"]})
    plots.draw(put(tmp_path, FIVE))
    assert len(rows(tmp_path / "figures" / "new_one.csv")) == 5
    assert "<dd>Said.</dd>" in (tmp_path / "report.html").read_text()


def test_families_are_curves_by_rising_bytes(studies):
    _, fig = drawn("frontier", studies["families"], 3.35)
    curves = {line.get_color(): list(line.get_xdata()) for line in fig.axes[0].lines if line.get_linewidth() == 0.9}
    colour = {name: style.PALETTE[FIVE["archs"].index(name)] for name in FIVE["archs"]}
    assert curves == {
        colour["mha"]: [512, 1024], colour["gqa"]: [256, 512], colour["mla"]: [320, 576], colour["yoco"]: [64, 256],
    }  # fmt: skip


def test_every_size_has_its_own_front_and_baseline(studies):
    data, fig = drawn("frontier", studies["sizes"])
    assert [row["label"] for row in data if row["baseline"]] == ["mha-16-64x2", "mha-16-128x4"]
    assert {row["size"] for row in data if row["on_front"]} == {"64x2", "128x4"}
    assert [ax.get_title() for ax in fig.axes] == ["64x2 (918k)", "128x4 (3.67M)"]


def test_recall_shows_where_variants_differ_most(studies):
    data = figures.FIGURES["recall"].rows(studies["recall"])
    apart = {pairs: [row["accuracy"] for row in data if row["pairs"] == pairs] for pairs in (4, 16, 64)}
    widest = max(apart, key=lambda pairs: max(apart[pairs]) - min(apart[pairs]))
    assert {row["pairs"] for row in data if row["in_byte_panel"]} == {widest}


@pytest.mark.parametrize("width", style.PAGES.values())
def test_recall_has_a_panel_by_distance_where_it_was_measured(studies, tmp_path, width):
    study, old = studies["recall"], copy.deepcopy(STUDIES["recall"])
    data, fig = drawn("recall", study, width)
    assert [ax.get_title() for ax in fig.axes][:2] == ["by number of pairs", "by distance"]
    assert len(fig.axes) == 3
    for row in (row for row in data if row["distance"]):
        values = study.labels[row["label"]].values(f"loss.accuracy_at_distance.{row['distance']}")
        assert row["accuracy"] == pytest.approx(statistics.fmean(values))
    assert "64: over 32 and up to 64 tokens" in figures.FIGURES["recall"].caption(study, data)
    for run in old["runs"]:
        del run["loss"]["accuracy_at_distance"]
    before = load(put(tmp_path, old))
    data, fig = drawn("recall", before, width)
    check_texts(fig, "recall")
    assert len(fig.axes) == 2
    assert "distance" not in figures.FIGURES["recall"].caption(before, data)
    assert recall.byte_table(before) is None
    assert recall.long_byte_tables(before) == recall.byte_sentences(before) == []


def test_the_fewest_bytes_for_an_accuracy_are_tabled(studies):
    study = studies["techniques, recall"]
    short, (long,) = recall.byte_table(study), recall.long_byte_tables(study)
    assert short.header == ["variant", "4 pairs", "16 pairs"]
    assert [[label, *cells] for label, kind, *cells in long.rows if kind == "full"] == short.rows
    cells = {(*row[:2], int(pairs)): cell for row in long.rows for pairs, cell in zip((4, 16), row[2:], strict=True)}
    for each in study.raw["bytes_for_accuracy"]:
        needed = [each["bytes"][share] for share in ("0.99", "0.9", "0.5")]
        texts = [tables.MISSING if held is None else style.bytes_text(held) for held in needed]
        assert cells.pop((each["label"], each["kind"], each["pairs"])) == " / ".join(texts)
    assert not cells
    assert short.notes[0].startswith("Fewest bytes for 99 % / 90 % / 50 % of the queries answered right (mean of 3 se")


def test_findings_name_the_caches_with_the_fewest_bytes_for_the_most_pairs(studies):
    raw = STUDIES["recall"]
    needs = {  # (label, kind): bytes at 64 pairs
        ("mha-16", "full"): (4096, 4096, 4096), ("mla-32", "full"): (None, 2048, 2048), ("mqa", "full"): (None,) * 3,
        ("mha-16", "h2o"): (None, 2048, 512), ("mqa", "h2o"): (None, None, 512),
    }  # fmt: skip
    entries = [
        {"label": label, "size": "", "kind": kind, "pairs": pairs}
        | {"bytes": dict(zip(("0.99", "0.9", "0.5"), held if pairs == 64 else (1, 1, 1), strict=True))}
        for (label, kind), held in needs.items()
        for pairs in (4, 64)
    ]
    study = dataclasses.replace(studies["recall"], raw=raw | {"bytes_for_accuracy": entries})
    assert recall.byte_sentences(study) == [
        "To answer 99 % of the queries at 64 pairs (mean over seeds) right, the fewest cache bytes are 4 KiB by mha-16"
        "; of full caches alone 4 KiB by mha-16; the full caches of mla-32, mqa never reach it.",
        "To answer 90 % of the queries at 64 pairs (mean over seeds) right, the fewest cache bytes are 2 KiB by mla-32 "
        "and mha-16 (h2o); of full caches alone 2 KiB by mla-32; the full caches of mqa never reach it.",
        "To answer 50 % of the queries at 64 pairs (mean over seeds) right, the fewest cache bytes are 512 B by mha-16 "
        "(h2o) and mqa (h2o); of full caches alone 2 KiB by mla-32; the full caches of mqa never reach it.",
    ]
    for entry in entries:
        entry["bytes"]["0.99"] = None
    none = "No cache measured answers 99 % of the queries at 64 pairs (mean over seeds) right."
    assert recall.byte_sentences(study)[0] == none
    one = dataclasses.replace(study, variants=studies["one seed"].variants)
    assert recall.byte_sentences(one)[0].startswith("One seed: nothing can be concluded")


@pytest.mark.parametrize(
    ("name", "study", "reason"),
    [
        ("frontier", "recall", "recall shows accuracy instead"),
        ("techniques", "one seed", "no techniques on the cache"),
        ("paging", "one seed", "`paging`"),
    ],
)
def test_a_figure_of_what_was_not_measured_is_not_drawn(studies, name, study, reason):
    with pytest.raises(drawing.NotInResults, match=reason):
        drawn(name, studies[study])


def test_paged_caches_are_described_with_their_waste(studies):
    figure, study = figures.FIGURES["paging"], studies["paging"]
    data = figure.rows(study)
    assert [(row["label"], row["cache"], row["block_size"]) for row in data[:4]] == [("mha", *kind) for kind in SHARES]
    assert [row["wasted_share"] for row in data] == pytest.approx([*SHARES.values()] * len(FIVE["runs"]))
    caption = figure.caption(study, data)
    assert all(text in caption for text in ("contiguous 50.0%", "blocks of 16 2.0%", "documents", "4 sequences"))


@pytest.mark.parametrize("unit", [1, 10**12])
@pytest.mark.parametrize("width", style.PAGES.values())
def test_the_axis_of_paged_caches_has_ticks_at_every_size(tmp_path, unit, width):
    _, fig = drawn("paging", load(put(tmp_path, with_paging(unit))), width)
    assert len(fig.axes[0].get_xticklabels()) >= 2
    check_texts(fig, unit)


def test_a_techniques_line_falls_in_bytes_from_its_models_full_cache(studies):
    data, fig = drawn("techniques", studies["techniques"])
    full = {row["label"]: (row["bytes_held"], row["quality"]) for row in data if not row["line"]}
    assert set(full) == {run["label"] for run in FIVE["runs"]}
    assert [ax.get_title() for ax in fig.axes] == list(full)
    for ax in fig.axes:
        assert (ax.get_xlim(), ax.get_ylim()) == (fig.axes[0].get_xlim(), fig.axes[0].get_ylim())
        lines = [line for line in ax.lines if line.get_linewidth() == 0.8]
        assert len(lines) == (3 if ax.get_title() == "yoco" else 4)
        for line in lines:
            assert list(line.get_xdata()) == sorted(line.get_xdata(), reverse=True)
            assert len(line.get_xdata()) == 3
            assert line.get_xdata()[0] == full[ax.get_title()][0]
        starts = [line.get_ydata()[0] == full[ax.get_title()][1] for line in lines]
        assert starts == [True] * (len(lines) - 1) + [False]  # dmc's is another model, as it was trained further
        points = {(line.get_xdata()[0], line.get_ydata()[0]) for line in ax.lines if len(line.get_xdata()) == 1}
        assert set(full.values()) <= points
        black = [line for line in ax.lines if line.get_color() == "#111111"]
        assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in black] == [full[ax.get_title()]]
    names = [text.get_text() for text in fig.legends[0].get_texts()]
    assert names == ["quantised", "h2o", "streaming-llm", "dmc, trained further", *full]


def test_what_ruins_a_model_does_not_press_the_rest_together_and_is_said(studies):
    study = studies["techniques"]
    data = techniques.technique_rows(study)
    caption = techniques.technique_caption(study, data)
    top = techniques.limits(data)[1]
    above = [row for row in data if row["quality"] > top]
    assert 0 < len(above) <= len([row for row in data if row["line"]]) / 4
    full = [row["quality"] for row in data if not row["line"]]
    assert top >= min(full) + 2 * (max(full) - min(full))  # they are not pressed together
    assert f"{len(above)} of {len(data)} points lie above the panels" in caption
    assert all(row["line"] for row in above)
    assert "Models under dmc were trained further" in caption
    assert "n = 2 to 3" in caption
    accuracy = techniques.technique_rows(studies["techniques, recall"])
    low, high = techniques.limits(accuracy)
    assert all(low < row["quality"] < high for row in accuracy)


def test_of_many_variants_and_lines_some_are_drawn_and_that_is_said(studies):
    study = studies["techniques, many"]
    data = techniques.technique_rows(study)
    assert len({row["label"] for row in data if row["line"]}) == techniques.PANELS
    assert len({row["label"] for row in data}) == 10
    caption = techniques.technique_caption(study, data)
    assert "6 of 10 models and 10 of 13 lines are shown." in caption


def test_lines_of_one_technique_are_told_apart_by_what_differs():
    settings = [
        {"technique": "h2o", "budget": budget, "recent": recent} | bits
        for budget in (0.5, 64)
        for recent in (0.25, 0.75)
        for bits in ({}, {"bits": 4, "group": 32})
    ]
    settings += [{"technique": "full", "bits": bits} for bits in (2, 8)]
    settings += [{"technique": "full"}, {"technique": "snapkv", "budget": 0.5, "window": 8}]
    entries = [each | {"val_bpb": 2.0, "bytes_held": 1.0} for each in settings]
    record = {"label": "mha", "size": "", "seed": 0, "loss": {}, "techniques": entries}
    results = [TechniqueResult.of(entry) for entry in technique_differences([record])]
    assert sorted(set(techniques.line_names(results).values())) == [
        "h2o, recent 0.25", "h2o, recent 0.25, 4 bit, group 32", "h2o, recent 0.75",
        "h2o, recent 0.75, 4 bit, group 32", "quantised", "snapkv",
    ]  # fmt: skip


def test_lines_of_more_techniques_than_colours_look_different():
    looks = techniques.line_looks([{"technique": f"t{n}", "line": f"t{n}"} for n in range(techniques.LINES)])
    assert len({tuple(look.values()) for look in looks.values()}) == techniques.LINES > len(techniques.COLOURS)


def test_without_techniques_there_is_no_table(five):
    study = load(five)
    assert technique_tables.winner_table(study) is None
    assert technique_tables.technique_tables(study) == []
    assert techniques.technique_findings(study) == []
    assert not (five / "tables" / "techniques.md").exists()


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


LAYOUTS = [  # (study, width, figures): what crowds each figure most; the narrow page does more than the wide one
    ("long labels", 3.35, NAMES),
    ("long labels", 6.9, ["frontier", "decode"]),
    ("families", 3.35, [*NAMES, "rates", "positions", "recall_hits"]),
    ("families", 6.9, ["frontier", "rates", "positions"]),
    ("sizes", 3.35, ["frontier", "sizes", "cache_bytes", "decode"]),
    ("sizes", 6.9, ["frontier", "sizes", "rates"]),
    ("scaling", 3.35, ["sizes"]),
    ("scaling", 6.9, ["sizes"]),
    ("recipes", 3.35, ["rates", "curves"]),
    ("long labels, one context", 3.35, ["decode", "recompute"]),
    ("recall", 3.35, ["recall"]),
    ("recall", 6.9, ["recall"]),
    ("techniques", 3.35, ["techniques"]),
    ("techniques", 6.9, ["techniques"]),
    ("techniques, recall", 3.35, ["techniques"]),
    ("techniques, many", 3.35, ["techniques"]),
    ("paging", 3.35, ["paging"]),
]


@pytest.mark.parametrize(("study", "width", "names"), LAYOUTS)
def test_no_text_is_cut_off_or_overlaps(studies, study, width, names):
    for name in names:
        check_texts(drawn(name, studies[study], width)[1], name)


def test_frontier_labels_never_overlap_on_random_data(five):
    study, draw = load(five), random.Random(0)
    placed = 0
    for _ in range(8):
        data = frontier.frontier_rows(study)
        for row in data:
            middle, half = 2 + draw.random(), draw.choice((None, None, 0.01))
            row |= {"kv_bytes_per_token": draw.choice((0, 256, 512, 700, 4096)), "val_bpb": middle, "on_front": False}
            row |= {"val_bpb_low": half and middle - half, "val_bpb_high": half and middle + half}
        data[0]["on_front"] = True
        _, fig = drawn("frontier", study, draw.choice((3.35, 6.9)), data)
        check_texts(fig, data)
        (ax,) = fig.axes
        points = {text.xy: ax.transData.transform(text.xy) for text in ax.texts}
        for text in ax.texts:
            assert text.get_bbox_patch().get_facecolor() == (1, 1, 1, 1)  # no line strikes it out
            assert labels.is_nearest(text.get_window_extent(), points[text.xy], points.values())
        placed += not fig.legends
        assert len(fig.axes[0].texts) == (0 if fig.legends else len(data))
    assert placed > 4


def test_points_of_equal_bytes_stand_side_by_side(studies):
    study, draw = studies["techniques, many"], random.Random(0)
    data = frontier.frontier_rows(study)
    assert len(data) == 10
    for width in (3.35, 6.9):
        for row in data:
            middle, half = 2 + draw.random() / 5, draw.random() / 5
            row |= {"kv_bytes_per_token": draw.choice((384, 400, 1536)), "val_bpb": middle}
            row |= {"val_bpb_low": middle - half, "val_bpb_high": middle + half}
        _, fig = drawn("frontier", study, width, data)
        (ax,), point = fig.axes, fig.dpi / 72
        marks = [line for line in ax.lines if line.get_markersize() == 5.5 and line.get_marker() != "None"]
        pixels = {y: ax.transData.transform((x, y))[0] for ((x, y),) in (mark.get_xydata() for mark in marks)}
        ordered = sorted(data, key=lambda row: (row["kv_bytes_per_token"], row["val_bpb"]))
        assert set(pixels) == {row["val_bpb"] for row in data}
        for a, b in combinations(ordered, 2):
            if a["val_bpb_low"] < b["val_bpb_high"] and b["val_bpb_low"] < a["val_bpb_high"]:
                assert pixels[b["val_bpb"]] - pixels[a["val_bpb"]] > 0.8 * drawing.APART * point


def test_recalls_points_stand_nearest_to_their_number_of_pairs(studies):
    study, places = studies["techniques, many"], [2, 3, 4, 16]
    ends = dict.fromkeys(("accuracy", "accuracy_min", "accuracy_max"), 0.5)
    rest = ends | {"kv_bytes_per_token": 384, "distance": None}
    names = [drawing.named(variant) | rest for variant in study.variants]
    data = [name | {"pairs": n, "in_byte_panel": n == 16} for name in names for n in places]
    _, fig = drawn("recall", study, 6.9, data)
    lines = [line for line in fig.axes[0].lines if line.get_markersize() == 3.4]
    assert len(lines) == len(study.variants) == 10
    for line in lines:
        assert [min(places, key=lambda n: abs(math.log(x / n))) for x in line.get_xdata()] == places
    shown = [line.get_xdata()[0] for line in fig.axes[-1].lines if line.get_linestyle() == "None"]
    assert len(set(shown)) == len(shown) == 10


def test_architectures_keep_colour_and_marker_and_labels_differ(studies):
    first, second = (studies["families"].labels[label].look for label in ("mla-64", "mla-32"))
    assert first.color == second.color == style.PALETTE[FIVE["archs"].index("mla")]
    assert (first.marker, first.fill != second.fill, first.line != second.line) == (second.marker, True, True)
    assert len({style.Look.of(arch, 0) for arch in range(50)}) == 50
    assert len({style.Look.of(0, sibling) for sibling in range(20)}) == 20
    small, large = (studies["sizes"].labels[f"gqa-2-{size}"] for size in ("64x2", "128x4"))
    assert small.look == large.look
    assert (small.short, small.value) == ("gqa-2", "2")


def test_first_five_colours_differ_in_grey():
    def lightness(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 116 * (0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]) ** (1 / 3) - 16

    assert all(abs(lightness(a) - lightness(b)) >= 10 for a, b in combinations(style.PALETTE[:5], 2))


def test_bytes_are_written_in_powers_of_1024_and_shortened_labels_keep_their_ends():
    texts = [style.bytes_text(n) for n in (0, 512, 1024, 1536, 5 * 2**20)]
    assert texts == ["0 B", "512 B", "1 KiB", "1.5 KiB", "5 MiB"]
    names = [style.wrapped(f"gqa with a long name and {n} KV heads of many-{n}", 20) for n in range(8)]
    assert len(set(names)) == 8
    assert all(len(line) <= 20 for name in names for line in name.split("\n"))
    assert style.wrapped("mha") == "mha"


def test_results_table_holds_exact_values(five):
    lines = (five / "tables" / "results.md").read_text().splitlines()
    row = "mha | mha | 917,632 | 384 | 4 KiB | 0 B | 0.002 | 2.0574 | 4.3205 | 8.8 | 909 | 74 % | 21,300 | 1"
    assert lines[2] == f"| {row} |"
    assert "| yoco | yoco | 919,040 | 384 | 1 KiB | 64 KiB | 0.002 | 2.0655 |" in lines[6]
    assert "31 %†" in lines[3]
    assert "Decode at batch 8, context 1,024" in "\n".join(lines)
    tex = (five / "tables" / "results.tex").read_text()
    assert row.replace("|", "&").replace("%", r"\%") + r" \\" in tex
    assert r"31 \%$^{\dagger}$" in tex
    assert all(rule in tex for rule in (r"\toprule", r"\midrule", r"\bottomrule"))


def test_reference_point_is_the_largest_that_most_share(tmp_path):
    study = copy.deepcopy(FIVE)
    study["runs"][1]["decode"].pop()  # batch 8, context 1024
    assert load(put(tmp_path, study)).reference == (8, 256)
    study["runs"][1]["decode"] = []
    without = load(put(tmp_path, study))
    assert without.reference == (8, 1024)
    table, label = tables.results_table(without), without.variants[1].label
    assert [row[9] == tables.MISSING for row in table.rows] == [row[0] == label for row in table.rows]
    assert f"at which most variants were timed (not {label})." in table.notes[1]
    for run in study["runs"]:
        run["decode"] = []
    bare = load(put(tmp_path, study))
    assert bare.reference is None
    assert tables.results_table(bare).rows[0][9] == tables.MISSING


def test_of_several_seeds_the_fastest_recomputes(tmp_path):
    fast, recompute = FIVE["runs"][0], figures.FIGURES["recompute"]
    slow = fast | {"seed": 1, "recompute": fast["recompute"] | {"cached_ms": 50 * fast["recompute"]["cached_ms"]}}
    both = load(put(tmp_path, FIVE | {"runs": [*FIVE["runs"], slow]}))
    first, *others = recompute.rows(both)
    assert first["cached_ms"] == fast["recompute"]["cached_ms"]
    assert [row["seeds"] for row in (first, *others)] == [2] + [1] * len(others)
    assert "the fastest of several seeds" in recompute.caption(both, [first, *others])


def test_one_seed_of_several_timed_is_called_one(tmp_path):
    runs = FIVE["runs"] + [run | {"seed": 1, "decode": []} for run in FIVE["runs"]]
    both, decode = load(put(tmp_path, FIVE | {"runs": runs})), figures.FIGURES["decode"]
    points = decode.rows(both)
    assert {row["seeds"] for row in points} == {1}
    assert "Bars: interquartile range" in decode.caption(both, points)
    assert "fastest" not in " ".join(tables.results_table(both).notes)


def test_variants_without_a_common_seed_are_said_not_to_be_compared(tmp_path):
    others = [each for each in STUDIES["families"]["comparisons"] if each["label"] != "mqa"]
    study = load(put(tmp_path, STUDIES["families"] | {"comparisons": others}))
    sentence = "mqa is not compared: it has no seed in common with mha-16."
    assert ("Loss", sentence) in frontier.frontier_findings(study)


def test_labels_are_escaped(hostile):
    page = (hostile / "report.html").read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "a_b%&amp;" in page
    tex = (hostile / "tables" / "results.tex").read_text()
    assert r"a\_b\%\& & mha" in tex
    assert r"\textbackslash{}input\{x\}\$\textasciicircum{}\textasciitilde{}\# & mqa" in tex
    assert r"\textless{}script\textgreater{}" in tex
    text = (hostile / "tables" / "results.md").read_text()
    assert r"| a\_b%&#38; | mha |" in text
    assert "<" not in text
    for line in text.splitlines()[:7]:
        assert line.count("|") == 15  # 14 columns: the pipe in a label is none of them


def test_findings_as_markdown_are_those_of_the_report(hostile):
    study = load(hostile)
    said = report.findings(study) + [(about, [sentence]) for about, sentence in report.conclusions(study)]
    expected = [line for about, each in said for line in (f"## {about}", *(f"- {tables.markdown(s)}" for s in each))]
    text = (hostile / "tables" / "findings.md").read_text()
    assert [line for line in text.splitlines() if line and not line.startswith("# ")] == expected
    assert r"a\_b%&#38;" in text
    assert "<" not in text


def test_tuned_rates_are_marked(studies):
    table = tables.results_table(studies["families"])
    rates = [variant.first("tuning.lr") for variant in studies["families"].variants]
    assert [row[table.header.index("learning rate")] for row in table.rows] == [f"{r:g}{tables.TUNED}" for r in rates]
    (note,) = (note for note in table.notes if note.startswith(tables.TUNED))
    assert "a parabola over the rates tried with seeds 1000, 1001, used by no comparison. Nothing" in note
    assert "fitted for mqa: the best of the rates tried." in note
    assert rf"{rates[0]:g}$^{{\ddagger}}$" in tables.to_latex(table)


def test_a_fit_is_drawn_with_the_standard_error_of_its_minimum_and_the_rate_that_was_chosen(studies):
    data, fig = drawn("rates", studies["families"])
    for label, group in drawing.grouped(data, "label").items():
        tuning = studies["families"].labels[label].first("tuning")
        chosen = [row for row in group if row["chosen"]]
        assert [(row["kind"], row["lr"]) for row in chosen] == [("tried" if label == "mqa" else "fit", tuning["lr"])]
        if label != "mqa":
            (fit,) = chosen
            best, cost = tuning["optimum"], fit["cost_of_sqrt2"]
            octaves = math.log2(fit["lr_high"] / best), math.log2(best / fit["lr_low"])
            assert octaves == pytest.approx([tuning["octaves_error"]] * 2)
            assert fit["lr"] < fit["optimum"] == best
            assert fit["optimum_bpb"] == fit["val_bpb"] - rates.height(fit["lr"], best, cost)
            assert fit["optimum_bpb"] == pytest.approx(2.125 + SHAPES[label][2], abs=0.005)  # as `tuned` made it
            assert rates.height(2**0.5 * best, best, cost) == pytest.approx(0.0025, rel=0.2)
    dashed = [line for ax in fig.axes for line in ax.lines if line.get_linewidth() == rates.THIN]
    fits = [row for row in data if row["kind"] == "fit"]
    assert [min(line.get_ydata()) for line in dashed] == pytest.approx([row["optimum_bpb"] for row in fits], abs=1e-4)
    caption = rates.rate_caption(studies["families"], data)
    assert "with seeds 1000, 1001, which no comparison uses" in caption
    assert "Nothing could be fitted for mqa" in caption


def test_rates_tried_on_fewer_tokens_are_drawn_where_they_were_tried(tmp_path):
    study = families(seeds=2)
    for run in study["runs"]:
        run["tuning"] |= {"tokens": 100, "tuned_on": run["tuning"]["lr"], "lr": 0.7 * run["tuning"]["lr"]}
        run["train"] |= {"lr": run["tuning"]["lr"]}
    study = load(put(tmp_path, study))
    data, _ = drawn("rates", study)
    chosen = [(row["lr"], row["compared_lr"]) for row in data if row["chosen"]]
    assert chosen == [(v.first("tuning.tuned_on"), v.first("train.lr")) for v in study.variants]
    for variant in study.variants:
        if best := variant.first("tuning.optimum"):
            assert rates.below_minimum(variant)[0] == best / variant.first("tuning.tuned_on")
    for text in (rates.rate_caption(study, data), " ".join(tables.results_table(study).notes)):
        assert tables.SHIFTED in text


def test_tuning_of_before_the_fits_is_read(tmp_path):
    study = families(seeds=2)
    for run in study["runs"]:
        run["tuning"] = {"seed": 99, "at_edge": False, "rates": run["tuning"]["rates"]}
    study = load(put(tmp_path, study))
    data, fig = drawn("rates", study, 3.35)
    check_texts(fig, "rates")
    assert {row["kind"] for row in data} == {"tried", "diverged"}
    assert "with seed 99, which" in rates.rate_caption(study, data)
    assert any("the best of the rates tried with seed 99, used" in note for note in tables.results_table(study).notes)
    (warning, _) = rates.coarseness(study)
    assert "nothing was fitted for all 9 variants" in warning
    assert "1.41" not in " ".join(findings(study))
    assert len(tables.comparison_table(study).header) == 7


def test_findings_name_the_variants_whose_rates_were_given(tmp_path):
    raw = families(seeds=2)
    for run in raw["runs"]:
        run["tuning"] = run["tuning"] if run["label"] in ("mha-16", "gqa-2") else None
    study = load(put(tmp_path, raw))
    (given,) = (sentence for sentence in rates.coarseness(study) if sentence.startswith("Given by the study"))
    others = {variant.label for variant in study.variants} - {"mha-16", "gqa-2"}
    assert set(given.removesuffix(".").partition("the rates of ")[2].split(", ")) == others
    for number, run in enumerate(raw["runs"]):
        run["tuning"], run["train"]["lr"] = None, (1e-3, 2e-3)[number % 2]
    (warning,) = dict(report.findings(load(put(tmp_path, raw))))["Learning rate"]
    assert "the learning rates (0.001, 0.002) were given by the study, not tuned in it" in warning


def test_findings_say_how_sure_the_rates_are(studies):
    (sentence, *_) = rates.coarseness(studies["families"])
    variants = [variant for variant in studies["families"].variants if variant.label != "mqa"]
    errors = {variant.label: 2 ** variant.first("tuning.octaves_error") for variant in variants}
    costs = {variant.label: variant.cost_of_sqrt2 for variant in variants}
    assert "seeds 1000, 1001: 8 of 9 variants." in sentence
    below = {variant.label: variant.first("tuning.optimum") / variant.first("tuning.lr") for variant in variants}
    prices = {v.label: 4 * v.cost_of_sqrt2 * math.log2(below[v.label]) ** 2 for v in variants}
    for values, digits in ((errors, 2), (costs, 4), (below, 2), (prices, 4)):
        low, high = min(values.values()), max(values.values())
        assert f"{low:.{digits}f} to {high:.{digits}f} (most: " in sentence
        assert max(values, key=values.get) in sentence


@pytest.mark.parametrize("name", ["families", "one seed", "recall"])
def test_every_difference_in_loss_says_what_its_rates_may_cost(studies, name):
    study = studies[name]
    found, table = dict(report.findings(study)), tables.comparison_table(study)
    for each, row in zip(study.comparisons, table.rows, strict=True):
        pair = [study.labels[label].cost_of_sqrt2 for label in (each.label, each.baseline)]
        is_known = each.metric == "val_bpb" and each.label != "mqa"  # to mqa's tuning nothing could be fitted
        assert row[-1] == (f"{max(pair):.4f}" if is_known else tables.MISSING)
        of_metric = found["Loss" if each.metric == "val_bpb" else "Recall"]
        (sentence,) = (s for s in of_metric if f"{each.mean:+.4f}" in s and each.label in s)
        if name == "one seed":
            assert (f"{each.label} {each.mean:+.4f} ({row[-1]})" in sentence) == is_known
        else:
            said = f"; a rate off by a factor of 1.41 would cost up to {row[-1]}."
            assert (sentence.endswith(said), "1.41" in sentence) == (is_known, is_known)


def test_recipes_have_no_figure_by_size_but_a_table(studies):
    with pytest.raises(drawing.NotInResults, match="sizes of equal parameters"):
        drawn("sizes", studies["recipes"])
    for name in ("recipes", "sizes"):
        study = studies[name]
        table = sizes.difference_table(study)
        assert table.header == ["variant", *dict.fromkeys(run["size"] for run in study.raw["runs"])]
        for short, *cells in table.rows:
            for size, cell in zip(table.header[1:], cells, strict=True):
                each = study.differences[f"{short}-{size}", "val_bpb"]
                assert cell.startswith(f"{each.mean:+.4f} ± {each.high - each.mean:.4f}")
                assert cell.endswith("*") == each.separable
    assert sizes.difference_table(studies["families"]) is None


def test_what_a_gap_is_worth_is_said_with_the_numbers_of_known_power_laws(studies):
    study = studies["scaling"]
    found = dict(report.findings(study))["What a gap is worth"]
    gqa, mla, mqa, slopes = found
    assert gqa == (
        "gqa-2 at 256x6: the baseline mha-16 would need 0.8 times its training compute for the same loss (95 % "
        "interval 0.8 to 0.8, n = 3), so gqa-2 is worth less than mha-16; along mha-16's sizes, at equal loss gqa-2 "
        "keeps 768 B per token where mha-16 keeps 2.683 KiB (2.683 KiB to 2.683 KiB)."  # 3 KiB times the root of 0.8
    )
    assert "), which is not separable from 1; along mha-16's sizes, " in mla
    assert mqa == (
        "mqa at 256x6: the training compute that the baseline mha-16 would need for the same loss is beyond twice the "
        "trained compute, so nothing is said of it."
    )
    assert slopes == (
        "The slope of mha-16's loss over training FLOPs is 0.07 (95 % interval 0.07 to 0.07, n = 3); intervals that "
        "lie apart from its: mqa 0.091 (0.091 to 0.091); no other slope is said to differ."
    )


def test_a_table_says_what_a_gap_is_worth_at_every_size(studies):
    study = studies["scaling"]
    table = sizes.worth_table(study)
    entries = {entry["label"]: {at["size"]: at for at in entry["at"]} for entry in study.raw["scaling"]}
    assert [row[:2] for row in table.rows] == [[name, size] for name in entries for size in ("64x2", "128x4", "256x6")]
    for name, size, kept, _, *worth in table.rows:
        assert kept == style.bytes_text(study.labels[f"{name}-{size}"].bytes_per_token)
        at = entries[name].get(size)
        if at and at["compute"]:
            low, high = (style.bytes_text(at["bytes"][end]) for end in ("low", "high"))
            assert worth[0].startswith(f"{tables.significant(at['compute']['mean'])} (")
            assert worth[1] == f"{style.bytes_text(at['bytes']['mean'])} ({low} to {high})"
            assert worth[2] == f"{100 * at['bytes_per_token'] / at['bytes']['mean']:.3g} %"
        else:
            assert worth == ["beyond twice the trained compute" if at else tables.MISSING, *[tables.MISSING] * 2]
    assert table.notes[-1].startswith("Beyond twice the trained compute: ")


def test_one_seed_concludes_nothing_from_fits_over_sizes(tmp_path):
    study = load(put(tmp_path, power_laws(seeds=1)))
    *worth, slopes = dict(report.findings(study))["What a gap is worth"]
    assert all("so nothing can be concluded" in told or "nothing is said" in told for told in [*worth, slopes])
    assert any("0.8 times its training compute for the same loss (n = 1)" in told for told in worth)
    assert "nothing can be concluded" in sizes.worth_table(study).notes[1]
    _, fig = drawn("sizes", study)
    assert len(fig.axes) == 4


def test_fitted_lines_are_drawn_where_there_are_fits(studies):
    data, fig = drawn("sizes", studies["scaling"])
    for row, line in zip([row for row in data if row["size"] == "64x2"], fig.axes[1].lines[1::2], strict=True):
        xs, ys = line.get_data()
        assert -math.log(ys[-1] / ys[0]) / math.log(xs[-1] / xs[0]) == pytest.approx(row["slope"])
        assert (xs[0], ys[0]) == pytest.approx((row["train_flops"], row["val_bpb"]), rel=0.02)
    assert [row["compute"] is None for row in data if row["variant"] == "mqa"] == [False, False, True]
    study = studies["scaling"]
    before = dataclasses.replace(study, raw={key: value for key, value in study.raw.items() if key != "scaling"})
    data, fig = drawn("sizes", before)
    assert len(fig.axes) == 3
    assert [line.get_linestyle() for line in fig.axes[1].lines] == [line.get_linestyle() for line in fig.axes[0].lines]
    assert len(fig.axes[1].lines) == 4
    assert sizes.worth_table(before) is None
    assert "What a gap is worth" not in dict(report.findings(before))


def test_what_reads_faster_than_memory_is_in_cache_and_not_bound_by_memory(tmp_path):
    study = copy.deepcopy(FIVE)
    for point in study["runs"][0]["decode"]:
        point |= {"roof_fraction": 1.52, "memory_bound": True}
    study = load(put(tmp_path, study))
    table = tables.results_table(study)
    column = [row[table.header.index("of memory roof")] for row in table.rows]
    assert [cell == "in cache" for cell in column] == [True, False, False, False, False]
    assert any(note.startswith("in cache: ") and "no statement about memory" in note for note in table.notes)
    data = figures.FIGURES["decode"].rows(study)
    assert not any(row["memory_bound"] for row in data if row["label"] == study.variants[0].label)
    assert "152" not in tables.to_markdown(table)


def test_a_study_of_one_seed_or_few_tokens_calls_itself_a_demonstration(studies, tmp_path):
    def first(change: dict, seeds: int = 3) -> tuple[str, str]:
        study = families(seeds=seeds)
        for run in study["runs"]:
            run |= change
        return report.conclusions(load(put(tmp_path, study)))[0]

    many = {"train_tokens": 10**7}
    assert first(many)[0] == "Loss"
    assert first(many, seeds=1) == (
        "Demonstration", "This study shows the method: with one seed, its losses are no finding."
    )  # fmt: skip
    about, sentence = first({"train_tokens": 4 * 10**6})
    assert about == "Demonstration"
    assert "training tokens per parameter at most, its losses are no finding" in sentence


def test_bytes_for_the_baselines_loss_are_tabled(studies):
    mla, mqa, gqa = frontier.need_table(studies["families"]).rows
    assert mla == ["mla", "mha-16", "1 KiB", "340 B", "33.2 %", "330 B to over 576 B", "3", "mla-64, mla-32"]
    assert mqa[3:7] == ["not reached", tables.MISSING, "over 128 B", "3"]
    assert gqa[3:7] == ["at most 128 B", "12.5 %", "under 128 B to over 128 B", "3"]


def test_the_matching_rule_in_use_comes_first(studies):
    first, none, heads = tables.matching_tables(studies["sizes"])
    assert first.title.startswith("Matching rule ffn")
    assert first.title.endswith("(in use)")
    assert [row[4] for row in first.rows if row[0].startswith("mha")] == ["+0.00 %", "+0.00 %"]  # each of its size
    assert {row[0]: row[6] for row in none.rows}["mla-32-128x4"] == "2.000"
    assert heads.notes[1:] == ["mla-64: cannot be done"]


def test_what_is_best_at_equal_bytes_is_tabled_with_what_it_was_chosen_from(studies):
    study = studies["techniques"]
    table = technique_tables.winner_table(study)
    assert [row[0] for row in table.rows] == [run["label"] for run in FIVE["runs"]]
    by_label = {each["label"]: each for each in study.raw["techniques"] if each["settings"] == {"technique": "full"}}
    for baseline, row in zip(by_label, table.rows, strict=True):
        first, *rest = [entry for entry in study.raw["equal_bytes"] if entry["baseline"] == baseline]
        assert row[-1] == str(sum(entry["chosen_from"] for entry in (first, *rest)))
        assert row[2] == f"{by_label[baseline]['mean']:.4f}"
        interval = f"{first['ci_low']:+.4f} to {first['ci_high']:+.4f}"
        better = [f"{first['mean_diff']:+.4f}", interval, "3", first["verdict"]]
        assert row[3] == (first["label"] if first["best"] else baseline)
        assert row[8:12] == (better if first["best"] else [tables.MISSING] * 4)
        assert first["best"] or row[4:7] == ["full", tables.MISSING, row[1]]
    assert {row[4] for row in table.rows} > {"full"}
    assert any("chosen by its mean" in note for note in table.notes)


def test_long_tables_hold_every_technique_and_why_others_are_missing(studies):
    study = studies["techniques"]
    each, of_first, every = technique_tables.technique_tables(study)
    assert [(row[0], row[2]) for row in each.rows if row[0] == row[2]] == [(run["label"],) * 2 for run in FIVE["runs"]]
    assert "on mha" in of_first.title
    assert {row[2] for row in of_first.rows} == {"mha"}
    assert len(every.rows) == 5 * 10 - 2
    assert every.notes[-1] == "Not measured: yoco under h2o: it sees no attention."
    (marked,) = (row for row in every.rows if row[6].endswith(tables.NOT_FINITE))
    assert [*marked[:3], marked[9]] == ["mha", "dmc", "budget 25 %, train_tokens 9, lr 0.1", "2"]
    assert [row[4] for row in every.rows[:3]] == ["100 %", "31.2 %", "12.5 %"]


def test_findings_on_techniques_say_what_was_chosen_and_one_seed_concludes_nothing(studies):
    found = findings(studies["techniques"])
    (mla,) = (sentence for sentence in found if sentence.startswith("At the 158.7 KiB of mla's full cache"))
    assert [mla.count(part) for part in ("none of", "; the best of mha's caches is mha", "% interval")] == [1, 1, 2]
    assert any("was chosen by its mean from many candidates" in sentence for sentence in found)
    (h2o,) = (sentence for sentence in found if sentence.startswith("h2o: against the same model's full cache"))
    counts = [int(count) for count in re.findall(r"(?:higher in|lower in|separable in) (\d+)", h2o)]
    assert (len(counts), sum(counts)) == (3, 8)
    one = [sentence for _, sentence in techniques.technique_findings(studies["techniques, one seed"])]
    assert len(one) == 2
    assert all(sentence.startswith("One seed: nothing can be concluded") for sentence in one)
    assert not re.search("lower|higher|separable", " ".join(one))
    study = studies["techniques, one seed"]
    assert "No intervals: with one seed" in techniques.technique_caption(study, techniques.technique_rows(study))
    assert {row[8] for row in technique_tables.technique_tables(study)[2].rows} == {tables.MISSING}


def test_report_needs_nothing_but_itself(five, hostile):
    for directory in (five, hostile):
        page = (directory / "report.html").read_text()
        assert page.count("<script") == 1
        assert "<link" not in page
        sources = re.findall(r"(?:src|srcset)=\"([^\"]*)\"", page)
        assert {source.partition(",")[0] for source in sources} == {"data:image/svg+xml;base64"}
        links = re.findall(r"href=\"([^\"]*)\"", page)
        csvs = {f"figures/{path.name}" for path in (directory / "figures").glob("*.csv")}
        assert {link for link in links if link.endswith(".csv")} == csvs
        assert all((directory / link).is_file() for link in links)
        assert not re.search(r"@import|url\(", page)


def test_report_holds_small_data_and_says_that_one_seed_shows_no_order(five):
    page = (five / "report.html").read_text()
    assert page.count("<details>") == sum(len(rows(path)) <= report.FEW for path in (five / "figures").glob("*.csv"))
    assert "One seed: nothing can be concluded about which variant has the lower loss" in page
    assert "17 of 20 decode points (hollow in the figure) are not bound by memory" in page
    for fact in (FIVE["corpus"]["fingerprint"], FIVE["machine"]["cpu"], FIVE["versions"]["torch"], "Matching rule ffn"):
        assert fact in page


@pytest.mark.parametrize("name", ["families", "sizes", "recall"])
def test_findings_hold_every_comparison_with_its_interval_and_n(studies, name):
    study = studies[name]
    assert {each.verdict for each in study.comparisons} >= {"higher", "not separable"} or name == "recall"
    assert "3 seeds: only a difference" in dict(report.conclusions(study))["Loss"]
    for each in study.comparisons:
        starts = f"{each.label} has", f"{each.label}: not"
        (sentence,) = (s for s in findings(study) if s.startswith(starts) and f"{each.mean:+.4f}" in s)
        assert f"{each.low:+.4f} to {each.high:+.4f}, n = 3" in sentence
        assert each.baseline in sentence
        assert (" has a lower " in sentence or " has a higher " in sentence) == each.separable
        if not each.separable:
            assert f"larger than {max(-each.low, each.high):.4f} is excluded" in sentence


def test_a_difference_that_does_not_hold_together_with_the_others_says_so(studies, tmp_path):
    raw = copy.deepcopy(studies["families"].raw)
    separable = [each for each in raw["comparisons"] if each["verdict"] != "not separable"]
    for each in raw["comparisons"]:
        each["holds_together"] = each in separable[1:]
    study = load(put(tmp_path, raw))
    alone = [s for s in findings(study) if "not separable where all comparisons are to hold together" in s]
    assert [s.split()[0] for s in alone] == [separable[0]["label"]]
    chance = dict(report.conclusions(study))["Chance"]
    assert f"(Holm's method) {len(separable) - 1} are separable" in chance


def test_with_one_seed_no_finding_says_lower_or_higher(studies, five):
    for study in (studies["one seed"], load(five)):
        found = findings(study)
        assert any("othing can be concluded" in sentence for sentence in found)
        assert not re.search(r"lower|higher|reaches", " ".join(found))
        assert "+0.0" in " ".join(found)  # the differences seen are given all the same


def test_findings_on_bytes_sizes_and_recall_hits(studies):
    found = findings(studies["families"])
    reached = "mla reaches mha-16's loss with 340 B per token, 33.2 % of its 1 KiB"
    assert f"{reached} (95 % interval 330 B to over 576 B, n = 3)." in found
    not_reached = "mqa does not reach mha-16's loss with the variants measured, up to 128 B per token"
    assert f"{not_reached} (95 % interval over 128 B, n = 3)." in found
    unknown = "The variants measured do not show what gqa needs for mha-16's loss"
    assert f"{unknown} (95 % interval under 128 B to over 128 B, n = 3)." in found
    assert any(sentence.startswith("gqa-2 against mha-16: higher on recall hits: +0.04") for sentence in found)
    unsure, sure = (s for s in findings(studies["sizes"]) if s.startswith("gqa-2: from 64x2 to 128x4"))
    assert "+0.0100 bits per byte (95 % interval -0.0100 to +0.0300, n = 3)" in unsure
    assert unsure.endswith("this change cannot be separated from chance.")
    assert sure.endswith("it is higher at 128x4.")


def test_untuned_and_edge_rates_are_warned_of(studies, five):
    (warning,) = dict(report.findings(load(five)))["Learning rate"]
    assert "one learning rate (0.002) was used for all variants" in warning
    _, unfitted, edge, _ = dict(report.findings(studies["families"]))["Learning rate"]
    assert "nothing was fitted for mqa: the rate is the best of those tried, a factor of 2 apart" in unfitted
    assert "edge of the rates tried for mqa:" in edge


def test_what_is_missing_is_left_out_and_said(hostile):
    """Also where an older results file had it."""
    drawn = {path.name.split(".")[0] for path in (hostile / "figures").iterdir()}
    assert drawn == {name + suffix for name in NAMES[:3] for suffix in style.PAGES}
    assert not list(hostile.glob("*/techniques*"))
    page = (hostile / "report.html").read_text()
    assert "Left out: Training" in page
    assert "Left out: With and without the cache" in page
    assert "do not say which points are bound by memory" in page
    assert "Without a finite loss in some run: yoco" in page


def test_gaps_are_named_in_the_report_and_under_the_table(tmp_path):
    gaps = [{"label": "mla", "seed": n, "why": "the loss is nan\n\\input{x}"} for n in range(20)]
    study = load(put(tmp_path, FIVE | {"missing": gaps}))
    table = tables.results_table(study)
    page, tex = report.page(study, [], {}, [table]), tables.to_latex(table)
    assert "Without results: mla seed 0 (the loss is nan" in page
    assert "and 8 more. Means and intervals are over the other runs alone." in page
    assert "% Without results: " in tex
    assert not any(r"\input" in line for line in tex.splitlines() if not line.startswith("%"))


def broken(change, study: dict = FIVE) -> str:
    study = copy.deepcopy(study)
    change(study)
    return json.dumps(study)


def differing(key: str, value) -> str:
    return broken(lambda study: [study["runs"][0].update({key: value}), study["runs"][1].update({key: "other"})])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("{", "cannot be read as JSON"),
        ("[]", "not in the form that can be drawn"),
        ("{}", r"not in the form that can be drawn \(no 'runs'\); run `kvfrontier eval"),
        ('{"runs": []}', "no finished runs"),
        (broken(lambda study: study.update(format=3)), "has format 3, and only format 2 can be drawn; run `kv"),
        (broken(lambda study: study["runs"][2].pop("label")), "no 'label'"),
        (broken(lambda study: study["runs"][1].update(kv=None)), "not in the form that can be drawn"),
        (broken(lambda s: s["techniques"][0].pop("is_full"), STUDIES["techniques"]), "no 'is_full'"),
        (differing("corpus_fingerprint", "3f2a9c"), r'differ in "corpus_fingerprint" \("3f2a9c" and "other"\)'),
        (differing("match", "ffn"), r'differ in "match" \("ffn" and "other"\)'),
        (differing("tokenizer", {"name": "a"}), r'differ in "tokenizer" \(\{"name": "a"\} and "other"\)'),
    ],
)
def test_a_bad_results_file_is_one_clear_line(tmp_path, content, message):
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(plots.ResultsError, match=message) as caught:
        plots.draw(tmp_path)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == ([] if content is None else [tmp_path / "results.json"])


def test_a_file_from_before_the_format_number_is_read(tmp_path):
    assert load(put(tmp_path, {key: FIVE[key] for key in FIVE if key != "format"})).variants
