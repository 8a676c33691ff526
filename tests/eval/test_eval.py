"""Loss, bytes and speeds against what they are said to be."""

import errno
import importlib
import importlib.util
import itertools
import math
import os
import random
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import each_variant
from texts import byte_tokens

import eval
from archs import build
from archs.cache import State
from eval import loss, recall, speed, techniques
from eval.compare import NotComparable, compare, gap_changes, t_cdf, t_interval, t_quantile
from eval.frontier import bytes_for_baseline, crossing
from eval.memory import CONTEXTS, BytesDiffer, measure_memory
from eval.scaling import scaling
from eval.speed import measure_decode, measure_recompute, measure_roof, timed
from eval.subject import EvalContext, Predictions
from train.batches import IGNORED
from train.module import token_nats
from train.sources.mqar import RecallTask
from train.study import parse_study

SHAPE = {"vocab_size": 258, "width": 32, "layers": 2, "heads": 4, "context": 16}
CPU = torch.device("cpu")


def subject(model, data=None, overrides=("eval.loss_tokens=1_000_000",), measured=None):
    config = parse_study({}, overrides).eval
    return EvalContext(model, data, config, torch.float32, 10.0, lambda _: None, measured or {})


@each_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_variant_holds_what_its_formula_says(arch, options, dtype):
    model = build(arch, **SHAPE, **options).to(dtype).eval()
    kv = measure_memory(model, dtype, [100])
    assert kv["bytes_per_token"] == kv["formula_bytes_per_token"] == model.kv_bytes_per_token(dtype)
    assert kv["constant_bytes"] == kv["formula_constant_bytes"] == model.kv_constant_bytes(dtype)
    assert list(kv["stored_bytes"]) == ["100", *map(str, CONTEXTS)]
    assert kv["stored_bytes"]["1048576"] == kv["constant_bytes"] + 2**20 * kv["bytes_per_token"]


def test_a_window_longer_than_the_shortest_measurement_is_filled_first():
    model = build("yoco", **SHAPE, kv_heads=2, window=300)
    assert measure_memory(model, torch.float32)["constant_bytes"] == 2 * 2 * 8 * 300 * 4


@pytest.mark.parametrize("name", ["constant", "per token", "hidden buffer"])
def test_a_formula_that_is_not_true_is_an_error(name, monkeypatch):
    model = build("gqa", **SHAPE, kv_heads=2)
    right, layers = model.kv_stored_elements, model.new_layers
    wrong = {
        "constant": ("kv_stored_elements", lambda context: right(context) + 1),
        "per token": ("kv_stored_elements", lambda context: 2 * right(context)),
        "hidden buffer": ("new_layers", lambda make: [*layers(make), State(torch.zeros(4, make.max_tokens))]),
    }
    monkeypatch.setattr(model, *wrong[name])
    with pytest.raises(BytesDiffer, match="the formulas"):
        measure_memory(model, torch.float32)


def test_loss_is_the_mean_over_held_out_tokens_in_bits_of_their_text(tmp_path):
    text = byte_tokens(tmp_path)
    model = build("mha", **SHAPE | {"vocab_size": 257}).eval()
    measured = loss.measure(subject(model, text))["loss"]
    nats, n_bytes, tokens = 0.0, 0, 0
    for start in range(0, len(text.test) - 16, 16):
        row = torch.tensor(text.test[start : start + 17].astype("int64"))
        with torch.no_grad():
            nats -= model(row[None, :-1]).log_softmax(-1)[0].gather(-1, row[1:, None]).sum().item()
        tokens += 16
        n_bytes += sum(len(text.tokenizer.decode_single_token_bytes(t)) for t in row[1:].tolist() if t < 256)
    assert measured["tokens"] == tokens
    assert measured["val_nats"] == pytest.approx(nats / tokens, rel=1e-5)
    assert measured["val_bpb"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)


