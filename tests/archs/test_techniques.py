"""Techniques on a trained cache: a full budget changes nothing, a smaller one holds what it says, and each rule keeps
the slots that its paper's formula keeps."""

import math

import pytest
import torch
from archs.attention import rotate, split_heads

from archs import VARIANTS, build
from archs.cache import FullCache
from archs.techniques import TECHNIQUES, Quantisation, Slots, compressed_cache, dmc, technique
from archs.techniques.dmc import DMC, merging
from archs.techniques.fastgen import PUNCTUATION, SPECIAL
from archs.techniques.quantised import pack, quantise, unpack

SHAPE = {"vocab_size": 61, "width": 48, "layers": 4, "heads": 4, "context": 64}
CASES = [(arch, own) for arch, variant in VARIANTS.items() for own in variant.examples]
PROMPT, LATER = 40, 12
OWN = {"snapkv": {"window": 6}, "vatp": {"first": 4}}


def random_model(arch, own):
    torch.manual_seed(0)
    model = build(arch, **SHAPE, **own).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    return model, torch.randint(61, (2, PROMPT + LATER))


def run(model, tokens, cache):
    logits = [model.prefill(tokens[:, :PROMPT], cache)]
    return torch.stack(logits + [model.decode(token, cache) for token in tokens[:, PROMPT:].T])


def works_on(name, model):
    return not (TECHNIQUES[name].observes and model.early_exit)


@pytest.mark.parametrize("name", TECHNIQUES)
@pytest.mark.parametrize(("arch", "own"), CASES)
def test_with_a_full_budget_nothing_changes(arch, own, name):
    model, tokens = random_model(arch, own)
    for budget in (1.0,) if name in ("dmc", "full") else (1.0, PROMPT + LATER):
        one = technique(name, budget=budget, **OWN.get(name, {}))
        if not works_on(name, model):
            with pytest.raises(ValueError, match="computes the last one's alone"):
                compressed_cache(model, one, 2, PROMPT + LATER)
            continue
        cache, whole = compressed_cache(model, one, 2, PROMPT + LATER), model.new_cache(2, PROMPT + LATER)
        expected = run(model, tokens, whole)
        for _ in range(2 if budget == 1.0 else 1):
            assert (run(model, tokens, cache) - expected).abs().max() <= 1e-5 * expected.abs().max()
            assert cache.nbytes == whole.nbytes
            cache.reset()


@pytest.mark.parametrize("prompt", [1, 2, 5])
@pytest.mark.parametrize("name", TECHNIQUES)
def test_nor_does_it_with_a_prompt_of_few_tokens(name, prompt):
    model, tokens = random_model("gqa", {"kv_heads": 2})
    whole, cache = model.new_cache(2, 20), compressed_cache(model, technique(name), 2, 20)
    for one in (whole, cache):
        logits = [model.prefill(tokens[:, :prompt], one)]
        one.logits = torch.stack(logits + [model.decode(token, one) for token in tokens[:, prompt:20].T])
    assert (whole.logits - cache.logits).abs().max() <= 1e-5 * whole.logits.abs().max()
    assert cache.nbytes == whole.nbytes


@pytest.mark.parametrize(("name", "budget"), [("snapkv", 0.5), ("streaming-llm", 0.1), ("vatp", 0.5)])
def test_a_prompt_that_is_too_short_for_the_options_leaves_the_cache_as_it_was(name, budget):
    model, tokens = random_model("mha", {})
    cache = compressed_cache(model, technique(name, budget=budget), 2, PROMPT)
    with pytest.raises(ValueError, match="budget of"):
        model.prefill(tokens[:, :20], cache)
    assert (cache.length, cache.nbytes) == (0, 0)


@pytest.mark.parametrize("budget", [0.5, 17])
@pytest.mark.parametrize("name", [name for name in TECHNIQUES if name not in ("full", "fastgen", "dmc")])
@pytest.mark.parametrize(("arch", "own"), CASES)
def test_a_smaller_budget_holds_what_it_says(arch, own, name, budget):
    model, tokens = random_model(arch, own)
    if not works_on(name, model):
        return
    one = technique(name, budget=budget, **OWN.get(name, {}))
    cache, whole = compressed_cache(model, one, 2, PROMPT + LATER), model.new_cache(2, PROMPT + LATER)
    for logits in (run(model, tokens, cache), run(model, tokens, whole)):
        assert logits.isfinite().all()
    share = math.ceil(budget * (PROMPT + LATER)) if budget < 1 else budget
    if name == "snapkv":  # decides once; what comes later is kept
        share = (math.ceil(budget * PROMPT) if budget < 1 else budget) + LATER
    expected = 0
    for n, (part, full) in enumerate(zip(cache.parts, whole.parts, strict=True)):
        held = sum(stream.nbytes for stream in getattr(full, "streams", [])) or full.state.nbytes
        kept = isinstance(full, FullCache) and not (name == "l2-norm" and n < 2)
        expected += held * share // (PROMPT + LATER) if kept else held
        if isinstance(part, Slots):
            assert {stream.untyped_storage().nbytes() for stream in part.streams} == {
                stream.nbytes for stream in part.streams
            }
    assert cache.nbytes == expected


