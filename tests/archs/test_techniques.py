"""Techniques on a trained cache: a full budget changes nothing, a smaller one holds what it says, and each rule keeps
the slots that its paper's formula keeps, computed from full attention matrices."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import ATTENDING, CASES, CHOSEN, assert_near, make

from archs import VARIANTS
from archs.cache import Allocator, FullCache, State
from archs.grouped import GroupedAttention
from archs.kv import Uncached
from archs.ops import rotate, split_heads
from archs.techniques import TECHNIQUES, Quantisation, Slots, compressed_cache, dmc, from_settings, ragged, technique
from archs.techniques.dmc import DMC
from archs.techniques.fastgen import PUNCTUATION, SPECIAL
from archs.techniques.quantised import pack, quantise, unpack

PROMPT, LATER = 40, 12
SIZE = 2, PROMPT + LATER
OPTIONS = {"snapkv": {"window": 6}, "vatp": {"first": 4}}
GROUPED = [case for case in CASES if case[0] in ("mha", "mqa", "gqa") and "qk_norm" not in case[1]]
EACH = [(name, *case) for name in TECHNIQUES for case in CASES]
ACTING = [
    (name, arch, options)
    for name, arch, options in EACH
    if (arch, options) in ATTENDING
    and not (TECHNIQUES[name].observes and CHOSEN[arch].early_exit)
    and (name != "dmc" or (arch, options) in GROUPED)
    and not (name == "streaming-llm" and (options.get("nope") or options.get("tied_kv")))
]
BUDGETED = [case for case in ACTING if case[0] not in ("full", "fastgen", "dmc")]


def each(cases):
    return pytest.mark.parametrize(
        ("name", "arch", "options"), cases, ids=["-".join(map(str, (*case[:2], n))) for n, case in enumerate(cases)]
    )


def model_and_tokens(arch="gqa", options=VARIANTS["gqa"].examples[0]):
    return make(arch, options, layers=4), torch.randint(97, SIZE)


def run(model, tokens, cache, prompt=PROMPT):
    """Logits (1 + later, B, V) after the prompt and after each later token."""
    logits = [model.prefill(tokens[:, :prompt], cache)]
    return torch.stack(logits + [model.decode(token, cache) for token in tokens[:, prompt:].T])


@each(ACTING)
def test_with_a_full_budget_nothing_changes(name, arch, options):
    model, tokens = model_and_tokens(arch, options)
    whole = model.new_cache(*SIZE)
    expected = run(model, tokens, whole)
    for budget in (1.0,) if name in ("dmc", "full") else (1.0, PROMPT + LATER):
        cache = compressed_cache(model, technique(name, budget=budget, **OPTIONS.get(name, {})), *SIZE)
        for _ in range(2 if budget == 1.0 else 1):
            assert_near(run(model, tokens, cache), expected)
            assert cache.nbytes == whole.nbytes
            cache.reset()


@each([case for case in EACH if case not in ACTING])
def test_a_model_on_which_a_technique_cannot_act_is_refused(name, arch, options):
    model, _ = model_and_tokens(arch, options)
    reasons = {"dmc": "merges keys and values of KV heads", "streaming-llm": "moves keys to other positions"}
    reason = f"{TECHNIQUES[name].__name__} .*{reasons.get(name, 'computes the last one.s alone')}"
    if model.attends_itself:
        reason = f"{type(model).__name__} computes attention itself"
    with pytest.raises(ValueError, match=f"^{reason}"):
        compressed_cache(model, technique(name), *SIZE)


@pytest.mark.parametrize("name", TECHNIQUES)
def test_a_full_budget_changes_nothing_after_a_prompt_of_few_tokens(name):
    model, tokens = model_and_tokens()
    for prompt in (1, 2, 5):
        whole, cache = model.new_cache(2, 20), compressed_cache(model, technique(name), 2, 20)
        assert_near(run(model, tokens[:, :20], cache, prompt), run(model, tokens[:, :20], whole, prompt))
        assert cache.nbytes == whole.nbytes
    if name != "dmc":  # a residual longer than the text
        cache = compressed_cache(model, technique(name), 2, 20, quantisation=Quantisation(bits=2, residual=64))
        assert_near(run(model, tokens[:, :20], cache, 5), run(model, tokens[:, :20], model.new_cache(2, 20), 5))


@pytest.mark.parametrize(("name", "budget"), [("snapkv", 0.5), ("streaming-llm", 0.1), ("vatp", 0.5)])
def test_a_prompt_that_is_too_short_for_the_options_leaves_the_cache_as_it_was(name, budget):
    model, tokens = model_and_tokens()
    cache = compressed_cache(model, technique(name, budget=budget), 2, PROMPT)
    with pytest.raises(ValueError, match="budget of"):
        model.prefill(tokens[:, :20], cache)
    assert (cache.length, cache.nbytes) == (0, 0)


def test_a_second_prompt_is_refused_before_anything_is_written():
    model, tokens = model_and_tokens("yoco", VARIANTS["yoco"].examples[0])
    cache = compressed_cache(model, technique("l2-norm", budget=0.5), *SIZE)
    model.prefill(tokens[:, :20], cache)
    window = cache.layers[0].tensors[0].clone()
    with pytest.raises(ValueError, match="takes one token at a time"):
        model.prefill(tokens[:, 20:24], cache)
    assert torch.equal(window, cache.layers[0].tensors[0])


def nbytes_of(layer):
    return layer.state.nbytes if isinstance(layer, State) else sum(tensor.nbytes for tensor in layer.tensors)


@pytest.mark.parametrize("budget", [0.5, 17])
@each(BUDGETED)
def test_a_smaller_budget_holds_what_it_says(name, arch, options, budget):
    model, tokens = model_and_tokens(arch, options)
    cache = compressed_cache(model, technique(name, budget=budget, **OPTIONS.get(name, {})), *SIZE)
    assert run(model, tokens, cache).isfinite().all()
    seen = PROMPT if name == "snapkv" else PROMPT + LATER  # SnapKV decides once; what comes later is kept
    share = (math.ceil(budget * seen) if budget < 1 else budget) + PROMPT + LATER - seen
    layers, expected = dict(zip(cache.layers, model.new_cache(*SIZE).layers, strict=True)), 0
    for layer, full in layers.items():
        cut = type(full) is FullCache and not (name == "l2-norm" and cache.layers.index(layer) < 2)
        expected += nbytes_of(full) * share // (PROMPT + LATER) if cut else nbytes_of(full)
        if cut:
            assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in layer.tensors)
    assert cache.nbytes == expected


@pytest.mark.parametrize("budget", [0.7, 0.4, 17])
@each([case for case in ACTING if case[0] == "fastgen"])
def test_fastgens_heads_together_hold_no_more_of_the_prompt_than_the_budget(name, arch, options, budget):
    model, tokens = model_and_tokens(arch, options)
    kinds = torch.zeros(97, dtype=torch.uint8)
    kinds[:4], kinds[4:8] = SPECIAL, PUNCTUATION
    cache = compressed_cache(model, technique(name, budget=budget, frequent=0.1, local=0.2), *SIZE, kind_V=kinds)
    model.prefill(tokens[:, :PROMPT], cache)
    capacity = math.ceil(budget * PROMPT) if budget < 1 else budget
    for slots in cache.slots:
        assert (slots.count_O.view(2, -1).sum(1) <= capacity * slots.kv_heads).all()
        for owner, positions in enumerate(slots.position_N.split(slots.count_O.tolist())):
            kind = kinds[tokens[owner // slots.kv_heads, :PROMPT]]
            assert {0, *(kind == SPECIAL).nonzero()[:, 0].tolist()} <= set(positions.tolist())
    assert cache.nbytes == sum(map(nbytes_of, dict.fromkeys(cache.layers)))
    assert torch.stack([model.decode(token, cache) for token in tokens[:, PROMPT:].T]).isfinite().all()


def test_a_freed_slot_is_not_read():
    slots = one_layer(technique("h2o", budget=2, recent=0.0), heads=1, sizes=(4, 4))
    append(slots, 0, torch.zeros(1, 1, 3, 4), torch.ones(1, 1, 3, 4))
    slots.score_N += torch.tensor([3.0, 1.0, 2.0])
    slots.tensors[1][1] = math.nan
    slots.evict()
    assert slots.position_N.tolist() == [0, 2]
    append(slots, 3, torch.zeros(1, 1, 1, 4), torch.ones(1, 1, 1, 4))
    assert slots.attend(torch.ones(1, 1, 1, 4), 1.0).isfinite().all()


@pytest.mark.parametrize("rounding", [0.0, 2e-7])
def test_of_slots_of_equal_priority_the_earlier_ones_stay(rounding):
    """Equal up to rounding, too: a token's key has another one at each position."""
    slots = one_layer(technique("l2-norm", budget=3, whole_layers=0), heads=1, sizes=(1, 1))
    norms = torch.tensor([2.0, 1.0, 2.0, 2.0, 1.0, 2.0]) * (1 - rounding * torch.arange(6))
    norms = norms.view(1, 1, 6, 1)
    append(slots, 0, norms, norms)
    slots.evict()
    assert slots.position_N.tolist() == [0, 1, 4]