def test_the_decode_grid_is_filled_and_its_rates_follow_from_its_times():
    model = build("yoco", **SHAPE, kv_heads=2, window=9).eval()
    points = list(measure_decode(model, [1, 3], [8, 40], roof_gb_s=10.0))
    assert [(p["batch"], p["context"]) for p in points] == [(1, 8), (1, 40), (3, 8), (3, 40)]
    for p in points:
        assert p["tokens_per_s"] == pytest.approx(p["batch"] / p["token_ms"] * 1e3)
        assert p["prefill_ms"] > 0
        assert p["roof_gb_s"] == 10.0
        assert p["memory_bound"] == (p["roof_fraction"] >= 0.5)
        weights = sum(m.weight.nbytes for m in model.modules() if isinstance(m, torch.nn.Linear))
        moved = p["kv_read_gb_s"] * p["token_ms"] * 1e6 + weights
        assert p["roof_fraction"] == pytest.approx(moved / p["token_ms"] / 1e6 / 10.0)


def test_of_two_rounds_the_faster_stands():
    model = build("mha", **SHAPE).eval()
    slow = {"token_ms": 1e9, "token_ms_iqr": 1.0, "prefill_ms": 0.0, "prefill_ms_iqr": 2.0, "tokens_per_s": 0.0}
    slow |= {"roof_gb_s": 4.0, "roof_fraction": 1.0, "memory_bound": True}
    fast = slow | {"token_ms": 0.0, "prefill_ms": 1e9}
    before = {"decode": [{"batch": 1, "context": 8} | slow, {"batch": 1, "context": 16} | fast]}
    before |= {"recompute": {"cached_ms": 0.0, "recomputed_ms": 1e9}}
    best = speed.measure(subject(model, None, ["eval.decode={batch: [1], context: [8, 16]}"], before))
    first, second = best["decode"]
    assert 0 < first["token_ms"] < 1e9
    assert (first["prefill_ms"], first["prefill_ms_iqr"]) == (0.0, 2.0)
    assert (second["token_ms"], second["token_ms_iqr"], second["tokens_per_s"]) == (0.0, 1.0, 0.0)
    assert 0 < second["prefill_ms"] < 1e9
    assert (second["roof_gb_s"], second["roof_fraction"], second["memory_bound"]) == (10.0, 0.4, False)  # the best roof
    assert best["recompute"]["cached_ms"] == 0.0
    assert 0 < best["recompute"]["recomputed_ms"] < 1e9


def test_a_cache_that_does_not_fit_is_left_out_with_the_reason(monkeypatch):
    model = build("mha", **SHAPE).eval()
    monkeypatch.setattr("eval.speed._free_bytes", lambda device: 50_000)
    fits, too_large = measure_decode(model, [1], [8, 4000], 10.0)
    assert fits["token_ms"] > 0
    assert too_large.keys() == {"batch", "context", "skipped"}
    assert "GiB are free" in too_large["skipped"]


def test_a_point_that_the_system_has_no_memory_for_is_left_out_and_the_others_are_measured(monkeypatch):
    model = build("mha", **SHAPE).eval()
    new_cache = model.new_cache

    def limited(batch, *args):
        if batch in (2, 3):
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)) if batch == 2 else RuntimeError("broken")
        return new_cache(batch, *args)

    monkeypatch.setattr(model, "new_cache", limited)
    one, two, four = measure_decode(model, [1, 2, 4], [8], 10.0)
    assert two == {"batch": 2, "context": 8, "skipped": "[Errno 12] Cannot allocate memory"}
    assert min(one["token_ms"], four["token_ms"]) > 0
    with pytest.raises(RuntimeError, match="broken"):
        list(measure_decode(model, [3], [8], 10.0))


def test_recomputing_a_long_prefix_takes_longer_than_a_cached_step():
    model = build("mha", **SHAPE | {"width": 128}).eval()
    result = measure_recompute(model, 1024)
    assert result["recomputed_ms"] > 3 * result["cached_ms"]


def test_timing_leaves_out_warm_up_and_what_runs_before_and_a_roof_is_a_plausible_bandwidth():
    calls = []

    def step():
        calls.append(1)
        time.sleep(0.5 if len(calls) <= 2 else 0.1)

    timing = timed(step, CPU, repeats=6, warmup=2, before=lambda: time.sleep(0.02))
    assert len(calls) == 8
    assert 95 < timing.median < 400
    assert 0.5 < measure_roof(CPU) < 10_000