@pytest.mark.parametrize("budget", [0.7, 0.4, 17])
@pytest.mark.parametrize(("arch", "own"), CASES)
def test_fastgens_heads_together_hold_no_more_of_the_prompt_than_the_budget(arch, own, budget):
    model, tokens = random_model(arch, own)
    one = technique("fastgen", budget=budget, frequent=0.1, local=0.2)
    if not works_on("fastgen", model):
        return
    kinds = torch.zeros(61, dtype=torch.uint8)
    kinds[:4], kinds[4:8] = SPECIAL, PUNCTUATION
    cache = compressed_cache(model, one, 2, PROMPT + LATER, kind_V=kinds)
    model.prefill(tokens[:, :PROMPT], cache)
    capacity = math.ceil(budget * PROMPT) if budget < 1 else budget
    for slots in cache.slots:
        held_B = slots.count_O.view(2, -1).sum(1)
        assert (held_B <= capacity * slots.kv_heads).all()
        for owner, held in enumerate(slots.position_N.split(slots.count_O.tolist())):
            kind = kinds[tokens[owner // slots.kv_heads, :PROMPT]]
            assert {0, *(kind == SPECIAL).nonzero()[:, 0].tolist()} <= set(held.tolist())
    assert cache.nbytes == sum(s.numel() * s.element_size() for slots in cache.slots for s in slots.streams)
    logits = torch.stack([model.decode(token, cache) for token in tokens[:, PROMPT:].T])
    assert logits.isfinite().all()


def test_what_was_let_go_is_not_read():
    slots = one_layer(technique("h2o", budget=2, recent=0.0), heads=1, sizes=(4, 4))
    slots.append(0, torch.zeros(1, 1, 3, 4), torch.ones(1, 1, 3, 4))
    slots.score_N += torch.tensor([3.0, 1.0, 2.0])
    slots.streams[1][1] = math.nan
    assert not slots.attend(torch.ones(1, 1, 1, 4), None, None).isfinite().all()
    slots.score_N[:] = torch.tensor([3.0, 1.0, 2.0])
    slots.evict(prompt=True)
    assert slots.position_N.tolist() == [0, 2]
    assert slots.attend(torch.ones(1, 1, 1, 4), None, None).isfinite().all()


# The rules, against what the papers say, on full attention matrices


def one_layer(one, heads=2, sizes=(4, 5)):
    whole = FullCache(1, 64, [(heads, size) for size in sizes], torch.float32, "meta")
    return Slots(one, 2, whole, (sizes[0], 10_000.0), "cpu")


def kept_by(one, q, k, v, kinds=None):
    """Positions that each KV head holds after each step: the prompt, then a token at a time."""
    slots, history = one_layer(one), []
    for start, end in [(0, PROMPT), *((t, t + 1) for t in range(PROMPT, PROMPT + LATER))]:
        slots.coming_BT = None if kinds is None else kinds[None, start:end]
        slots.append(start, k[:, :, start:end], v[:, :, start:end])
        slots.attend(q[:, :, start:end], None, None)
        slots.evict(prompt=not start)
        history.append([set(held.tolist()) for held in slots.position_N.split(slots.count_O.tolist())])
    return history


def steps_by(keep, q, k, v):
    """The same from the whole matrix of scores: `keep(head, held, weights (R, T, S), tokens seen)` says what stays."""
    scores = torch.einsum("grtd,gsd->grts", q.view(2, 3, *q.shape[2:]), k[0]) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
    held, history = [set(range(PROMPT)) for _ in range(2)], []
    for start, end in [(0, PROMPT), *((t, t + 1) for t in range(PROMPT, PROMPT + LATER))]:
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
        padded = torch.cat((torch.zeros(half), look, torch.zeros(half)))
        pooled = torch.stack([padded[n : n + kernel].mean() for n in range(len(look))])
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
                of_query = [
                    most | set(range(t - near + 1, t + 1)) if number == 3 else policies[number] for t in range(seen)
                ]
                shares = [weights[:, t, [s for s in kept if s <= t]].sum(1).mean() for t, kept in enumerate(of_query)]
                policy.setdefault(head, number) if sum(shares) / seen >= threshold or number == 4 else None
        return policies[policy[head]]

    return keep


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.8, 1.0])
def test_fastgen_keeps_what_its_policies_say(threshold, seed):
    torch.manual_seed(seed)
    q, k, v = torch.randn(1, 6, 52, 4) * 2, torch.randn(1, 2, 52, 4), torch.randn(1, 2, 52, 5)
    kinds = torch.randint(10, (52,)).to(torch.uint8)  # a fifth special or punctuation
    one = technique("fastgen", threshold=threshold)
    assert kept_by(one, q, k, v, kinds) == steps_by(fastgen(kinds, threshold), q, k, v)