@pytest.mark.parametrize("counts", [[2, 2, 2], [0, 3, 1], [0, 0, 0]])
@pytest.mark.parametrize("new", [[1, 1, 1], [2, 0, 1]])
def test_ragged_rows_are_joined_padded_and_counted_by_owner(counts, new):
    old_O, new_O = torch.tensor(counts), torch.tensor(new)
    old, more = (torch.randint(9, (sum(each),)) for each in (counts, new))
    rows = [torch.cat(pair) for pair in zip(old.split(counts), more.split(new), strict=True)]
    joined, count_O = ragged.join(old, old_O, more, new_O), old_O + new_O
    assert torch.equal(joined, torch.cat(rows))
    assert torch.equal(ragged.rank(count_O), torch.cat([torch.arange(len(row)) for row in rows]))
    assert torch.equal(ragged.flatten(ragged.pad(joined, count_O), count_O), joined)
    assert ragged.count(joined > 4, count_O).tolist() == [int((row > 4).sum()) for row in rows]


def one_layer(one, heads=2, sizes=(4, 5)):
    options = SimpleNamespace(rotary_dim=sizes[0], rope_base=10_000.0)
    slots = Slots(one, options, Allocator(1, PROMPT + LATER, torch.float32, "cpu"), heads, *sizes)
    slots.layer = 2
    return slots