@pytest.mark.parametrize(("df", "value"), [(1, 12.706), (2, 4.303), (4, 2.776), (7, 2.365), (30, 2.042), (120, 1.980)])
def test_t_quantiles_are_those_of_the_tables(df, value):
    """To the digits that textbooks print."""
    assert t_quantile(0.975, df) == pytest.approx(value, abs=6e-4)
    assert t_cdf(t_quantile(0.9, df), df) == pytest.approx(0.9, abs=1e-10)


@pytest.mark.parametrize("n", [3, 5, 8])
def test_intervals_cover_what_they_claim(n):
    draw = random.Random(n)
    trials = 4000
    intervals = (t_interval([draw.gauss(0, 1) for _ in range(n)], 0.95) for _ in range(trials))
    covered = sum(low <= 0 <= high for low, high in intervals)
    assert covered / trials == pytest.approx(0.95, abs=0.015)


def record(label, seed, bpb, **others):
    same = {"size": "", "corpus_fingerprint": "f", "tokenizer": {"name": "bytes"}, "match": "ffn"}
    facts = {"label": label, "family": label[0], "seed": seed, "baseline": "a", "kv": {"bytes_per_token": 64}}
    return same | facts | {"loss": {"val_bpb": bpb}} | others


def test_differences_are_paired_by_seed():
    """Seeds move all variants alike: paired, a small constant difference is certain; unpaired, it would be lost."""
    records = [record(label, s, s / 10 + d) for label, d in (("a", 0.0), ("b", 0.01), ("c", -0.01)) for s in range(4)]
    (b, c), _ = compare(records)
    assert (b["verdict"], c["verdict"]) == ("higher", "lower")
    assert (b["seeds"], b["baseline"]) == ([0, 1, 2, 3], "a")
    assert b["mean_diff"] == pytest.approx(0.01)


def test_one_seed_separates_nothing_and_missing_seeds_are_left_out():
    records = [record("a", 0, 2.0), record("b", 0, 1.0), record("b", 1, 1.0)]
    ((only,), _) = compare(records)
    assert (only["verdict"], only["ci_low"], only["ci_high"], only["seeds"]) == ("not separable", None, None, [0])
    assert compare([record("b", 0, 1.0)]) == ([], [])


@pytest.mark.parametrize("seed", range(20))
def test_comparisons_that_hold_together_are_those_that_no_set_of_them_excludes(seed):
    """By the closure of Bonferroni's test, whose shortcut Holm's method is: each set with the comparison in it has one
    that is separable at the level over the set's size."""
    draw, labels = random.Random(seed), "bcdef"
    shift = {label: draw.choice((0.0, 0.5, 1.0, 2.0)) for label in labels} | {"a": 0.0}
    records = [record(label, s, draw.gauss(shift[label], 0.5)) for s in range(8) for label in shift]
    main, details = compare(records)
    separable = {}  # at the level for so many
    for many in range(1, 6):
        for each in compare(records, 1 - 0.05 / many)[0]:
            separable[each["label"], many] = each["verdict"] != "not separable"
    for each in main:
        sets = [s for n in range(1, 6) for s in itertools.combinations(labels, n) if each["label"] in s]
        assert each["holds_together"] == all(any(separable[label, len(s)] for label in s) for s in sets)
    assert all("holds_together" not in each for each in details)


def test_every_number_in_the_loss_is_compared_and_counts_are_not():
    losses = {"val_bpb": 1.0, "tokens": 9, "hit_nats": 2.0, "nats_at": {"1": 3.0, "2": 4.0}}
    records = [record(label, s, 0.0, loss=losses) for label in "ab" for s in (0, 1)]
    main, details = compare(records)
    assert [c["metric"] for c in main] == ["val_bpb"]
    assert [c["metric"] for c in details] == ["hit_nats", "nats_at.1", "nats_at.2"]


def test_a_loss_that_is_not_finite_is_left_out_and_the_rest_is_compared():
    records = [record(label, s, 1.0 if (label, s) != ("b", 1) else math.nan) for label in "abc" for s in range(3)]
    main, _ = compare(records)
    assert {c["label"]: c["seeds"] for c in main} == {"b": [0, 2], "c": [0, 1, 2]}
    assert {entry["family"]: entry["seeds"] for entry in bytes_for_baseline(records)}["b"] == [0, 2]


