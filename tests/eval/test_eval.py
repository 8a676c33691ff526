"""Loss, bytes and speeds against what they are said to be."""

import math
import random
import time

import pytest
import torch

from archs import VARIANTS, build
from eval.compare import compare, t_cdf, t_interval, t_quantile
from eval.evaluate import measure_speed
from eval.loss import measure_loss
from eval.memory import CONTEXTS, BytesDiffer, measure_memory
from eval.speed import measure_decode, measure_recompute, measure_roof, timed
from train.corpus import Corpus
from train.study import parse_study
from train.tokens import prepare

SHAPE = {"vocab_size": 258, "width": 32, "layers": 2, "heads": 4, "context": 16}
CPU = torch.device("cpu")
EACH = [(arch, options) for arch, variant in VARIANTS.items() for options in variant.examples]


@pytest.mark.parametrize(("arch", "options"), EACH)
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


@pytest.mark.parametrize("method", ["kv_elements_per_token", "kv_constant_elements", "kv_stored_elements"])
def test_a_formula_that_is_not_true_is_an_error(method, monkeypatch):
    model = build("gqa", **SHAPE, kv_heads=2)
    right = getattr(model, method)
    monkeypatch.setattr(model, method, lambda *args: right(*args) + 1)
    with pytest.raises(BytesDiffer, match="the formulas"):
        measure_memory(model, torch.float32)


def test_a_variant_that_hides_a_buffer_is_found_out(monkeypatch):
    model = build("mha", **SHAPE)
    parts = model.new_parts
    monkeypatch.setattr(model, "new_parts", lambda *args: [*parts(*args), {"hidden": [torch.zeros(args[1], 4)]}])
    with pytest.raises(BytesDiffer):
        measure_memory(model, torch.float32)


def test_loss_is_the_mean_over_held_out_tokens_in_bits_of_their_text(tmp_path):
    words = [f"word {n} of däta\n" * 9 for n in range(30)]
    text = prepare(Corpus("files", words[:20], words[20:], 1, "f" * 16), "bytes", None, tmp_path)
    model = build("mha", **SHAPE | {"vocab_size": 257}).eval()
    measured = measure_loss(model, text, 10**9, CPU)
    nats, n_bytes, tokens = 0.0, 0, 0
    for start in range(0, len(text.val) - 16, 16):
        row = torch.tensor(text.val[start : start + 17].astype("int64"))
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
    config = parse_study({}, ["eval.decode={batch: [1], context: [8, 16]}"]).eval
    model = build("mha", **SHAPE).eval()
    slow = {"token_ms": 1e9, "token_ms_iqr": 1.0, "prefill_ms": 0.0, "prefill_ms_iqr": 2.0, "tokens_per_s": 0.0}
    fast = slow | {"token_ms": 0.0, "prefill_ms": 1e9}
    before = {
        "decode": [{"batch": 1, "context": 8} | slow, {"batch": 1, "context": 16} | fast],
        "recompute": {"cached_ms": 0.0, "recomputed_ms": 1e9},
    }
    best = measure_speed(model, config, 10.0, lambda _: None, before)
    first, second = best["decode"]
    assert 0 < first["token_ms"] < 1e9
    assert (first["prefill_ms"], first["prefill_ms_iqr"]) == (0.0, 2.0)
    assert (second["token_ms"], second["token_ms_iqr"], second["tokens_per_s"]) == (0.0, 1.0, 0.0)
    assert 0 < second["prefill_ms"] < 1e9
    assert best["recompute"]["cached_ms"] == 0.0
    assert 0 < best["recompute"]["recomputed_ms"] < 1e9


def test_a_cache_that_does_not_fit_is_left_out_with_the_reason(monkeypatch):
    model = build("mha", **SHAPE).eval()
    monkeypatch.setattr("eval.speed._free_bytes", lambda device: 50_000)
    fits, too_large = measure_decode(model, [1], [8, 4000], 10.0)
    assert fits["token_ms"] > 0
    assert too_large.keys() == {"batch", "context", "skipped"}
    assert "GiB are free" in too_large["skipped"]


def test_recomputing_a_long_prefix_takes_longer_than_a_cached_step():
    model = build("mha", **SHAPE | {"width": 128}).eval()
    result = measure_recompute(model, 1024)
    assert result["recomputed_ms"] > 3 * result["cached_ms"]


def test_timing_leaves_out_warm_up_and_what_runs_before():
    calls = []

    def step():
        calls.append(1)
        time.sleep(0.5 if len(calls) <= 2 else 0.1)

    timing = timed(step, CPU, repeats=6, warmup=2, before=lambda: time.sleep(0.02))
    assert len(calls) == 8
    assert 95 < timing.median < 400


def test_the_roof_is_a_plausible_bandwidth():
    assert 0.5 < measure_roof(CPU) < 10_000


# Student's t and its quantiles: tables of any textbook, to the digits printed there


@pytest.mark.parametrize(("df", "value"), [(1, 12.706), (2, 4.303), (4, 2.776), (7, 2.365), (30, 2.042), (120, 1.980)])
def test_t_quantiles_are_those_of_the_tables(df, value):
    assert t_quantile(0.975, df) == pytest.approx(value, abs=6e-4)
    assert t_cdf(t_quantile(0.9, df), df) == pytest.approx(0.9, abs=1e-10)


@pytest.mark.parametrize("n", [3, 5, 8])
def test_intervals_cover_what_they_claim(n):
    draw = random.Random(n)
    trials = 4000
    intervals = (t_interval([draw.gauss(0, 1) for _ in range(n)], 0.95) for _ in range(trials))
    covered = sum(low <= 0 <= high for low, high in intervals)
    assert covered / trials == pytest.approx(0.95, abs=0.015)


def record(label, seed, bpb):
    return {"label": label, "seed": seed, "loss": {"val_bpb": bpb}}


def test_differences_are_paired_by_seed():
    """Seeds move all variants alike: paired, a small constant difference is certain; unpaired, it would be lost."""
    records = [record(label, s, s / 10 + d) for label, d in (("a", 0), ("b", 0.01), ("c", -0.01)) for s in range(4)]
    b, c = compare(records, ["a", "b", "c"])
    assert (b["verdict"], c["verdict"]) == ("higher", "lower")
    assert (b["seeds"], b["baseline"]) == ([0, 1, 2, 3], "a")
    assert b["mean_diff"] == pytest.approx(0.01)


def test_one_seed_separates_nothing_and_missing_seeds_are_left_out():
    records = [record("a", 0, 2.0), record("b", 0, 1.0), record("b", 1, 1.0)]
    (only,) = compare(records, ["a", "b"])
    assert (only["verdict"], only["ci_low"], only["ci_high"], only["seeds"]) == ("not separable", None, None, [0])
    assert compare([record("b", 0, 1.0)], ["a", "b"]) == []