def append(slots, start, k, v, kinds=None):
    slots.next_kinds_BT = torch.zeros(len(k), k.shape[2]) if kinds is None else kinds[None]
    slots.append(start, k, v)


STEPS = [(0, PROMPT), *((t, t + 1) for t in range(PROMPT, PROMPT + LATER))]


def kept_by(one, q, k, v, kinds=None):
    """Positions that each KV head holds after each step: the prompt, then a token at a time."""
    slots, history = one_layer(one), []
    for start, end in STEPS:
        now = slice(start, end)
        append(slots, start, k[:, :, now], v[:, :, now], None if kinds is None else kinds[now])
        slots.attend(q[:, :, now], q.shape[-1] ** -0.5)
        slots.evict()
        history.append([set(positions.tolist()) for positions in slots.position_N.split(slots.count_O.tolist())])
    return history


def steps_by(keep, q, k, v):
    """The same from the whole matrix of scores: `keep(head, held, weights (R, T, S), tokens seen)` says what stays."""
    scores = torch.einsum("grtd,gsd->grts", q.view(2, 3, *q.shape[2:]), k[0]) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
    held, history = [set(range(PROMPT)) for _ in range(2)], []
    for start, end in STEPS:
        for head in range(2):
            held[head] |= set(range(start, end))
            gone = torch.tensor([s not in held[head] for s in range(scores.shape[-1])])
            weights = scores[head, :, start:end].masked_fill(gone, -math.inf).softmax(-1)
            held[head] = keep(head, held[head], weights, end)
        history.append([set(h) for h in held])
    return history