def test_the_change_of_the_gap_with_size_is_paired_by_seed_too():
    records = [
        record(f"{name}-{size}", seed, seed + is_b * (gap + 0.01 * seed * n), size=size, params=n)
        for n, (size, gap) in enumerate({"s": 0.1, "m": 9.0, "l": 0.3}.items())
        for seed in (0, 1, 2)
        for is_b, name in enumerate("ab")
    ]
    to_m, change = gap_changes(records)
    assert to_m["sizes"] == ["s", "m"]
    assert (change["label"], change["baseline"], change["sizes"]) == ("b", "a", ["s", "l"])
    assert change["mean_diff"] == pytest.approx(0.22)
    assert (change["verdict"], change["seeds"]) == ("higher", [0, 1, 2])
    assert gap_changes([r for r in records if r["size"] == "s"]) == []


def sized(label, size, seed, bpb, tokens=1000, n_bytes=64):
    """A record of one size of 10, 20, 40, ... parameters, trained with 6 FLOPs a parameter and token."""
    params = 10 * 2**size
    more = {"train": {"flops_per_token": 6 * params}, "train_tokens": tokens * params}
    more |= {"kv": {"bytes_per_token": n_bytes * 2**size}}
    return record(f"{label}-{size}", seed, bpb, size=str(size), params=params, baseline=f"a-{size}") | more


@pytest.mark.parametrize("better", [1.2, 0.8])
def test_a_gap_is_worth_the_training_compute_that_makes_up_for_it(better):
    """The baseline's loss is an exact power law of its FLOPs, each seed with its own factor; the other variant has the
    loss that the baseline has after `better` times its FLOPs, and the same slope."""
    law = lambda size, seed, times=1.0: (2 + 0.1 * seed) * (6e3 * 100 * 4**size * times) ** -0.07  # noqa: E731
    seeds, sizes = (0, 1, 2), (0, 1, 2)
    records = [sized("a", n, s, law(n, s)) for s in seeds for n in sizes]
    records += [sized("b", n, s, law(n, s, better), n_bytes=16) for s in seeds for n in sizes]
    a, b = scaling(records)
    assert (a["label"], a["at"], a["sizes"]) == ("a", [], ["0", "1", "2"])
    for entry in (a, b):  # FLOPs grow with the square of the parameters
        assert entry["train_flops_slope"] == pytest.approx({"mean": 0.07, "low": 0.07, "high": 0.07})
        assert entry["params_slope"]["mean"] == pytest.approx(0.14)
    for at in b["at"]:
        assert at["compute"] == pytest.approx(dict.fromkeys(("mean", "low", "high"), better))
        # the baseline's cache doubles with four times the FLOPs, so that at equal loss it holds sqrt(better) times more
        assert at["bytes"]["mean"] == pytest.approx(64 * 2 ** int(at["size"]) * math.sqrt(better))
        assert at["bytes_per_token"] == 16 * 2 ** int(at["size"])


def test_nothing_is_said_beyond_twice_the_trained_compute_nor_from_sizes_that_are_none():
    records = [sized("a", n, s, 2.0 * 4 ** (-0.1 * n)) for s in (0, 1) for n in range(3)]
    far = records + [sized("b", n, s, 2.0 * 4 ** (-0.1 * n - 0.06)) for s in (0, 1) for n in range(3)]
    assert [at["compute"] is None for at in scaling(far)[1]["at"]] == [False, False, True]
    assert scaling([r for r in far if r["size"] != "1"]) == []  # two sizes
    for rising in (1.0, 1.1):  # a baseline that does not learn more is no measure of compute
        flat = [r if r["label"][0] == "b" else r | {"loss": {"val_bpb": 2 * rising ** int(r["size"])}} for r in far]
        assert {at["compute"] for at in scaling(flat)[1]["at"]} == {None}
    none = [r | {"kv": {"bytes_per_token": 0}} for r in far]
    assert [at["compute"] is None for at in scaling(none)[1]["at"]] == [False, False, True]
    assert {at["bytes"] for at in scaling(none)[1]["at"]} == {None}
    same = [r | {"train": {"flops_per_token": 1}, "train_tokens": 1} for r in far]
    assert scaling(same) == []  # recipes of one size
    (only,) = scaling([r for r in far if r["label"] != "b-1"])
    assert only["label"] == "a"


