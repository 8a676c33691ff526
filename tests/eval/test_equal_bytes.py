"""What techniques cost and what is best at equal bytes, against the same numbers worked out here from the records."""

import math
import random
import statistics

import pytest
from texts import byte_tokens

from archs import build
from eval import techniques
from eval.equal_bytes import MEASURED, TOLERANCE, bytes_for_accuracy, equal_bytes, technique_differences
from eval.subject import EvalContext
from train.study import parse_study

SETTINGS = [{"technique": "full"}, {"technique": "full", "bits": 4}] + [
    {"technique": name, "budget": budget} for name in ("h2o", "l2-norm") for budget in (0.25, 0.5, 12)
]
T_975 = {1: 12.7062, 2: 4.30265, 3: 3.18245}  # of Student's t, by degrees of freedom


def records(seeds=3, metric="val_bpb", bytes_of=(("a", 1000), ("b", 500), ("c", 260), ("d", 505))):
    draw, made = random.Random(seeds), []
    for label, held in bytes_of:
        for seed in range(seeds):
            entries = []
            for settings in SETTINGS:
                share = {12: 0.4}.get(settings.get("budget"), settings.get("budget", 1.0))
                share *= 0.3 if "bits" in settings else 1.0
                value = draw.uniform(0.2, 0.8)
                qualities = {"val_bpb": value if metric == "val_bpb" else math.nan, "accuracy": value}
                beside = {"prompt": 8, "tokens": 16, "val_nats": 1.0, "notes_bytes": 3.0, "tokens_per_s": 9.0 + seed}
                entries.append(settings | beside | qualities | {"bytes_held": held * share})
            loss = {"val_bpb": 1.0} | ({"accuracy": 0.5} if metric == "accuracy" else {})
            made.append({"label": label, "seed": seed, "size": "", "loss": loss, "techniques": entries})
    return made


def found_in(runs, label, settings, metric):
    """Seed -> (quality, bytes), read out of the records once more."""
    return {
        run["seed"]: (entry[metric], entry["bytes_held"])
        for run in runs
        if run["label"] == label
        for entry in run["techniques"]
        if settings.items() <= entry.items() and ("bits" in entry) == ("bits" in settings) and "skipped" not in entry
    }


def check_interval(entry, own, base):
    """The entry's difference and interval are those of own - base over the seeds of both."""
    seeds = sorted(own.keys() & base.keys())
    each = [own[seed][0] - base[seed][0] for seed in seeds]
    half = T_975[len(each) - 1] * statistics.stdev(each) / math.sqrt(len(each))
    middle = statistics.fmean(each)
    assert entry["seeds"] == seeds
    assert (entry["mean_diff"], entry["ci_low"], entry["ci_high"]) == pytest.approx(
        (middle, middle - half, middle + half), abs=1e-4
    )
    assert entry["verdict"] == ("lower" if middle + half < 0 else "higher" if middle - half > 0 else "not separable")


@pytest.mark.parametrize("metric", ["val_bpb", "accuracy"])
def test_differences_to_the_full_cache_are_paired_by_seed(metric):
    runs = records(metric=metric)
    entries = technique_differences(runs)
    assert [(entry["label"], entry["settings"]) for entry in entries] == [(x, s) for x in "abcd" for s in SETTINGS]
    for entry in entries:
        own = found_in(runs, entry["label"], entry["settings"], metric)
        assert entry["metric"] == metric
        assert entry["mean"] == pytest.approx(statistics.fmean(quality for quality, _ in own.values()))
        assert entry["bytes_held"] == own[0][1]
        assert entry["tokens_per_s"] == 11.0
        if entry["settings"] == {"technique": "full"}:
            assert "mean_diff" not in entry
        else:
            check_interval(entry, own, found_in(runs, entry["label"], {"technique": "full"}, metric))