def best(held, score, count):
    return set(sorted(held, key=lambda s: (-score[s], s))[:count])


def h2o(budget, v, first=0, values=False):
    total = torch.zeros(2, PROMPT + LATER)

    def keep(head, held, weights, seen):
        total[head] += weights.sum((0, 1)) * (v[0, head].abs().sum(-1) if values else 1)
        capacity = math.ceil(budget * seen)
        recent = min(capacity // 2, capacity - min(first, capacity))
        always = {s for s in held if s < first or s >= seen - recent}
        return held if len(held) <= capacity else always | best(held - always, total[head], capacity - len(always))

    return keep


def snapkv(budget, window, kernel):
    def keep(head, held, weights, seen):
        if seen > PROMPT:
            return held
        look = weights[:, PROMPT - window :, : PROMPT - window].sum(1).mean(0)
        half = kernel // 2
        pooled = torch.nn.functional.pad(look, (half, half)).unfold(0, kernel, 1).mean(1)
        recent = set(range(PROMPT - window, PROMPT))
        return recent | best(held - recent, pooled, math.ceil(budget * PROMPT) - window)

    return keep


def streaming(budget, sinks):
    return lambda head, held, weights, seen: {
        s for s in range(seen) if s < sinks or s >= seen - (math.ceil(budget * seen) - sinks)
    }


def l2(budget, k):
    return lambda head, held, weights, seen: best(held, -k[0, head].norm(dim=-1), math.ceil(budget * seen))


def fastgen(kinds, threshold, frequent=0.3, local=0.3):
    total, policy = torch.zeros(2, PROMPT + LATER), {}

    def keep(head, held, weights, seen):
        total[head] += weights.sum((0, 1))
        near = math.ceil(local * seen)
        special = {s for s in held if s == 0 or kinds[s] == SPECIAL}
        punctuation = special | {s for s in held if kinds[s] == PUNCTUATION}
        most = punctuation | best(held, total[head], math.ceil(frequent * seen))
        policies = [special, punctuation, most, most | {s for s in held if s >= seen - near}, held]
        if seen == PROMPT:
            for number in range(5):
                shares = []
                for t in range(seen):
                    kept = most | set(range(t - near + 1, t + 1)) if number == 3 else policies[number]
                    shares.append(weights[:, t, [s for s in kept if s <= t]].sum(1).mean())
                policy.setdefault(head, number) if sum(shares) / seen >= threshold or number == 4 else None
        return policies[policy[head]]

    return keep


def random_qkv(seed, tokens=PROMPT + LATER):
    torch.manual_seed(seed)
    return torch.randn(1, 6, tokens, 4) * 2, torch.randn(1, 2, tokens, 4), torch.randn(1, 2, tokens, 5)


@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.8, 1.0])
def test_fastgen_keeps_what_its_policies_say(threshold):
    for seed in range(3):
        q, k, v = random_qkv(seed)
        kinds = torch.randint(10, (52,)).to(torch.uint8)  # a fifth special or punctuation
        one = technique("fastgen", threshold=threshold)
        assert kept_by(one, q, k, v, kinds) == steps_by(fastgen(kinds, threshold), q, k, v)


def test_fastgens_budget_is_the_highest_threshold_that_it_affords():
    q, k, v = random_qkv(0, PROMPT)

    def count(**options):
        slots = one_layer(technique("fastgen", **options))
        append(slots, 0, k, v)
        slots.attend(q, 0.5)
        slots.evict()
        return int(slots.count_O.sum())

    by_threshold = [count(threshold=n / 100) for n in range(1, 101)]
    assert len(set(by_threshold)) > 3
    for budget in (0.1, 0.3, 0.5, 0.7, 0.9, 1.0):
        affordable = [slots for slots in by_threshold if slots <= math.ceil(budget * 40) * 2]
        assert count(budget=budget) == max(affordable, default=min(by_threshold))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", [name for name in TECHNIQUES if name not in ("fastgen", "dmc")])