def test_gaps_are_to_the_studys_baseline_alone():
    records = [
        record(f"{name}-{size}", seed, float(seed), size=size, params=n, baseline=f"a-{size}")
        for n, size in enumerate("sl")
        for name in "abc"
        for seed in (0, 1)
        if (name, size) != ("a", "s")  # diverged
    ]
    assert gap_changes(records) == []


def test_each_size_has_a_baseline_of_its_own():
    bpb = {"a-s": 1.0, "b-s": 1.5, "a-l": 0.5, "b-l": 0.6}
    main, _ = compare(
        [record(label, s, x, size=label[2:], baseline=f"a{label[1:]}") for label, x in bpb.items() for s in (0, 1)]
    )
    differences = {c["label"]: (c["baseline"], round(c["mean_diff"], 3)) for c in main}
    assert differences == {"b-s": ("a-s", 0.5), "b-l": ("a-l", 0.1)}


@pytest.mark.parametrize(
    ("field", "other"), [("corpus_fingerprint", "g"), ("tokenizer", {"name": "bpe"}), ("match", "none")]
)
def test_what_differs_in_more_than_the_variant_is_never_compared(field, other):
    with pytest.raises(NotComparable, match=rf"{field} is .* for a and .* for b"):
        compare([record("a", 0, 1.0), record("b", 0, 1.0, **{field: other})])


def test_the_crossing_is_interpolated_over_the_logarithm_of_the_bytes():
    curve = [(64, [0.3, 0.1]), (256, [-0.1, -0.3])]
    assert crossing(curve, 0.95)["bytes_per_token"] == pytest.approx(2**7)
    beyond = crossing([(64, [0.31, 0.3])], 0.95)
    assert beyond == {"bytes_per_token": None, "low": 64, "high": None, "verdict": "not reached"}
    for unsure in ([0.3], [0.3, -0.2]):
        assert crossing([(64, unsure)], 0.95) == beyond | {"low": None}
    at_most = crossing([(256, [-0.2, -0.2]), (512, [-0.3, -0.3])], 0.95)
    assert (at_most["bytes_per_token"], at_most["verdict"], at_most["high"]) == (256, "at most", 256)


def test_at_the_ends_of_its_interval_a_t_interval_of_the_interpolated_difference_touches_zero():
    draw = random.Random(0)
    reached = 0
    for _ in range(200):
        levels = sorted((draw.uniform(-0.1, 0.2) for _ in range(4)), reverse=True)
        curve = [(2**x, [level + draw.gauss(0, 0.02) for _ in range(5)]) for x, level in enumerate(levels)]
        found = crossing(curve, 0.95)

        def interpolated(n_bytes, curve=curve):
            x = math.log2(n_bytes)
            at = min(int(x), 2)
            return [a + (x - at) * (b - a) for a, b in zip(curve[at][1], curve[at + 1][1], strict=True)]

        if found["low"] and (found["high"] or t_interval(curve[-1][1], 0.95)[0] <= 0):
            assert t_interval(interpolated(found["low"]), 0.95)[0] == pytest.approx(0, abs=1e-9)
        if found["high"] and found["high"] > 1:
            assert t_interval(interpolated(found["high"]), 0.95)[1] == pytest.approx(0, abs=1e-9)
        if found["verdict"] == "reached":
            reached += 1
            assert sum(interpolated(found["bytes_per_token"])) == pytest.approx(0, abs=1e-9)
            assert (found["low"] or 0) <= found["bytes_per_token"] <= (found["high"] or math.inf)
    assert reached > 50


def test_the_interval_of_the_crossing_covers_the_true_one():
    """Three variants on a straight line through zero at 8 bytes, each seed with noise of its own at each of them."""
    draw = random.Random(1)
    trials, covered = 2000, 0
    for _ in range(trials):
        curve = [(2**x, [0.02 * (3 - x) + draw.gauss(0, 0.01) for _ in range(5)]) for x in (1, 3, 5)]
        found = crossing(curve, 0.95)
        covered += (found["low"] or 0) <= 8 <= (found["high"] or math.inf)
    assert covered / trials == pytest.approx(0.95, abs=0.015)


