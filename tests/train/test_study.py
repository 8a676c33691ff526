"""Studies: every wrong key or value is one clear line, matching holds what it says, keys tell what must be redone."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
from texts import refusal

from archs import VARIANTS
from eval.results import matching_tables
from train.errors import InputError
from train.files import write_json
from train.meta import on_meta
from train.plan import Plan
from train.runner import make_module
from train.store import STUDIES, find_study
from train.study import load_data, parse_study, read_yaml
from train.tuning import KNOWN_TO, MOST_ROUNDS, WIDENED_AT_MOST, Tuned, choose
from train.variants import matching_heads, resolve_variants

THREE = "[{arch: mha}, {arch: mqa}, {arch: gqa, kv_heads: 2}]"


def study(*overrides, **sections):
    return parse_study({"tokenizer": {"name": "bytes"}, **sections}, overrides)


def test_quick_is_complete_and_what_a_study_leaves_out_is_from_it():
    quick = parse_study(read_yaml(STUDIES / "quick.yaml"))
    assert {v["arch"] for v in quick.variants} <= set(VARIANTS)
    assert parse_study({}) == quick
    own = parse_study({"model": {"layers": 6}, "train": {"tokens": 9_999}, "corpus": {"files": ["a.txt"]}})
    assert own.model == quick.model | {"layers": 6}
    assert (own.train.tokens, own.train.lr) == (9_999, quick.train.lr)
    assert (own.corpus.key, own.corpus.files) == ("files", ["a.txt"])


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_study_resolves(path):
    shipped = parse_study(read_yaml(path))
    variants = {variant.label: variant for variant in resolve_variants(shipped, shipped.tokenizer.vocab_size, STUDIES)}
    for variant in variants.values():
        first = variants[variant.baseline].params
        assert abs(variant.params - first) <= 0.005 * first or shipped.match != "ffn"


WRONG = [
    ({"trian": {}}, "unknown key 'trian'; allowed: corpus,"),
    ({"train": {"tokns": 5}}, "did you mean 'tokens'?"),
    ({"eval": {"decode": {"batches": [1]}}}, "unknown key 'eval.decode.batches'"),
    ({"model": {"widht": 64}}, "unknown key 'model.widht'; allowed: width"),
    ({"train": {"tokens": "many"}}, "train.tokens='many': must be a whole number of at least 1"),
    ({"train": {"lr": -1.0}}, "train.lr=-1.0: must be a number above 0 or a list, each a number above 0"),
    ({"train": {"lr": [1e-3, 0]}}, "train.lr=[0.001, 0]: must be a number above 0"),
    ({"train": {"lr": [1e-3, 1e-3]}}, "train.lr: 0.001 stands twice"),
    ({"train": {"lr": []}}, "train.lr: at least one is needed"),
    (
        {"sizes": [{"depth": 3}]},
        "unknown key 'sizes.depth'; allowed: tokens, warmup_tokens, optimizer, schedule, width",
    ),
    ({"sizes": [{"width": 64, "tokens": "many"}]}, "sizes: tokens='many': must be a whole number"),
    ({"sizes": [{"width": 64, "warmup_tokens": -1}]}, "sizes: warmup_tokens=-1: must be a whole number"),
    ({"sizes": {"width": 3}}, "sizes={'width': 3}: must be a list"),
    ({"eval": {"level": 1.0}}, "eval.level=1.0: must be a number above 0 and below 1"),
    ({"tokenizer": {"name": "bpe", "vocab_size": 2**31}}, "tokenizer.vocab_size=2147483648: must be"),
    ({"train": {"warmup_tokens": -1}}, "train.warmup_tokens=-1: must be a whole number of at least 0"),
    ({"train": {"precision": "fp8"}}, "train.precision='fp8': must be one of auto, bf16, fp32"),
    ({"train": {"strategy": "fsdp"}}, "train.strategy='fsdp': must be one of auto, ddp,"),
    ({"train": {"devices": 3}}, "train.devices=3 and train.num_nodes=1 must divide the batch's 8 sequences"),
    ({"seeds": []}, "seeds: at least one is needed"),
    ({"seeds": [-1]}, "seeds=-1: must be a list, each a whole number of at least 0"),
    ({"seeds": [10**22]}, "and below 4294967296"),
    ({"seeds": None}, "needs the key 'seeds'"),
    ({"match": "params"}, "match='params': must be one of ffn, heads, none"),
    ({"variants": []}, "variants: at least one is needed"),
    ({"variants": "mha"}, "variants='mha': must be a list"),
    ({"variants": [{"label": "x"}]}, "variants: entry 0 needs an arch"),
    ({"variants": [{"label": True, "arch": "mha"}]}, "variants: entry 0: label True is not text; put it in quotation"),
    ({"variants": [{"arch": "mha"}, {"arch": "mha"}]}, "variants: 'mha' stands twice"),
    (
        {"variants": [{"arch": "mha", "label": "x", "head_dim": [8]}, {"arch": "mqa", "label": "x", "head_dim": [4]}]},
        "'x' is the label of mha and of mqa",
    ),
    ({"variants": [{"arch": "mha", "label": "a/../../x"}]}, "'a/../../x' names a folder"),
    ({"variants": [{"arch": "mha", "label": ".."}]}, "names a folder"),
    ({"variants": [{"arch": "mha", "vocab_size": 9}]}, "set tokenizer.vocab_size"),
    ({"variants": [{"arch": "mha", "context": 8}]}, "context is the same for all of them; set model.context"),
    ({"eval": {"techniques": [{"budget": 0.5}]}}, "eval.techniques: unknown technique None"),
    ({"eval": {"techniques": [{"technique": "snapkv", "budget": 0.25}]}}, "window=32 is longer than the budget of 16"),
    ({"eval": {"techniques": [{"technique": "h2o", "budget": []}]}}, "eval.techniques: h2o: budget is an empty list"),
    ({"eval": {"techniques": [{"technique": "dmc", "lr": 1}]}}, "lr=1"),
    ({"eval": {"techniques": [{"technique": "h2o", "budget": [0.5, 0.5]}]}}, "stands twice in the study"),
    ({"eval": {"techniques": [{"technique": "dmc", "train_tokens": 9}]}}, "train_tokens=9 is less than one batch"),
    ({"model": {"context": None}, "eval": {"techniques": [{"technique": "full"}]}}, "model: context=None: must be"),
    ({"eval": {"decode": {"batch": [0]}}}, "eval.decode.batch=0: must be a list, each a whole number of at least 1"),
    ({"tokenizer": {"vocab_size": 99}}, "needs the key 'tokenizer.name'"),
    ({"tokenizer": "bytes"}, "tokenizer='bytes': must be a mapping with the keys name, vocab_size"),
    ({"corpus": None}, "needs the key 'corpus'"),
    ("train.lr=.inf", "train.lr=inf: must be a number above 0"),
    ("train.tokens=100k", "train.tokens='100k': must be a whole number"),
    ("train.tokens=1.5", "train.tokens=1.5: must be a whole number"),
    ("seeds=3", "seeds=3: must be a list, each a whole number"),
    ("tokenizer.name=3", "tokenizer.name=3: must be text"),
    ("variants=[{arch: mha, 5: 3}]", "5 is no key"),
    ("eval.decode.seeds=[0, 7]", "eval.decode.seeds=7: must be among the study's seeds [0]"),
    ("train.tokens=100", "less than one batch"),
    ("eval.paging={sequences: 0}", "sequences=0"),
    ("eval.paging={block_sizes: []}", "block_sizes"),
    ("eval.paging={lengths: some}", "lengths"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=[message for _, message in WRONG])
def test_a_wrong_study_or_override_is_refused_in_one_line(wrong, message):
    assert message in refusal(parse_study, *(({}, [wrong]) if isinstance(wrong, str) else (wrong,)))


IMPOSSIBLE = [
    ("model.heads=7", "mha: heads=7 must divide width="),
    ("variants=[{arch: gqa, kv_heads: 3}]", "gqa: kv_heads=3 must divide heads=4"),
    ("variants=[{arch: mlaa}]", "unknown architecture 'mlaa'"),
    ("variants=[{arch: mha, kv_heads: 2}]", "option 'kv_heads'"),
    ("variants=[{arch: 'mine.py:Mine', label: mine}]", "mine.py"),
    ("variants=[{arch: mha}, {arch: mqa, ffn_width: 64}]", "mqa: ffn_width=64: parameters are "),
    ("variants=[{arch: mha}, {arch: mla, kv_rank: 9999, rope_dim: 2}]", "cannot bring"),
    ("model.context=100", "must be a multiple of model.context=100"),
    ("model.context=1048576", "batch_tokens"),
    ("variants=[{arch: gqa, kv_heads: []}]", "gqa: kv_heads is an empty list"),
    ("variants=[{arch: gqa, kv_heads: [2, 2]}]", "'gqa-2' stands twice"),
    ("variants=[{arch: gqa, kv_heads: [2, 3]}]", "gqa-3: kv_heads=3 must divide"),
    ("sizes=[{width: 64}, {width: 64}]", "'mha-64x4' stands twice"),
    ("sizes=[{width: 64, tokens: 3}]", "sizes: tokens=3 is less than one batch"),
    (f"variants=[{{arch: gqa, kv_heads: [2, 1], label: {'x' * 63}}}]", "names a folder"),
]


@pytest.mark.parametrize(("override", "message"), IMPOSSIBLE, ids=[message for _, message in IMPOSSIBLE])
def test_what_no_model_can_be_is_refused_in_one_line(data, tmp_path, override, message):
    assert message in refusal(lambda: Plan(study(override), data, tmp_path))


def test_a_context_past_the_corpus_is_refused(data, tmp_path):
    message = refusal(Plan, study("model.context=2048", "train.batch_tokens=2048"), data, tmp_path)
    assert "tokens in the split 'tune', too few for one sequence of model.context=2048" in message


def test_overrides_reach_every_place():
    changed = study("train.tokens=100_000", "train.lr=1e-3", "variants.gqa.kv_heads=1", "seeds=[3, 4]")
    assert (changed.train.tokens, changed.train.lr, changed.seeds) == (100_000, 1e-3, [3, 4])
    whole = study("train.tokens=2e4", "seeds=[1e0, 2]", "train.checkpoint_steps=1e2", "eval.decode.seeds=[2e0]")
    assert (whole.train.tokens, whole.seeds, whole.train.checkpoint_steps) == (20_000, [1, 2], 100)
    assert {type(number) for number in (whole.train.tokens, *whole.seeds, *whole.eval.decode.seeds)} == {int}


def test_overrides_of_a_given_list_name_variants_by_label_or_place():
    given = {"variants": [{"arch": "mha"}, {"label": "grouped", "arch": "gqa", "kv_heads": 2}]}
    by_label, by_place = (parse_study(given, [f"variants.{at}.kv_heads=1"]) for at in ("grouped", "1"))
    assert by_label.variants[1]["kv_heads"] == by_place.variants[1]["kv_heads"] == 1
    for wrong in ("variants.nobody.kv_heads=1", "train.tokens", "seeds.0.x=3", "train.tokens.x=1", "seeds=2023-13-45"):
        assert "--set" in refusal(parse_study, given, [wrong])
    assert "--set variants" in refusal(parse_study, {"variants": ["mha"]}, ["variants.mha.kv_heads=1"])
    two = {"variants": [{"arch": "mha"}, {"arch": "gqa", "kv_heads": [1]}, {"arch": "gqa", "kv_heads": [2]}]}
    assert "several are called 'gqa'; use an index, such as 1" in refusal(parse_study, two, ["variants.gqa.gate=true"])


def test_unknown_studies_and_broken_files_are_refused(tmp_path):
    assert "no study 'qiuck': give the path of a YAML file or one of " in refusal(find_study, "qiuck")
    assert "no study" in refusal(find_study, "x" * 300)
    broken = {"train: {tokens: 1": "not a YAML file", "[1, 2]": "must be a mapping", "": "must be a mapping"}
    broken |= {"\0": "not a YAML file", "seeds: 2023-13-45": "not a YAML file"}
    broken |= dict.fromkeys(("seeds: [0]\nseeds: [1]", "variants: [{arch: mha, arch: mqa}]"), "is given twice")
    path = tmp_path / "study.yaml"
    for text, message in broken.items():
        path.write_text(text)
        assert message in refusal(read_yaml, path)
    path.write_text("a:\n- &m {<<: &b {arch: mha, heads: 4}, heads: 2}\nb: {<<: *m}\n")  # a merge is no second time
    assert read_yaml(path) == {"a": [{"arch": "mha", "heads": 2}], "b": {"arch": "mha", "heads": 2}}


def test_ffn_matching_brings_every_variant_within_half_a_percent():
    draw = random.Random(0)
    for _ in range(6):
        heads, size, layers = draw.choice([4, 8]), draw.choice([16, 24, 32]), draw.choice([2, 4, 6])
        shape = {"width": heads * size, "layers": layers, "heads": heads, "context": 32}
        examples = [(arch, options) for arch, variant in VARIANTS.items() for options in variant.examples]
        variants = [{"arch": arch, "label": f"{arch}{n}", **options} for n, (arch, options) in enumerate(examples)]
        first, *others = resolve_variants(study(model=shape, variants=variants), 300)
        for variant in others:
            assert abs(variant.params - first.params) <= 0.005 * first.params, variant.options


@pytest.mark.parametrize("vocab_size", [300, 50_257, 200_019])
def test_a_large_vocabulary_does_not_hide_a_difference(vocab_size):
    """Of the parameters beside the embeddings, where one unit of width is fine enough."""
    shape = {"width": 64, "layers": 4, "heads": 4, "context": 32}
    variants = [{"arch": "mha"}, {"arch": "gqa", "kv_heads": 2}, {"arch": "mqa"}, {"arch": "yoco", "kv_heads": 4}]
    first, *others = (
        on_meta(v.arch, v.options).count_params(embedding=False)
        for v in resolve_variants(study(model=shape, variants=variants), vocab_size)
    )
    assert max(abs(params - first) for params in others) <= 0.005 * first
    variants = [{"arch": "mha"}, {"arch": "mla", "kv_rank": 256, "rope_dim": 16}]
    message = refusal(resolve_variants, study(model=shape, variants=variants), vocab_size)
    assert "cannot bring the parameters" in message


def test_heads_matching_holds_query_plus_kv_heads_and_so_the_parameters_and_no_matching_the_widths():
    unmatched = resolve_variants(study(match="none"), 300)
    assert len({variant.options["ffn_width"] for variant in unmatched}) == 1 < len({v.params for v in unmatched})
    variants = [{"arch": "mha"}, {"arch": "gqa", "kv_heads": 2}, {"arch": "mqa"}]
    first, *others = resolve_variants(study(match="heads", variants=variants), 300)
    mha = first.options
    for variant, kv_heads in zip(others, (2, 1), strict=True):
        assert variant.options["heads"] + kv_heads == 2 * mha["heads"]
        assert variant.params == first.params
        assert (variant.options["head_dim"], variant.options["ffn_width"]) == (mha["head_dim"], mha["ffn_width"])
    options = {"vocab_size": 300, "width": 64, "layers": 2, "heads": 4, "context": 8, "kv_rank": 32, "rope_dim": 8}
    best = matching_heads("mla", options, 100_000)
    for heads in range(1, 16):
        off = abs(on_meta("mla", options | best | {"heads": heads}).count_params() - 100_000)
        assert off >= abs(on_meta("mla", options | best).count_params() - 100_000)


@pytest.mark.parametrize(
    ("override", "retrained", "reevaluated"),
    [
        ("variants.gqa.kv_heads=1", {"gqa"}, {"gqa"}),
        ("train.lr=1e-3", "all", "all"),
        ("model.layers=2", "all", "all"),
        ("eval.loss_tokens=999", set(), "all"),
        ("seeds=[7]", "all", "all"),
        ("variants.gqa.label=other", set(), {"gqa"}),
        ("match=none", {"mqa", "gqa"}, "all"),
        *((f"train.{how}", set(), set()) for how in ("checkpoint_seconds=5", "checkpoint_steps=7", "devices=2")),
        ("train.strategy=ddp", set(), set()),
    ],
)
def test_a_changed_value_changes_the_keys_of_what_it_touches(data, tmp_path, override, retrained, reevaluated):
    three = f"variants={THREE}"
    before, after = (Plan(study(three, *more), data, tmp_path).look() for more in ((), (override,)))
    everything = {run.variant.label for run in before.runs}
    pairs = list(zip(before.runs, after.runs, strict=True))
    changed = {a.variant.label for a, b in pairs if a.key != b.key}
    remeasured = {a.variant.label for a, b in pairs if before.eval_key(a) != after.eval_key(b)}
    assert changed == (everything if retrained == "all" else retrained)
    assert remeasured == (everything if reevaluated == "all" else reevaluated)


def test_lists_become_families_with_every_combination_and_sizes_multiply_them():
    variants = [
        {"arch": "mha", "head_dim": [32, 16]},
        {"label": "y", "arch": "yoco", "kv_heads": [4, 2], "self_decoder": ["swa", "gret"], "window": 8},
    ]
    plain = resolve_variants(study(variants=variants), 300)
    labels = ["mha-32", "mha-16", "y-4-swa", "y-4-gret", "y-2-swa", "y-2-gret"]
    assert [v.label for v in plain] == labels
    assert [v.family for v in plain] == ["mha", "mha", "y-swa", "y-gret", "y-swa", "y-gret"]  # a curve over bytes each
    assert {v.baseline for v in plain} == {"mha-32"}
    assert [v.options["head_dim"] for v in plain[:2]] == [32, 16]
    sizes = [{"width": 96}, {"width": 192, "layers": 6, "tokens": 720_000}]
    sized = resolve_variants(study(variants=variants, sizes=sizes), 300)
    assert [v.label for v in sized] == [f"{label}-{size}" for size in ("96x4", "192x6") for label in labels]
    assert [v.baseline for v in sized] == ["mha-32-96x4"] * 6 + ["mha-32-192x6"] * 6
    assert {(v.size, v.options["width"], v.options["layers"], v.tokens) for v in sized} == {
        ("96x4", 96, 4, study().train.tokens),
        ("192x6", 192, 6, 720_000),
    }


def test_sizes_of_one_shape_are_told_apart_by_what_else_differs():
    own = [{"width": 64, "mla": {"kv_rank": 16}}, {"width": 128, "mla": {"kv_rank": 32}, "optimizer": "muon"}]
    variants = [{"arch": "mha"}, {"arch": "mla", "rope_dim": 8}]
    first, mla, other, wide = resolve_variants(study(variants=variants, sizes=own), 300)
    assert (mla.options["kv_rank"], wide.options["kv_rank"], wide.label, wide.short) == (16, 32, "mla-128x4", "mla")
    assert [v.recipe["optimizer"] for v in (first, mla, other, wide)] == ["adamw", "adamw", "muon", "muon"]
    sizes = [{"width": 64}, {"width": 64, "tokens": 99_000}, {}]
    labels = [v.label for v in resolve_variants(study(variants=[{"arch": "mha"}], sizes=sizes), 300)]
    assert labels == [f"mha-64x4-tokens{study().train.tokens}", "mha-64x4-tokens99000", "mha-128x4-tokens360000"]


def test_the_matching_tables_show_what_each_rule_holds_and_what_it_costs():
    variants = [{"arch": "mha"}, {"arch": "mqa"}, {"arch": "mla", "kv_rank": 32, "rope_dim": 8, "ffn_width": 64}]
    tables = matching_tables(study(match="none", variants=variants), 300)
    (mha, mqa, mla), (mha_, mqa_, _), (_, none, _) = (tables[rule] for rule in ("ffn", "heads", "none"))
    assert mha == mha_
    assert abs(mqa["params"] / mha["params"] - 1) < 0.005
    assert (mqa["heads"], mqa["ffn_width"] > mha["ffn_width"]) == (mha["heads"], True)
    assert (mqa_["ffn_width"], mqa_["heads"]) == (mha["ffn_width"], 7)
    assert mqa_["score_flops_per_token"] / mha["score_flops_per_token"] == pytest.approx(7 / 4)
    assert none["params"] < mha["params"]
    assert "ffn_width=64: parameters are " in mla["error"]
    tables = matching_tables(study(variants=[{"arch": "mha"}, {"arch": "mqa", "ffn_width": mqa["ffn_width"] + 1}]), 300)
    widths = {rule: [row["ffn_width"] for row in rows] for rule, rows in tables.items()}
    assert widths["ffn"] == [mha["ffn_width"], mqa["ffn_width"] + 1]
    assert widths["heads"] == widths["none"] == [mha["ffn_width"]] * 2  # which a width of its own does not reach


def test_variants_of_one_label_are_a_family_and_a_width_of_their_own_is_kept_if_it_matches():
    """So that each of a family may have its own width: the rule would give another, within the same tolerance."""
    one, two = ({"label": "mla", "arch": "mla", "kv_rank": [rank], "rope_dim": 8} for rank in (32, 16))
    by_rule = resolve_variants(study(variants=[{"arch": "mha"}, one | {"kv_rank": [32, 16]}]), 300)
    width = by_rule[1].options["ffn_width"] - 1
    own = resolve_variants(study(variants=[{"arch": "mha"}, one | {"ffn_width": width}, two]), 300)
    assert [(v.label, v.family) for v in own] == [(v.label, v.family) for v in by_rule]
    assert own[1].options["ffn_width"] == width
    assert own[2] == by_rule[2]
    with pytest.raises(InputError, match="mqa: match: heads sets heads"):
        resolve_variants(study(match="heads", variants=[{"arch": "mha"}, {"arch": "mqa", "heads": 2}]), 300)


def tried(plan, losses):
    """Trains nothing: writes the records that the tuning runs of an invented loss would leave."""
    order = []
    while (ready := plan.look().ready) and (run := ready[0]).kind == "tuning":
        order.append(run)
        loss = losses(run)
        record = {"failed": "x", "diverged": True} if loss is None else {"train": {}, "curve": [{"val_bpb": loss}]}
        write_json(run.directory / "record.json", {"key": run.key} | record)
    return order


def parabola(best):
    """A loss with its least value at the rate `best`, and an offset that each seed has for itself."""
    return lambda run: 2 + 0.3 * math.log2(run.lr / best(run)) ** 2 + run.seed % 7


def test_each_variants_rate_is_the_vertex_of_a_parabola_over_seeds_of_its_own(data, tmp_path):
    best = {"mha": 3.3e-3, "mqa": 2.1e-4, "gqa": 1.3e-3}
    plan = Plan(study("train.lr=[5e-4, 1e-3, 2e-3]", "seeds=[0, 1000]", "variants=" + THREE), data, tmp_path)
    assert plan.look().runs == []
    assert len(plan.look().variants_to_train) == 3 * 3 * 2 + 3 * 2
    order = tried(plan, parabola(lambda run: best[run.variant.label]))
    rates = {label: list(dict.fromkeys(run.lr for run in order if run.variant.label == label)) for label in best}
    assert rates["mha"] == [5e-4, 1e-3, 2e-3, 4e-3, 8e-3]
    assert rates["mqa"] == [5e-4, 1e-3, 2e-3, 2.5e-4, 1.25e-4]
    assert rates["gqa"] == [5e-4, 1e-3, 2e-3, 4e-3]  # the best lies inside of three, and four are wanted
    runs = plan.look().runs
    assert {run.variant.label: run.lr for run in runs} == best
    assert {run.seed for run in runs} == {0, 1000}
    assert {run.seed for run in order} == {1001, 1002}
    for run in runs:
        tuning = run.settings["tuning"]
        assert [rate["lr"] for rate in tuning["rates"]] == sorted(rates[run.variant.label])
        assert (tuning["seeds"], tuning["at_edge"], tuning["lr"]) == ([1001, 1002], False, run.lr)
        assert tuning["optimum"] == run.lr  # nothing scatters
        assert tuning["octaves_error"] == pytest.approx(0, abs=1e-6)
        assert tuning["cost_of_sqrt2"] == pytest.approx(0.3 / 4)
    assert plan.look().ready == sorted(runs, key=lambda run: run.seed)  # a whole seed after the other
    single = Plan(study("train.lr=3.3e-3", "variants=" + THREE), data, tmp_path).look().runs[0]
    assert single.key == runs[0].key  # how a rate was found does not change the run


def test_a_variant_with_a_rate_of_its_own_is_trained_with_it_and_tries_none(data, tmp_path):
    variants = [{"arch": "mha"}, {"arch": "gqa", "kv_heads": 2, "lr": 3e-3}]
    sizes = [{"width": 64, "layers": 2}, {"width": 96, "layers": 2, "mha": {"lr": 1e-3}}]
    plan = Plan(study("train.lr=[1e-3, 2e-3, 4e-3, 8e-3]", variants=variants, sizes=sizes), data, tmp_path)
    rates = {run.variant.label: run.lr for run in plan.look().runs}
    assert rates == {"gqa-64x2": 3e-3, "mha-96x2": 1e-3, "gqa-96x2": 3e-3}
    assert {variant.label for variant in plan.look().untuned} == {"mha-64x2"}
    assert {run.variant.label for run in plan.look().tuning_runs} == {"mha-64x2"}
    runs = {run.variant.label: run for run in plan.look().runs}
    assert runs["mha-96x2"].settings["tuning"] is None
    one = Plan(study("train.lr=1e-3", variants=[{"arch": "mha"}], sizes=sizes[1:]), data, tmp_path).look().runs[0]
    assert one.key == runs["mha-96x2"].key  # where the rate stands does not change the run
    least = Plan(
        study("train.lr=[1e-3, 2e-3]", "train.tuning_share=0", variants=variants[:1], sizes=sizes), data, tmp_path
    )
    assert {variant.size for variant in least.smallest.values()} == {"64x2"}
    sizes[0]["mha"], sizes[1]["mha"] = {"lr": 1e-3}, {}
    larger = Plan(
        study("train.lr=[1e-3, 2e-3]", "train.tuning_share=0", variants=variants[:1], sizes=sizes), data, tmp_path
    )
    assert {run.variant.label for run in larger.look().tuning_runs} == {"mha-96x2"}  # the size below it tries none
    for wrong in (0, -1.0, "fast", True, math.inf, {}, [1e-3, 2e-3]):
        own = study(variants=[{"arch": "mha", "lr": wrong}])
        assert f"variants: mha: lr={wrong!r}: must be a number above 0" in refusal(Plan, own, data, tmp_path)


def test_a_size_may_set_its_warm_up_and_that_is_as_if_the_study_did(data, tmp_path):
    """The key of one run, and the schedule of its module, with the same warm-up given in either place."""
    one = [{"arch": "mha"}]
    size = study(variants=one, sizes=[{"layers": 2, "warmup_tokens": 20_000}])
    whole = study("train.warmup_tokens=2e4", variants=one, sizes=[{"layers": 2}])
    other = study("train.warmup_tokens=1e4", variants=one, sizes=[{"layers": 2}])
    plans = [Plan(each, data, tmp_path) for each in (size, whole, other)]
    runs = [plan.look().runs[0] for plan in plans]
    assert runs[0].key == runs[1].key != runs[2].key
    modules = [make_module(plan, run, 100_000, 1) for plan, run in zip(plans, runs, strict=True)]
    assert [module.hparams.warmup_tokens for module in modules] == [20_000, 20_000, 10_000]


@pytest.mark.parametrize(("scatter", "rounds"), [(0.0, 1), (0.6, 3), (9.0, MOST_ROUNDS)])
def test_where_losses_scatter_further_seeds_say_where_the_minimum_is(data, tmp_path, scatter, rounds):
    plan = Plan(study("train.lr=[5e-4, 1e-3, 2e-3, 4e-3]", "variants=[{arch: mha}]"), data, tmp_path)

    def loss(run):
        noise = np.random.default_rng([run.seed, round(run.lr * 1e6)]).normal()
        return 2 + 0.3 * math.log2(run.lr / 1.3e-3) ** 2 + scatter * noise

    order = tried(plan, loss)
    (run,) = plan.look().runs
    tuning = run.settings["tuning"]
    assert tuning["seeds"] == list(range(1000, 1000 + 2 * rounds))
    known = tuning["octaves_error"] is not None and tuning["octaves_error"] <= KNOWN_TO
    assert known or rounds == MOST_ROUNDS
    losses = {rate: [loss(r) for r in order if r.lr == rate] for rate in {r.lr for r in order}}
    for rate in tuning["rates"]:
        assert rate["val_bpb"] == pytest.approx(np.mean(losses[rate["lr"]][: 2 * rounds]))
    assert {r.name for r in plan.look().tuning_runs} == {r.name for r in order}


def test_a_fitted_rate_is_off_by_as_much_as_its_error_says():
    """Over many draws of noise the vertices scatter by the error that is stated, as least squares in numpy gives it; at
    the rate that is chosen the fit is one standard error of the fit, as numpy gives it, above its minimum."""
    rng = np.random.default_rng(0)
    rates, errors, stated, below = [1e-3, 2e-3, 4e-3, 8e-3], [], [], []
    for _ in range(400):
        losses = {
            rate: {seed: 2 + seed + 0.1 * (math.log2(rate / 2.6e-3)) ** 2 + 0.01 * rng.normal() for seed in range(3)}
            for rate in rates
        }
        tuned = choose(losses)
        x = np.log2([rate / 2e-3 for rate in rates])
        c, b, _ = np.polyfit(x, [np.mean(list(losses[rate].values())) for rate in rates], 2)
        assert tuned.optimum == pytest.approx(2e-3 * 2 ** (-b / 2 / c), rel=5e-3)
        errors.append(math.log2(tuned.optimum / 2.6e-3))
        stated.append(tuned.octaves_error)
        design = np.array([[s == seed for s in range(3)] + [t, t * t] for seed in range(3) for t in x], dtype=float)
        values = np.array([losses[rate][seed] for seed in range(3) for rate in rates])
        _, rest, *_ = np.linalg.lstsq(design, values, rcond=None)
        vertex = np.array([1 / 3] * 3 + [-b / 2 / c, (b / 2 / c) ** 2])
        error = math.sqrt(rest[0] / (12 - 5) * vertex @ np.linalg.inv(design.T @ design) @ vertex)
        below.append(c * math.log2(tuned.lr / tuned.optimum) ** 2 / error)
        assert tuned.lr < tuned.optimum
    assert below == pytest.approx([1.0] * 400, rel=0.15)  # rates have three digits
    assert np.std(errors) == pytest.approx(np.mean(stated), rel=0.15)


def test_a_choice_does_not_leave_the_rates_that_were_tried():
    """However much losses scatter, no rate below those that were fitted is taken."""
    losses = {rate: {0: 2 + at, 1: 9 - at} for rate, at in ((1e-3, 0.2), (2e-3, -0.1), (4e-3, 0.1), (8e-3, 0.3))}
    losses[2e-3][1] = 8.8
    tuned = choose(losses)
    assert tuned.lr == 1e-3 < tuned.optimum


def test_rates_that_are_no_parabola_give_the_best_one_that_was_tried():
    """Far away the loss rises as it likes; a maximum, a vertex outside and too few finite rates are no fit."""
    near = {rate: {0: 2 + math.log2(rate / 1e-3) ** 2} for rate in (5e-4, 1e-3, 2e-3, 4e-3)}
    exact = Tuned(1e-3, 1e-3, pytest.approx(0, abs=1e-6), pytest.approx(0.25))
    assert choose(near | {8e-3: {0: 99.0}, 1.6e-2: {0: 5.0}}) == exact
    assert choose({1e-3: {0: 3.0}, 2e-3: {0: 2.0}, 4e-3: {0: 1.2}}) == Tuned(4e-3)
    assert choose({1e-3: {0: 1.0}, 2e-3: {0: 1.2}, 4e-3: {0: 1.1}}) == Tuned(1e-3)
    assert choose({1e-3: {0: 1.0}, 2e-3: {0: math.inf}, 4e-3: {0: math.inf}}) == Tuned(1e-3)
    assert choose({1e-3: {0: math.inf, 1: 1.0}}) is None  # a rate counts where it trains with every seed


SIZES = ["sizes=[{width: 64, layers: 2, tokens: 8192}, {width: 96, layers: 2, tokens: 16384}]"]


def test_shorter_tuning_is_corrected_by_what_the_smallest_size_measures(data, tmp_path):
    """The best rate here falls with the square root of the tokens, and differs between variants and sizes."""

    def best(run):
        at = {"mha": 2e-3, "gqa": 3e-3}[run.variant.short] / (run.variant.options["width"] / 64)
        return at * math.sqrt(8192 / run.variant.tokens)

    settings = "train.lr=[1e-3, 2e-3, 4e-3, 8e-3]", "variants=[{arch: mha}, {arch: gqa, kv_heads: 2}]", *SIZES
    plan = Plan(study(*settings, "train.tuning_share=0.25"), data, tmp_path)
    order = tried(plan, parabola(best))
    tokens = {(run.variant.size, run.variant.tokens) for run in order}
    assert tokens == {("64x2", 8192), ("64x2", 2048), ("96x2", 4096)}
    runs = plan.look().runs
    assert len(runs) == 4
    for run in runs:
        assert run.lr == pytest.approx(best(run), rel=1e-2)
    whole = Plan(study(*settings), data, tmp_path / "whole")
    tried(whole, parabola(best))
    assert whole.look().runs[0].key == runs[0].key  # how a rate was found does not change the run
    none = Plan(study(*settings, "train.tuning_share=0"), data, tmp_path / "none")
    assert {run.variant.size for run in tried(none, parabola(best))} == {"64x2"}
    rates = {run.variant.label: run.lr for run in none.look().runs}
    assert rates["mha-96x2"] == rates["mha-64x2"] == pytest.approx(2e-3, rel=1e-2)
    assert none.look().runs[-1].settings["tuning"]["tuned_at"] == "64x2"
    alone = refusal(lambda: study("train.tuning_share=0.5"))
    assert "train.tuning_share=0.5: the smallest of several sizes measures what shorter runs change" in alone
    short = refusal(lambda: study(*SIZES, "train.tuning_share=0.01"))
    assert "train.tuning_share=0.01: tokens=81 is less than one batch" in short


def test_a_variant_in_a_file_of_the_users_own_is_found_beside_the_study_and_its_source_decides_its_key(data, tmp_path):
    source = "from archs.grouped import MQA\n\n\nclass Mine(MQA):\n    pass\n"
    variants = [{"arch": "mha"}, {"arch": "mine.py:Mine"}]
    keys = []
    for folder, text in (("a", source), ("b", source), ("c", source + "# changed\n")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(text)
        plan = Plan(study(variants=variants), data, tmp_path, tmp_path / folder / "study.yaml")
        mha, mine = plan.look().runs
        assert (mine.variant.label, mine.variant.arch) == ("Mine", f"{tmp_path / folder / 'mine.py'}:Mine")
        assert "source" in mine.settings
        assert "source" not in mha.settings
        assert str(tmp_path) not in json.dumps(mine.settings)  # records are published
        assert plan.config(mine)["arch"] == mine.variant.arch  # from there its model is made again
        keys.append((mha.key, mine.key, plan.look().eval_key(mine)))
    assert keys[0] == keys[1]
    assert keys[0][0] == keys[2][0]
    assert keys[0][1] != keys[2][1]


def test_rates_that_diverge_lose_and_a_search_without_end_is_given_up(data, tmp_path):
    plan = Plan(study("train.lr=[1e-3, 2e-3]", "variants=" + THREE), data, tmp_path)
    losses = {"mha": lambda lr: None, "mqa": lambda lr: 2.0 - lr if lr < 3e-3 else None, "gqa": lambda lr: 2.0 - lr}
    tried(plan, lambda run: losses[run.variant.label](run.lr))
    chosen = {run.variant.label: run for run in plan.look().runs}
    assert [line.split(":")[0] for line in plan.look().failures] == ["mha"]
    assert chosen["mqa"].lr == 2e-3
    assert chosen["mqa"].settings["tuning"]["rates"][-1] == {"lr": 4e-3, "val_bpb": None}
    assert chosen["gqa"].lr == 2e-3 * 2**WIDENED_AT_MOST
    assert chosen["gqa"].settings["tuning"]["at_edge"]


def test_a_run_that_failed_for_another_reason_says_nothing_of_its_rate(data, tmp_path):
    plan = Plan(study("train.lr=[1e-3, 2e-3]", "variants=[{arch: mha}]"), data, tmp_path)
    run = plan.look().ready[0]
    write_json(run.directory / "record.json", {"key": run.key, "failed": "x", "diverged": False})
    assert [run.lr for run in plan.look().ready] == [1e-3, 1e-3, 2e-3, 2e-3]
    assert plan.look().runs == []
    assert plan.look().failures == ["mha lr 0.001 seed 1000 failed: x"]


def test_a_generated_task_needs_its_own_tokenizer():
    sections = {"corpus": {"name": "mqar", "pairs": [2, 4]}, "tokenizer": {"name": "ids", "vocab_size": 64}}
    assert load_data(study(**sections), Path("x.yaml"), Path("x")).n_vocab == 64
    for wrong in (
        {"tokenizer": {"name": "bytes"}},
        {"tokenizer": {"name": "ids"}},
        {"corpus": {"name": "mqar"}},
        {"corpus": {"name": "mqar", "pairs": [99]}},
        {"corpus": {"name": "mqar", "pairs": [2, 2]}},
        {"corpus": {"name": "stdlib", "pairs": [2]}},
    ):
        assert "pairs" in refusal(lambda wrong=wrong: load_data(study(**sections | wrong), Path("x.yaml"), Path("x")))