def test_each_rule_keeps_what_its_formula_keeps(name, seed):
    q, k, v = random_qkv(seed)
    budget = 1.0 if name == "full" else 0.6
    rules = {
        "full": lambda head, held, weights, seen: held,
        "streaming-llm": streaming(budget, 4),
        "h2o": h2o(budget, v),
        "vatp": h2o(budget, v, first=4, values=True),
        "snapkv": snapkv(budget, 6, 7),
        "l2-norm": l2(budget, k),
    }
    one = technique(name, budget=budget, **OPTIONS.get(name, {}))
    assert kept_by(one, q, k, v) == steps_by(rules[name], q, k, v)


def test_streaming_llms_positions_are_those_within_the_cache():
    """After many tokens the logits are those of the kept tokens alone, put one after the other."""
    model, tokens = make("mha", {}, layers=1), torch.randint(97, (1, 50))
    cache = compressed_cache(model, technique("streaming-llm", budget=16), 1, 64)
    run(model, tokens[:, :49], cache)
    kept = torch.cat((tokens[:, :4], tokens[:, 49 - 12 : 50]), dim=1)
    torch.testing.assert_close(model.decode(tokens[:, 49], cache), model(kept)[:, -1], rtol=1e-4, atol=1e-5)


def test_snapkvs_window_may_be_longer_than_a_budget_that_has_room_for_the_prompt():
    model, tokens = make("mha", {}), torch.randint(97, (2, 40))
    cache = compressed_cache(model, technique("snapkv", budget=28), 2, 64)  # its window is 32
    run(model, tokens[:, :28], cache)
    assert cache.nbytes == 2 * model.kv_stored_bytes(28, torch.float32)
    longer = compressed_cache(model, technique("snapkv", budget=28), 2, 64)
    with pytest.raises(ValueError, match="window=32 is longer than the budget of 28 slots"):
        model.prefill(tokens, longer)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("h2p", {}, "unknown technique 'h2p'; allowed are full, streaming-llm, h2o"),
        ("h2o", {"budget": 0}, "budget=0: must be a share above 0.0 and up to 1.0"),
        ("h2o", {"budget": 1}, r"1.0 \(all tokens\), or a whole number of tokens from 2 on"),
        ("h2o", {"budget": 1.5}, "budget=1.5: must be a share"),
        ("h2o", {"size": 3}, "h2o: unknown option 'size'; allowed: budget, recent"),
        ("h2o", {"recent": 1.0}, "recent=1.0: must be a number of at least 0 and below 1"),
        ("h2o", {"budget": True}, "budget=True: must be a whole number or a number"),
        ("snapkv", {"budget": 0.25}, "window=32 is longer than the budget of 25 slots: give a shorter one"),
        ("snapkv", {"kernel": 4}, "kernel=4: must be odd"),
        ("full", {"budget": 0.5}, "budget=0.5: full keeps everything"),
        ("vatp", {"budget": 20}, "first=20 leave no other token in the budget of 20 slots"),
        ("l2-norm", {"whole_layers": 1.5}, "whole_layers=1.5: must be a whole number of at least 0"),
        ("streaming-llm", {"budget": 4}, "sinks=4 leave no window in the budget of 4 slots: give fewer"),
        ("fastgen", {"threshold": 1.5}, "threshold=1.5: must be a number above 0 and up to 1"),
        ("fastgen", {"threshold": 0.9, "budget": 0.5}, "threshold=0.9 and budget=0.5: give one of them"),
        ("dmc", {"budget": 10}, "budget=10: must be a share, as 0.5 for a compression ratio of 2"),
        ("dmc", {"bits": 4}, "DMC can't be quantised, as its slots change after they are written: leave out bits"),
        ("full", {"bits": 3}, "bits=3: must be one of 8, 4, 2"),
        ("full", {"group": 8}, "group goes with bits: 8, 4 or 2"),
        ("full", {"bits": 4, "residual": -1}, "residual=-1: must be a whole number of at least 0"),
    ],
)
def test_wrong_settings_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        from_settings({"technique": name, **options}, prompt=100)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_are_packed_and_lie_within_half_a_step(bits):
    x = torch.randn(6, 32, 13)
    codes, scale, zero = quantise(x, 1, bits)
    assert ((zero + scale * codes - x).abs() <= scale / 2 + 1e-6).all()
    flat = codes.flatten(0, 1)
    assert torch.equal(unpack(pack(flat, bits), bits, 13), flat)
    assert pack(flat, bits).shape == (6 * 32, -(-13 * bits // 8))
    threes = torch.full((1, 4, 2), 3.0)
    codes, scale, zero = quantise(threes, 1, bits)
    assert torch.equal(zero + scale * codes, threes)


@each([case for case in ACTING if case[0] in ("full", "h2o")])
def test_quantised_caches_hold_packed_codes_and_scales_and_come_near(name, arch, options):
    model, tokens = model_and_tokens(arch, options)
    one = technique(name, budget=1.0 if name == "full" else 30)
    expected, errors = run(model, tokens, compressed_cache(model, one, *SIZE)), []
    for bits in (8, 4, 2):
        quantisation = Quantisation(bits=bits, group=8, residual=10)
        cache = compressed_cache(model, one, *SIZE, quantisation=quantisation)
        errors.append(((run(model, tokens, cache) - expected).norm() / expected.norm()).item())
        held = sum(nbytes_of(layer) for layer in set(cache.layers) - set(cache.slots))
        for slots in cache.slots:
            full_O, packed = slots.count_O - slots.packed_O, int(slots.packed_O.sum())
            assert (full_O < 18).all()
            assert name == "h2o" or (full_O >= 10).all()
            groups, widths = len(slots.key_scales[0]), [tensor.shape[1] for tensor in slots.tensors]
            held += sum(int(full_O.sum()) * 4 * width + packed * -(-width * bits // 8) for width in widths)
            held += groups * 2 * 4 * widths[0] + sum(packed * 2 * 4 * -(-width // 8) for width in widths[1:])
            assert groups * 8 >= packed > 0
        assert cache.nbytes == held
    assert errors[0] < 0.02
    assert errors[0] < errors[2] if name == "h2o" else errors[0] < errors[1] < errors[2]


@pytest.fixture
def merging(monkeypatch):
    """Makes a model of which about half of the random decisions are to merge."""
    monkeypatch.setattr(dmc, "BIAS", 0.0)

    def make(arch="mha", options=None):
        model, tokens = model_and_tokens(arch, options or {})
        return DMC(budget=0.5).retrofit(model), tokens

    return make


each_grouped = pytest.mark.parametrize(("arch", "options"), GROUPED)


@each_grouped
def test_dmcs_cache_gives_what_the_whole_text_at_once_gives(arch, options, merging):
    model, tokens = merging(arch, options)
    cache = compressed_cache(model, DMC(budget=0.5), *SIZE)
    expected = model(tokens)[:, PROMPT - 1 :].transpose(0, 1)
    for _ in range(2):
        assert_near(run(model, tokens, cache), expected)
        counts = torch.stack([slots.count_O for slots in cache.slots])
        assert 0.3 < counts.sum() / counts.numel() / (PROMPT + LATER) < 0.7
        assert cache.nbytes == counts.sum() * 2 * model.options.head_dim * 4
        cache.reset()


@each_grouped
def test_dmc_merges_as_its_formula_says(arch, options, merging):
    """Token by token: a running mean by weight, or a new slot (equations 1 and 2)."""
    model, tokens = merging(arch, options)
    block, chunk = model.blocks[0], model.chunk(20, 0)
    layer, x = block.attention, block.attention_norm(model.embed(tokens[:1, :20]))
    H, G, D = layer.heads, layer.kv_heads, model.options.head_dim
    qk, v = (part[0] for part in split_heads(layer.qkv(x), H + G, G))
    at = lambda x, t: rotate(x[None], chunk.cos[t : t + 1], chunk.sin[t : t + 1])[0]  # noqa: E731
    outs = []
    for head in range(H):
        group, first = head // (H // G), head // (H // G) * (H // G)
        slots, out = [], []
        for t in range(20):
            key, value, weight = qk[H + group, t].clone(), v[group, t], qk[first, t, 0].sigmoid()
            merges, key[0] = key[0] > 0, 0.0
            if merges and slots:
                old, k, u, _ = slots.pop()
                key, value = ((a * old + b * weight) / (old + weight) for a, b in ((k, key), (u, value)))
                weight = old + weight
            slots.append((weight, key, value, t))
            scores = torch.stack([at(qk[head, t], t) @ at(k, place) for _, k, _, place in slots]) / D**0.5
            out.append(scores.softmax(0) @ torch.stack([u for _, _, u, _ in slots]))
        outs.append(torch.stack(out))
    expected = F.linear(torch.cat(outs, dim=1), layer.out.weight)
    torch.testing.assert_close(layer(x, chunk, Uncached())[0], expected, rtol=1e-4, atol=1e-5)


def test_dmcs_relaxed_decisions_go_over_into_the_hard_ones(merging, monkeypatch):
    """Cold and without noise they are the same; the gradient reaches the element that decides."""
    model, tokens = merging("gqa", {"kv_heads": 2})
    hard, D = model(tokens), model.options.head_dim
    monkeypatch.setattr(dmc, "TEMPERATURE", 1e-6)
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.full_like(x, 0.5))
    model.train()
    assert (model(tokens) - hard).abs().max() <= 1e-4 * hard.abs().max()
    monkeypatch.setattr(dmc, "TEMPERATURE", 1.0)
    model(tokens)
    model.blocks[0].attention.merged.backward()
    decides = model.blocks[0].attention.qkv.weight.grad[4 * D :: D][:2]  # the first row of each key head
    assert decides.abs().sum(1).min() > 0


def test_dmcs_training_fades_the_decision_out_and_then_asks_for_more_merging(merging):
    model, tokens = merging()
    one, attention = DMC(budget=0.25), model.blocks[0].attention
    model.train()(tokens)
    merged = torch.stack([block.attention.merged for block in model.blocks]).mean().item()
    for done, attended, target in ((0.0, 1, 0), (0.05, 0.5, 0), (0.4, 0, 0.375), (0.7, 0, 0.75), (1.0, 0, 0.75)):
        one.before_step(model, done)
        assert attention.attended_D[0].item() == pytest.approx(attended)
        assert one.penalty(model, done).item() == pytest.approx(max(0.0, target - merged), abs=1e-6)


def test_dmc_refuses_documents_that_it_would_merge(merging):
    model, tokens = merging()
    with pytest.raises(ValueError, match="train it further without a document mask"):
        model(tokens, torch.zeros_like(tokens))


def test_a_technique_and_a_model_that_do_not_go_together_are_refused(merging):
    plain, (model, _) = model_and_tokens("mha", {})[0], merging()
    trained, whole = "cannot act on a model that was trained further for DMC", {"budget": 0.5, "whole_layers": 4}
    for each, one, quantisation, message in (
        (model, technique("h2o"), None, f"H2O {trained}"),
        (model, technique("full"), None, f"Full {trained}"),
        (model, DMC(), None, f"DMC {trained}"),
        (model, DMC(budget=0.5), Quantisation(), "DMC can't be quantised"),
        (plain, DMC(budget=0.5), None, r"DMC works on models that were trained further for it: DMC\(...\).retrofit"),
        (plain, technique("l2-norm", **whole), None, "L2Norm: whole_layers=4 are all of the model's 4 layers"),
    ):
        with pytest.raises(ValueError, match=message):
            compressed_cache(each, one, 2, 64, quantisation=quantisation)
    with pytest.raises(ValueError, match=r"needs the cache that compressed_cache\(model, DMC"):
        model.prefill(torch.zeros(1, 4, dtype=torch.long), model.new_cache(1, 8))
    assert [type(block.attention) for block in DMC().retrofit(plain).blocks] == [GroupedAttention] * 4  # a full budget
    assert (DMC().is_full, DMC(budget=0.5).is_full) == (True, False)