def test_fastgens_budget_is_the_highest_threshold_that_it_affords():
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 6, 40, 4) * 2, torch.randn(1, 2, 40, 4), torch.randn(1, 2, 40, 5)

    def held(**options):
        slots = one_layer(technique("fastgen", **options))
        slots.append(0, k, v)
        slots.attend(q, None, None)
        slots.evict(prompt=True)
        return int(slots.count_O.sum())

    by_threshold = [held(threshold=n / 100) for n in range(1, 101)]
    assert len(set(by_threshold)) > 3
    for budget in (0.1, 0.3, 0.5, 0.7, 0.9, 1.0):
        affordable = [slots for slots in by_threshold if slots <= math.ceil(budget * 40) * 2]
        assert held(budget=budget) == max(affordable, default=min(by_threshold))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", [name for name in TECHNIQUES if name not in ("fastgen", "dmc")])
def test_each_rule_keeps_what_its_formula_keeps(name, seed):
    torch.manual_seed(seed)
    q, k, v = torch.randn(1, 6, 52, 4) * 2, torch.randn(1, 2, 52, 4), torch.randn(1, 2, 52, 5)
    budget = 0.6
    rules = {
        "full": lambda head, held, weights, seen: held,
        "streaming-llm": streaming(budget, 4),
        "h2o": h2o(budget, v),
        "vatp": h2o(budget, v, first=4, values=True),
        "snapkv": snapkv(budget, 6, 7),
        "l2-norm": l2(budget, k),
    }
    one = technique(name, **({} if name == "full" else {"budget": budget}), **OWN.get(name, {}))
    assert kept_by(one, q, k, v) == steps_by(rules[name], q, k, v)


def test_streaming_llms_positions_are_those_within_the_cache():
    """After many tokens the logits are those of the kept tokens alone, put one after the other."""
    model, _ = random_model("mha", {})
    model = build("mha", **SHAPE | {"layers": 1}).eval()
    tokens = torch.randint(61, (1, 50))
    cache = compressed_cache(model, technique("streaming-llm", budget=16), 1, 64)
    model.prefill(tokens[:, :40], cache)
    for token in tokens[:, 40:49].T:
        model.decode(token, cache)
    kept = torch.cat((tokens[:, :4], tokens[:, 49 - 12 : 50]), dim=1)
    torch.testing.assert_close(model.decode(tokens[:, 49], cache), model(kept)[:, -1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("h2p", {}, "unknown technique 'h2p'; allowed are full, streaming-llm, h2o"),
        ("h2o", {"budget": 0}, "budget=0: must be a share above 0.0 and up to 1.0, or 1 token or more"),
        ("h2o", {"budget": 1.5}, "budget=1.5: must be a share"),
        ("h2o", {"size": 3}, "h2o: unknown option 'size'; allowed are budget, recent"),
        ("h2o", {"recent": 1.0}, "recent=1.0: must be a share of the budget"),
        ("snapkv", {"budget": 16}, "window=32 is longer than the budget of 16 slots: give a shorter one"),
        ("h2o", {"budget": "half"}, "budget='half': must be a number"),
        ("h2o", {"budget": True}, "budget=True: must be a number"),
        ("snapkv", {"window": None}, "window=None: must be a whole number"),
        ("full", {"budget": 0.5}, "budget=0.5: full keeps everything"),
        ("vatp", {"budget": 20}, "first=20 leave no other token in the budget of 20 slots"),
        ("l2-norm", {"whole_layers": -1}, "whole_layers=-1: must be at least 0"),
        ("l2-norm", {"whole_layers": 1.5}, "whole_layers=1.5: must be a whole number"),
        ("snapkv", {"kernel": 4}, "the kernel odd"),
        ("streaming-llm", {"budget": 4}, "sinks=4 leave no window in the budget of 4 slots: give fewer"),
        ("streaming-llm", {"sinks": 1.5}, "sinks=1.5: must be a whole number"),
        ("fastgen", {"threshold": 1.5}, "threshold=1.5: must be a share"),
        ("fastgen", {"threshold": 0.9, "budget": 0.5}, "threshold=0.9 and budget=0.5: give one of them"),
        ("dmc", {"budget": 10}, "budget=10: must be a share, as 0.5 for a compression ratio of 2"),
        ("dmc", {"train_tokens": 0.5}, "train_tokens=0.5: must be a whole number"),
    ],
)
def test_bad_options_are_named(name, options, says):
    with pytest.raises(ValueError, match=says):
        technique(name, **options)