@pytest.mark.parametrize(("metric", "seeds"), [("val_bpb", 2), ("val_bpb", 4), ("accuracy", 3)])
def test_the_best_at_equal_bytes_fits_and_nothing_that_fits_is_better(seeds, metric):
    runs = records(seeds, metric)
    sign = 1 if metric == "val_bpb" else -1
    entries = equal_bytes(runs)
    for baseline in "abcd":
        base = found_in(runs, baseline, {"technique": "full"}, metric)
        fitting = {}
        for label in "abcd":
            for settings in SETTINGS:
                own = found_in(runs, label, settings, metric)
                if own[0][1] <= 1.01 * base[0][1] and (label, settings) != (baseline, {"technique": "full"}):
                    mean = statistics.fmean(own[seed][0] - base[seed][0] for seed in own)
                    kind = settings["technique"], "bits" in settings
                    fitting.setdefault((label, *kind), []).append(sign * mean)
        of = [entry for entry in entries if entry["baseline"] == baseline]
        least = min(map(min, fitting.values()))
        assert sign * of[0]["mean_diff"] == pytest.approx(least)
        assert [entry["best"] for entry in of] == [least < 0] + [False] * (len(of) - 1)
        assert len(of) == len(fitting)
        for entry in of:
            assert entry["bytes_held"] <= entry["baseline_bytes"] * (1 + TOLERANCE)
            assert entry["baseline_bytes"] == base[0][1]
            check_interval(entry, found_in(runs, entry["label"], entry["settings"], metric), base)
            kind = fitting[entry["label"], entry["settings"]["technique"], "bits" in entry["settings"]]
            assert sign * entry["mean_diff"] == pytest.approx(min(kind))
            assert entry["chosen_from"] == len(kind)


def test_a_cache_a_little_over_the_bytes_fits_and_one_further_over_or_of_another_size_does_not():
    for over, fits in ((1.009, True), (1.011, False)):
        runs = records(bytes_of=(("a", 100), ("b", 100 * over)))
        assert (("a", "b", "full") in {(e["baseline"], e["label"], e["kind"]) for e in equal_bytes(runs)}) == fits
    sized = equal_bytes([run | {"size": run["label"]} for run in records(bytes_of=(("a", 1000), ("b", 500)))])
    assert {entry["label"] == entry["baseline"] for entry in sized} == {True}


def test_one_seed_gives_no_interval_and_no_technique_no_difference():
    runs = records(1)
    compared = [entry for entry in [*technique_differences(runs), *equal_bytes(runs)] if "mean_diff" in entry]
    verdicts = {(entry["ci_low"], entry["ci_high"], entry["verdict"]) for entry in compared}
    assert verdicts == {(None, None, "not separable")}
    runs = [{"label": "a", "seed": 0, "size": "", "loss": {"val_bpb": 1.0}}]
    assert technique_differences(runs) == equal_bytes(runs) == []


def test_what_is_not_finite_skipped_or_missing_breaks_nothing_and_wins_nothing():
    runs = [run for run in records() if (run["label"], run["seed"]) != ("b", 2)]  # a run that failed
    for run in runs:
        by_settings = {str({key: e[key] for key in e if key not in MEASURED}): e for e in run["techniques"]}
        if run["label"] == "a":
            h2o = by_settings[str(SETTINGS[2])]
            h2o["val_bpb"] = math.nan if run["seed"] == 1 else 0.0  # else the best of all
            by_settings[str(SETTINGS[3])]["val_bpb"] = None
        if run["label"] == "c":
            at = run["techniques"].index(by_settings[str(SETTINGS[4])])
            run["techniques"][at] = SETTINGS[4] | {"skipped": "not here"}
        if run["label"] == "d":  # measured at one seed alone: not to be held against means of three
            run["techniques"] = [entry | {"val_bpb": -9.0} for entry in run["techniques"] if run["seed"] == 0]
    differences = {(e["label"], str(e["settings"])): e for e in technique_differences(runs)}
    nan, null = (differences["a", str(SETTINGS[n])] for n in (2, 3))
    assert (nan["seeds"], nan["not_finite"], nan["mean"]) == ([0, 2], [1], 0.0)
    assert (null["seeds"], null["mean"], null["not_finite"]) == ([], None, [0, 1, 2])
    assert "mean_diff" not in null
    skipped = differences["c", str(SETTINGS[4])]
    assert (skipped["settings"], skipped["skipped"], "mean" in skipped) == (SETTINGS[4], "not here", False)
    assert differences["b", str(SETTINGS[1])]["seeds"] == [0, 1]
    best = equal_bytes(runs)
    assert {entry["baseline"] for entry in best} == set("abcd")
    assert not any(e["label"] == "a" and e["settings"] in SETTINGS[2:4] for e in best)
    assert not any(e["label"] == "d" for e in best if e["baseline"] != "d")
    assert all(e["seeds"] == [0, 1] for e in best if "b" in (e["label"], e["baseline"]) and e["baseline"] != "d")


