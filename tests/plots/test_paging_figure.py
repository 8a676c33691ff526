"""The figure of paged caches, from records made by hand."""

import copy
import csv
import json
from pathlib import Path

import pytest

from plots import style
from plots.drawing import NotInResults
from plots.figures import FIGURES
from plots.results import load

FIVE = json.loads((Path(__file__).parent / "five.json").read_text())
ABOUT = {"lengths": "documents", "sequences": 4, "max_tokens": 512, "tokens": 600}
SHARES = {("contiguous", None): 0.5, ("doubling", None): 0.2, ("paged", 16): 0.02, ("paged", 64): 0.05}


def with_paging(unit: int = 1000) -> dict:
    results = copy.deepcopy(FIVE)
    for number, run in enumerate(results["runs"], 1):
        needed = number * unit
        run["paging"] = [
            ABOUT
            | {"needed_bytes": needed, "cache": cache, "block_size": block_size}
            | {"held_bytes": needed / (1 - share), "wasted_bytes": needed / (1 - share) - needed}
            for (cache, block_size), share in SHARES.items()
        ]
    return results


def study(folder, results):
    (folder / "results.json").write_text(json.dumps(results))
    return load(folder)


def test_it_shows_each_cache_of_each_variant_with_its_waste(tmp_path):
    figure, loaded = FIGURES["paging"], study(tmp_path, with_paging())
    rows = figure.rows(loaded)
    assert len(rows) == len(FIVE["runs"]) * len(SHARES)
    for row in rows:
        assert row["wasted_share"] == pytest.approx(SHARES[row["cache"], row["block_size"]])
    caption = figure.caption(loaded, rows)
    assert all(text in caption for text in ("contiguous 50.0%", "blocks of 16 2.0%", "documents", "4 sequences"))


def test_it_is_not_drawn_without_the_measure(tmp_path):
    with pytest.raises(NotInResults, match="paging"):
        FIGURES["paging"].rows(study(tmp_path, FIVE))


@pytest.mark.parametrize("unit", [1, 1000, 10**12])
@pytest.mark.parametrize("width", style.PAGES.values())
def test_it_can_be_drawn_at_every_size(tmp_path, unit, width):
    loaded = study(tmp_path, with_paging(unit))
    figure = FIGURES["paging"]
    fig = figure.draw(figure.rows(loaded), loaded, width)
    ticks = [label.get_text() for label in fig.axes[0].get_xticklabels()]
    assert len(ticks) >= 2
    assert all(path.startswith(b"%PDF") for kind, path in style.render(fig).items() if kind == "pdf")


def test_its_table_is_what_is_drawn(tmp_path, monkeypatch):
    import plots

    monkeypatch.setattr("plots.FIGURES", {"paging": FIGURES["paging"]})
    study(tmp_path, with_paging())
    plots.draw(tmp_path)
    with (tmp_path / "figures" / "paging.csv").open() as f:
        drawn = list(csv.DictReader(f))
    assert [(row["label"], row["cache"]) for row in drawn[:4]] == [("mha", cache) for cache, _ in SHARES]