def test_a_family_is_read_at_its_own_bytes_and_the_baselines_own_family_reaches_it_there():
    bpb = {"a-2": (1.0, 256), "a-1": (1.2, 128), "b-2": (0.9, 64), "b-1": (1.1, 32), "c": (1.3, 16)}
    records = [
        record(label, s, x + s, baseline="a-2", kv={"bytes_per_token": n})
        for label, (x, n) in bpb.items()
        for s in (0, 1)
    ]
    a, b, c = bytes_for_baseline(records)
    assert (a["bytes_per_token"], a["verdict"], a["labels"]) == (256, "reached", ["a-1", "a-2"])
    assert b["bytes_per_token"] == pytest.approx(2**5.5)
    assert b["baseline_bytes_per_token"] == 256
    assert (c["bytes_per_token"], c["verdict"]) == (None, "not reached")


def test_a_recall_hit_ends_a_pair_that_stood_in_the_context_before():
    draw = random.Random(2)
    tokens = torch.tensor([[draw.randrange(4) for _ in range(40)] for _ in range(5)])
    hits = recall.recall_hits(tokens[:, :-1], tokens[:, 1:])
    for row, hit in zip(tokens.tolist(), hits.tolist(), strict=True):
        pairs = list(itertools.pairwise(row))
        assert hit == [pair in pairs[:t] for t, pair in enumerate(pairs)]


def test_hits_rest_and_places_make_up_the_whole_loss(tmp_path):
    measured = subject(build("mha", **SHAPE | {"vocab_size": 257}).eval(), byte_tokens(tmp_path))
    whole, split = loss.measure(measured)["loss"], recall.measure(measured)["loss"]
    assert split["hit_tokens"] + split["rest_tokens"] == whole["tokens"]
    assert split["hit_tokens"] > 0
    summed = split["hit_nats"] * split["hit_tokens"] + split["rest_nats"] * split["rest_tokens"]
    assert summed / whole["tokens"] == pytest.approx(whole["val_nats"])
    sizes = {"1": 1, "2": 2, "4": 4, "8": 8, "16": 1}
    assert sum(whole["nats_at"][k] * n for k, n in sizes.items()) / 16 == pytest.approx(whole["val_nats"])


class Oracle(torch.nn.Module):
    """Answers every query of at most four pairs right, by looking."""

    options, embed = SimpleNamespace(context=32), torch.nn.Embedding(1, 1)

    def forward(self, inputs, documents):
        logits = torch.zeros(*inputs.shape, 64)
        for b, row in enumerate(inputs.tolist()):
            pairs = next(n for n in range(1, 17) if row[2 * n] == 0 or row[2 * n] in row[0 : 2 * n : 2])
            for t in range(2 * pairs, 32):
                if row[t] and pairs <= 4:
                    logits[b, t, row[row.index(row[t]) + 1]] = 9.0
        return logits


def test_accuracy_counts_queries_by_the_number_of_pairs():
    measured = recall.measure(subject(Oracle(), RecallTask([2, 4, 8], 64), ["eval.loss_tokens=3072"]))["loss"]
    assert measured["accuracy_at"]["2"] == measured["accuracy_at"]["4"] == 1.0
    assert measured["accuracy_at"]["8"] < 0.2
    assert measured["accuracy"] == pytest.approx((2 + 4 + 8 * measured["accuracy_at"]["8"]) / 14)


def recall_subject(pairs, loss_tokens, technique_tokens):
    model = build("mha", **SHAPE | {"vocab_size": 64, "context": 32}).eval()
    settings = f"loss_tokens={loss_tokens}", f"technique_tokens={technique_tokens}", "techniques=[{technique: full}]"
    return subject(model, RecallTask(pairs, 64), [f"eval.{setting}" for setting in settings])


@pytest.mark.parametrize("pairs", [[1, 2], [1, 2, 3], [1, 2, 3, 4]])
def test_techniques_see_every_number_of_pairs_equally_often(pairs, monkeypatch):
    seen = []
    found = techniques.token_nats
    monkeypatch.setattr(techniques, "token_nats", lambda x, wanted: seen.append(wanted) or found(x, wanted))
    (measured,) = techniques.measure(recall_subject(pairs, 6400, 1600))["techniques"]
    (wanted,) = seen
    sequences = RecallTask(pairs, 64).held_out("test", 32, 1000, 6400)[0][1][: len(wanted)]
    asked = (sequences != IGNORED).sum(1).tolist()
    assert len({asked.count(n) for n in pairs}) == 1
    assert torch.equal(wanted, sequences[:, 15:])
    assert measured["accuracy"] is not None