# Quantised


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_are_packed_and_lie_within_half_a_step(bits):
    x = torch.randn(6, 32, 13)
    codes, scale, zero = quantise(x, 1, bits)
    assert ((zero + scale * codes - x).abs() <= scale / 2 + 1e-6).all()
    flat = codes.flatten(0, 1)
    assert torch.equal(unpack(pack(flat, bits), bits, 13), flat)
    assert pack(flat, bits).shape == (6 * 32, -(-13 * bits // 8))
    constant, scale, zero = quantise(torch.full((1, 4, 2), 3.0), 1, bits)
    assert torch.equal(zero + scale * constant, torch.full((1, 4, 2), 3.0))


@pytest.mark.parametrize("name", ["full", "h2o"])
@pytest.mark.parametrize(("arch", "own"), CASES)
def test_quantised_caches_hold_packed_codes_and_scales_and_come_near(arch, own, name):
    model, tokens = random_model(arch, own)
    one = technique(name, **({} if name == "full" else {"budget": 30}))
    if not works_on(name, model):
        return
    expected = run(model, tokens, compressed_cache(model, one, 2, PROMPT + LATER))
    errors = {}
    for bits in (8, 2) if name == "h2o" else (8, 4, 2):
        cache = compressed_cache(model, one, 2, PROMPT + LATER, quantisation=Quantisation(bits, group=8, residual=10))
        logits = run(model, tokens, cache)
        errors[bits] = ((logits - expected).norm() / expected.norm()).item()
        held = 0
        for part in cache.parts:
            if not isinstance(part, Slots):
                held += sum(stream.nbytes for stream in getattr(part, "streams", [])) or part.state.nbytes
                continue
            full_O = torch.bincount(part.owner_N[~part.packed_N], minlength=len(part.count_O))
            assert (full_O >= torch.minimum(part.count_O, torch.tensor(10))).all() or name != "full"
            assert (full_O < 18).all()
            packed, groups = int(part.packed_N.sum()), int(part.group_Q.max()) + 1 if len(part.group_Q) else 0
            widths = [stream.shape[1] for stream in part.streams]
            held += sum(int(full_O.sum()) * 4 * width + packed * -(-width * bits // 8) for width in widths)
            held += groups * 2 * 4 * widths[0] + sum(packed * 2 * 4 * -(-width // 8) for width in widths[1:])
            assert groups * 8 >= packed > 0
        assert cache.nbytes == held
    assert errors[8] < errors.get(4, 1) < errors[2] if name == "full" else errors[8] < errors[2]
    assert errors[8] < 0.02


def test_a_residual_longer_than_the_text_leaves_everything_as_it_is():
    model, tokens = random_model("gqa", {"kv_heads": 2})
    cache = compressed_cache(model, technique("full"), 2, PROMPT + LATER, quantisation=Quantisation(2, 32, 64))
    expected = run(model, tokens, model.new_cache(2, PROMPT + LATER))
    assert (run(model, tokens, cache) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"bits": 3}, "bits=3: must be 8, 4 or 2"),
        ({"bits": 4.0}, "bits=4.0: must be 8, 4 or 2"),
        ({"group": 0}, "group=0"),
        ({"residual": -1}, "residual=-1"),
    ],
)
def test_bad_quantisation_is_named(options, says):
    with pytest.raises(ValueError, match=says):
        Quantisation(**options)


# DMC


def merging_model(arch, own, monkeypatch):
    monkeypatch.setattr(dmc, "BIAS", 0.0)  # half of the random decisions are to merge
    model, tokens = random_model(arch, own)
    return merging(model), tokens


GROUPED = [(arch, own) for arch, own in CASES if arch in ("mha", "mqa", "gqa")]


@pytest.mark.parametrize(("arch", "own"), GROUPED)
def test_dmcs_cache_gives_what_the_whole_text_at_once_gives(arch, own, monkeypatch):
    model, tokens = merging_model(arch, own, monkeypatch)
    cache = compressed_cache(model, DMC(0.5), 2, PROMPT + LATER)
    whole = model(tokens)
    expected = whole[:, PROMPT - 1 :].transpose(0, 1)
    for _ in range(2):
        assert (run(model, tokens, cache) - expected).abs().max() <= 1e-5 * expected.abs().max()
        counts = torch.stack([slots.count_O for slots in cache.slots])
        assert 0.3 < counts.sum() / counts.numel() / (PROMPT + LATER) < 0.7
        assert cache.nbytes == counts.sum() * 2 * model.options.head_dim * 4
        cache.reset()


@pytest.mark.parametrize(("arch", "own"), GROUPED)
def test_dmc_merges_as_its_formula_says(arch, own, monkeypatch):
    """Token by token: a running mean by weight, or a new slot (equations 1 and 2)."""
    model, tokens = merging_model(arch, own, monkeypatch)
    tokens = tokens[:1, :20]
    layer, x = model.blocks[0].attention, model.blocks[0].attention_norm(model.embed(tokens))
    rope = model.rope(x, 0)
    H, G, D = layer.heads, layer.kv_heads, model.options.head_dim
    qk, v = (part[0] for part in split_heads(layer.qkv(x), H + G, G))
    outs = []
    for head in range(H):
        group, first = head // (H // G), head // (H // G) * (H // G)
        slots, out = [], []
        for t in range(tokens.shape[1]):
            key, value, weight = qk[H + group, t].clone(), v[group, t], qk[first, t, 0].sigmoid()
            merges, key[0] = key[0] > 0, 0.0
            if merges and slots:
                old, k, u, _ = slots.pop()
                key, value = ((a * old + b * weight) / (old + weight) for a, b in ((k, key), (u, value)))
                weight = old + weight
            slots.append((weight, key, value, t))
            at = lambda x, t: rotate(x[None, None, None], (rope[0][t : t + 1], rope[1][t : t + 1]))[0, 0, 0]  # noqa: E731
            scores = torch.stack([at(qk[head, t], t) @ at(k, place) for _, k, _, place in slots]) / D**0.5
            out.append(scores.softmax(0) @ torch.stack([u for _, _, u, _ in slots]))
        outs.append(torch.stack(out))
    expected = layer.out(torch.cat(outs, dim=1))
    torch.testing.assert_close(layer(x, rope)[0], expected, rtol=1e-4, atol=1e-5)


def test_dmcs_relaxed_decisions_go_over_into_the_hard_ones(monkeypatch):
    """Cold and without noise they are the same; the gradient reaches the element that decides."""
    model, tokens = merging_model("gqa", {"kv_heads": 2}, monkeypatch)
    hard = model(tokens)
    monkeypatch.setattr(dmc, "TEMPERATURE", 1e-4)
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.full_like(x, 0.5))
    model.train()
    assert (model(tokens) - hard).abs().max() <= 1e-4 * hard.abs().max()
    monkeypatch.setattr(dmc, "TEMPERATURE", 1.0)
    model(tokens)
    model.blocks[0].attention.merged.backward()
    decides = model.blocks[0].attention.qkv.weight.grad[4 * 12 :: 12][:2]  # the first row of each key head
    assert decides.abs().sum(1).min() > 0


def test_what_dmc_does_not_go_with_is_named(monkeypatch):
    model, _ = merging_model("mha", {}, monkeypatch)
    for one, quantisation, says in (
        (technique("h2o"), None, "models that were trained to merge, which no other technique does"),
        (DMC(0.5), Quantisation(), "a cache that merges can't be quantised"),
    ):
        with pytest.raises(ValueError, match=says):
            compressed_cache(model, one, 2, 64, quantisation=quantisation)
    with pytest.raises(ValueError, match="models that were trained to merge"):
        compressed_cache(random_model("mha", {})[0], DMC(0.5), 2, 64)
    with pytest.raises(ValueError, match=r"needs the cache that compressed_cache\(model, DMC"):
        model.prefill(torch.zeros(1, 4, dtype=torch.long), model.new_cache(1, 8))
    with pytest.raises(ValueError, match="whole_layers=4 are all of the 4 that the model has"):
        compressed_cache(random_model("mha", {})[0], technique("l2-norm", budget=0.5, whole_layers=4), 2, 64)
    with pytest.raises(ValueError, match="MLA has none"):
        merging(random_model("mla", VARIANTS["mla"].examples[0])[0])