def test_what_is_measured_is_told_from_the_settings(tmp_path):
    asked = [{"technique": "full"}, {"technique": "h2o", "budget": 0.5}, {"technique": "full", "bits": 8}]
    config = parse_study({"eval": {"techniques": asked}}, ["eval.loss_tokens=64"]).eval
    model = build("mha", vocab_size=257, width=32, layers=2, heads=4, context=16).eval()
    context = EvalContext(model, byte_tokens(tmp_path), config, None, 10.0, lambda _: None, {})
    entries = techniques.measure(context)["techniques"]
    run = {"label": "a", "seed": 0, "size": "", "loss": {"val_bpb": 1.0}, "techniques": entries}
    assert [entry["settings"] for entry in technique_differences([run])] == asked


def test_what_was_trained_further_is_compared_with_what_was_trained_as_much():
    """Here further training buys 0.5 and merging costs 0.1: no win for merging."""
    further = {"technique": "dmc", "train_tokens": 100, "lr": 0.1}
    runs = []
    for label, held in (("a", 1000), ("b", 500), ("c", 500)):
        for seed in range(3):
            measured = {None: (1.0, held), 1.0: (0.5, held), 0.5: (0.6 + 0.001 * seed, held / 2)}
            entries = []
            for budget, (loss, nbytes) in measured.items():
                settings = further | {"budget": budget} if budget else {"technique": "full"}
                if label != "c" or budget != 1.0:
                    entries.append(settings | {"val_bpb": loss + 0.01 * seed, "bytes_held": nbytes})
            runs.append({"label": label, "seed": seed, "size": "", "loss": {"val_bpb": 1.0}, "techniques": entries})
    of_a, same, merged = (entry for entry in technique_differences(runs) if entry["label"] == "a")
    assert "mean_diff" not in of_a
    assert "mean_diff" not in same
    assert merged["mean_diff"] == pytest.approx(0.101)
    against = {(e["baseline"], e["label"], e["kind"]): e for e in equal_bytes(runs)}
    assert against["b", "a", "dmc"]["mean_diff"] == pytest.approx(0.101)  # with b under dmc, not with b
    assert not any(kind == "dmc" and baseline == "c" for baseline, _, kind in against)  # c has none to compare with
    assert not any(entry["best"] for entry in against.values() if entry["kind"] == "dmc")


def test_the_fewest_bytes_for_an_accuracy_are_over_the_settings_and_the_mean_of_the_seeds():
    runs = records(seeds=2, metric="accuracy", bytes_of=(("a", 1000),))
    accuracy = {0.25: (0.4, 0.7), 0.5: (0.9, 0.92), 12: (0.88, 0.9)}  # at 4 pairs, by the budget, for two seeds
    for run in runs:
        for entry in run["techniques"]:
            at = accuracy.get(entry.get("budget"), (1.0, 1.0))[run["seed"]]
            entry["accuracy_at"] = {"4": at, "16": at / 2}
    rows = {(row["kind"], row["pairs"]): row["bytes"] for row in bytes_for_accuracy(runs)}
    assert set(rows) == {(kind, pairs) for kind in ("full", "quantised", "h2o", "l2-norm") for pairs in (4, 16)}
    assert rows["h2o", 4] == {"0.99": None, "0.9": 500.0, "0.5": 250.0}
    assert rows["full", 4] == dict.fromkeys(("0.99", "0.9", "0.5"), 1000.0)
    assert rows["full", 16] == {"0.99": None, "0.9": None, "0.5": 1000.0}
    assert bytes_for_accuracy(records()) == []