def test_a_query_is_as_far_as_its_pair_stands_back():
    inputs = torch.tensor([[5, 9, 6, 8, 6, 0, 0, 5], [6, 9, 7, 8, 0, 7, 6, 0]])
    asked = torch.tensor([[0, 0, 0, 0, 1, 0, 0, 1], [0, 0, 0, 0, 0, 1, 1, 0]]).bool()
    assert recall.distances(inputs, asked).tolist() == [2, 7, 3, 6]


@torch.inference_mode()
def test_without_a_query_there_is_no_accuracy():
    context = recall_subject([1], 32, 32)
    context.predictions.targets_NT[:, 15:] = IGNORED
    (measured,) = techniques.measure(context)["techniques"]
    assert [measured[name] for name in ("accuracy", "val_nats", "val_bpb")] == [None] * 3


def test_a_measure_is_a_module_of_the_package():
    """One with a function `measure`: helpers are none, and whether a run is evaluated does not depend on them."""
    modules = {path.stem for path in Path(eval.__file__).parent.glob("*.py") if path.stem != "__init__"}
    modules -= set() if importlib.util.find_spec("lm_eval") else {"harness"}  # which needs this extra
    have_measure = {name for name in modules if hasattr(importlib.import_module(f"eval.{name}"), "measure")}
    assert set(eval.measure_names()) == have_measure >= {"loss", "memory", "recall", "speed"}


def test_under_a_full_cache_the_loss_is_the_models_and_under_a_small_one_its_bytes_are():
    facts = {"token_bytes": torch.ones(300, dtype=torch.long).numpy(), "tokenizer": None, "n_vocab": 300}
    data = SimpleNamespace(**facts, spread=lambda sequences, available: range(available))
    model = build("gqa", vocab_size=257, width=32, layers=3, heads=4, context=32, kv_heads=2).eval()
    tokens = torch.tensor([list(f"the cat number {n} sat down on the mat\n".encode()[:33]) for n in range(6)])
    nats = token_nats(model(tokens[:, :-1]), tokens[:, 1:]).detach()
    found = Predictions(tokens[:, :-1], tokens[:, 1:], nats, nats > 0, 6 * 32)
    entries = [
        {"technique": "full", "bits": 8, "group": 4, "residual": 4},
        {"technique": "full"},
        {"technique": "h2o", "budget": [0.5, 12]},
        {"technique": "snapkv", "budget": 0.5, "window": 8},
        {"technique": "full", "bits": 4, "group": 8, "residual": 25},  # 32 tokens have no whole group that is older
    ]
    config = parse_study({"eval": {"techniques": entries}}).eval
    subject = SimpleNamespace(model=model, data=data, predictions=found, config=config, dtype=torch.float32, show=print)
    packed, full, half, twelve, snapkv, unpacked = techniques.measure(subject)["techniques"]
    expected = nats[:, 15:].mean().item()
    assert full["val_nats"] == pytest.approx(expected, rel=1e-5)
    assert full["val_bpb"] == pytest.approx(expected / math.log(2), rel=1e-5)
    assert full["bytes_held"] == 32 * model.kv_bytes_per_token(torch.float32)
    assert packed["val_nats"] == pytest.approx(expected, rel=1e-3)
    assert packed["bytes_held"] < full["bytes_held"]
    assert half["bytes_held"] == full["bytes_held"] / 2
    assert twelve["bytes_held"] == full["bytes_held"] * 12 / 32
    assert (half["budget"], twelve["budget"], half["prompt"]) == (0.5, 12, 16)
    assert half["val_nats"] != full["val_nats"]
    assert snapkv["bytes_held"] == full["bytes_held"] * (8 + 16) / 32  # of the prompt a half, and all that is decoded
    assert "bits=4 quantised nothing of 32 tokens" in unpacked["skipped"]
    assert "bytes_held" not in unpacked
    subject.model = build("yoco", vocab_size=257, width=32, layers=4, heads=4, context=32, kv_heads=2, window=8).eval()
    assert "computes the last one's alone" in techniques.measure(subject)["techniques"][-2]["skipped"]
