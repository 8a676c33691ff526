"""Windows, shared layers, tied and grouped latent heads, each against its equations written out token by token.

test_laws.py compares windows with transformers' SmolLM3 and Qwen3, and runs every law over all of them."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import cached_logits, make

from archs.delta_rule import delta_chunkwise, delta_step
from archs.kv import Training, Uncached
from archs.ops import frequencies, rope_table, rotate
from archs.paged import PagedCache
from archs.techniques import compressed_cache, technique

TOKENS, W, H, D = 11, 64, 4, 16
NEIGHBOURS = [
    ("tpa", {}),
    ("dsa", {"kv_rank": 8, "rope_dim": 4, "index_topk": 30}),
    ("translution", {}),
    ("windowed", {"kv_heads": 2, "global_every": 2, "sinks": True}),
    ("delta", {"kv_heads": 2, "global_every": 2}),
    ("yoco", {"kv_heads": 2, "self_decoder": "gret"}),
]


def turned(x_TD, dim):
    """Each row rotated by its position."""
    return rotate(x_TD, *rope_table(torch.arange(len(x_TD)), frequencies(dim, 10_000.0, torch.device("cpu"))))


def attended(q_TD, k_TD, v_TE, scale):
    rows = []
    for t in range(len(q_TD)):
        weights = (k_TD[: t + 1] @ q_TD[t] * scale).softmax(0)
        rows.append(weights @ v_TE[: t + 1])
    return torch.stack(rows)


def of(arch, options, x_TW):
    """(the attention of a first layer, what it makes of normed inputs)."""
    model = make(arch, options)
    attention, chunk = model.blocks[0].attention, model.chunk(len(x_TW), 0)
    return attention, attention(x_TW[None], chunk, model.new_layers(Training())[0])[0]


@torch.no_grad()
def test_tied_keys_are_values_seen_from_the_query():
    """A value that comes from s tokens back is turned back by s."""
    x_TW = torch.randn(TOKENS, W)
    attention, got = of("gqa", {"kv_heads": 2, "tied_kv": True}, x_TW)
    q, k = (x_TW @ attention.qk.weight.T).split([H * D, 2 * D], dim=1)
    heads = []
    for h in range(H):
        q_TD, k_TD, rows = turned(q[:, h * D :][:, :D], D), k[:, h // 2 * D :][:, :D], []
        for t in range(TOKENS):
            weights = (turned(k_TD, D)[: t + 1] @ q_TD[t] * D**-0.5).softmax(0)
            back = rope_table(torch.arange(t + 1) - t, frequencies(D, 10_000.0, torch.device("cpu")))
            rows.append(weights @ rotate(k_TD[: t + 1], *back))
        heads.append(torch.stack(rows))
    torch.testing.assert_close(got, torch.cat(heads, 1) @ attention.out.weight.T, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_gta_is_its_equations(groups):
    x_TW = torch.randn(TOKENS, W)
    attention, got = of("gta", {"kv_heads": groups}, x_TW)
    tied, k_rope = (x_TW @ attention.kv.weight.T).split([groups * D, D // 2], dim=1)
    q = x_TW @ attention.q.weight.T
    heads = []
    for h in range(H):
        q_TD, own = q[:, h * D :][:, :D], tied[:, h * groups // H * D :][:, :D]
        key = torch.cat((own[:, : D // 2], turned(k_rope, D // 2)), 1)
        query = torch.cat((q_TD[:, : D // 2], turned(q_TD[:, D // 2 :], D // 2)), 1)
        heads.append(attended(query, key, own, D**-0.5))
    torch.testing.assert_close(got, torch.cat(heads, 1) @ attention.out.weight.T, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_gla_is_its_equations_and_mla_with_one_latent(groups):
    x_TW, R, P = torch.randn(TOKENS, W), 12, 6
    attention, got = of("gla", {"kv_rank": R, "rope_dim": P, "latent_heads": groups}, x_TW)
    latents, k_rope = (x_TW @ attention.kv_down.weight.T).split([groups * R, P], dim=1)
    q = x_TW @ attention.q_up.weight.T
    heads = []
    for h in range(H):
        latent = latents[:, h * groups // H * R :][:, :R]
        latent = latent / (latent.square().mean(1, keepdim=True) + 1e-6).sqrt() * attention.kv_norm.weight
        made = latent @ attention.kv_up.weight.view(H, 2 * D, R)[h].T
        q_TX = q[:, h * (D + P) :][:, : D + P]
        query = torch.cat((q_TX[:, :D], turned(q_TX[:, D:], P)), 1)
        heads.append(attended(query, torch.cat((made[:, :D], turned(k_rope, P)), 1), made[:, D:], (D + P) ** -0.5))
    torch.testing.assert_close(got, torch.cat(heads, 1) @ attention.out.weight.T, rtol=1e-4, atol=1e-4)
    if groups == 1:
        gla, mla = (
            make("gla", {"kv_rank": R, "rope_dim": P, "latent_heads": 1}),
            make("mla", {"kv_rank": R, "rope_dim": P}),
        )
        mla.load_state_dict(gla.state_dict())
        tokens = torch.randint(97, (2, TOKENS))
        torch.testing.assert_close(gla(tokens), mla(tokens), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, 1], ids=["window", "global"])
def test_sinks_are_those_of_gpt_oss(layer):
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    x_BTW, window, groups = torch.randn(2, TOKENS, W), 4, 2
    model = make("windowed", {"kv_heads": groups, "window": window, "global_every": 2, "sinks": True})
    attention = model.blocks[layer].attention
    attention.sinks.normal_()
    got = attention(x_BTW, model.chunk(TOKENS, 0), model.new_layers(Training())[layer])
    heads = (x_BTW @ attention.qkv.weight.T).view(2, TOKENS, -1, D).transpose(1, 2).split([H, groups, groups], 1)
    table = rope_table(torch.arange(TOKENS), frequencies(D, 10_000.0, torch.device("cpu")))
    q, k, v = rotate(heads[0], *table), rotate(heads[1], *table), heads[2]
    visible = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    visible &= visible.triu(1 - window) if layer == 0 else True
    mask = torch.zeros(1, 1, TOKENS, TOKENS).masked_fill(~visible, -torch.inf)
    module = SimpleNamespace(num_key_value_groups=H // groups, sinks=attention.sinks, training=False)
    out, _ = eager_attention_forward(module, q, k, v, mask, D**-0.5)
    torch.testing.assert_close(got, out.flatten(2) @ attention.out.weight.T, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("q_rank", "k_rank", "v_rank"), [(6, 2, 2), (1, 1, 3)])
def test_tpa_is_its_equations(q_rank, k_rank, v_rank):
    x_TW = torch.randn(TOKENS, W)
    attention, got = of("tpa", {"q_rank": q_rank, "k_rank": k_rank, "v_rank": v_rank}, x_TW)
    made = []
    for over_heads, over_sizes, ranks in (
        (attention.q_heads, attention.q, [q_rank]),
        (attention.kv_heads, attention.kv, [k_rank, v_rank]),
    ):
        a = (x_TW @ over_heads.weight.T).view(TOKENS, -1, H).split(ranks, dim=1)
        b = (x_TW @ over_sizes.weight.T).view(TOKENS, -1, D).split(ranks, dim=1)
        made += [torch.einsum("trh,trd->thd", *factors) / R for *factors, R in zip(a, b, ranks, strict=True)]
    q, k, v = made
    heads = [attended(turned(q[:, h], D), turned(k[:, h], D), v[:, h], D**-0.5) for h in range(H)]
    torch.testing.assert_close(got, torch.cat(heads, 1) @ attention.out.weight.T, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_translution_is_its_equations():
    x_TW, X = torch.randn(TOKENS, W), 8
    attention, got = of("translution", {"offset_dim": X}, x_TW)
    q, k, v = (x_TW @ attention.qkv.weight.T).split(H * D, dim=1)
    short, heads = x_TW @ attention.short.weight.T, []
    for h in range(H):
        q_TD, k_TD, v_TD = (x[:, h * D :][:, :D] for x in (q, k, v))
        rows = []
        for t in range(TOKENS):
            weights = (k_TD[: t + 1] @ q_TD[t] * D**-0.5).softmax(0)
            moved = torch.stack([short[s] @ attention.of_offset[t - s] for s in range(t + 1)])
            rows.append((weights @ v_TD[: t + 1], weights @ moved[:, h * X // H :][:, : X // H]))
        heads.append([torch.stack(part) for part in zip(*rows, strict=True)])
    plain, own = (torch.cat(part, 1) for part in zip(*heads, strict=True))
    expected = (plain + own @ attention.long.weight.T) / 2 @ attention.out.weight.T
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_translution_beyond_its_context_has_the_last_matrix():
    model, tokens = make("translution", {}, layers=1, context=4), torch.randint(97, (2, TOKENS))
    longer = make("translution", {}, layers=1, context=TOKENS)
    weights = model.state_dict()
    matrices = weights["blocks.0.attention.of_offset"]
    weights["blocks.0.attention.of_offset"] = torch.cat((matrices, matrices[-1:].expand(TOKENS - 4, -1, -1)))
    longer.load_state_dict(weights)
    torch.testing.assert_close(model(tokens), longer(tokens), rtol=1e-4, atol=1e-5)
    got = cached_logits(model, tokens, [6], model.new_cache(2, TOKENS))
    torch.testing.assert_close(got[TOKENS - 1], model(tokens)[:, -1], rtol=1e-4, atol=1e-5)


def dsa_and_mla(**options):
    """With the same weights besides the indexer's."""
    shape = {"kv_rank": 16, "rope_dim": 8, "q_rank": 20}
    dsa, mla = make("dsa", shape | {"index_heads": 8, "index_dim": 12} | options), make("mla", shape)
    mla.load_state_dict(dsa.state_dict(), strict=False)
    return dsa, mla


@torch.no_grad()
def test_dsa_is_mla_on_the_tokens_of_the_highest_scores():
    """test_laws.py compares it with transformers' DeepSeek-V3.2."""
    tokens, kept = torch.randint(97, (1, TOKENS)), 4
    dsa, mla = dsa_and_mla(index_topk=TOKENS)
    torch.testing.assert_close(dsa(tokens), mla(tokens), rtol=1e-4, atol=1e-4)
    dsa, mla = dsa_and_mla(index_topk=kept)
    x_TW, chunk = torch.randn(TOKENS, W), dsa.chunk(TOKENS, 0)
    attention, same = dsa.blocks[0].attention, mla.blocks[0].attention
    got = attention(x_TW[None], chunk, dsa.new_layers(Training())[0])[0]
    index, rope = attention.indexer, attention.o.rope_dim
    q = same.q_norm(same.q_down(x_TW)) @ index.q.weight.T
    k = index.k_norm(x_TW @ index.k.weight.T)
    k = torch.cat((turned(k[:, :rope], rope), k[:, rope:]), 1)
    scores = torch.zeros(TOKENS, TOKENS)
    for j in range(8):
        own = q[:, j * 12 :][:, :12]
        own = torch.cat((turned(own[:, :rope], rope), own[:, rope:]), 1)
        scores += (x_TW @ index.weights.weight[j])[:, None] * (own @ k.T).relu()
    for t in range(TOKENS):
        chosen = scores[t, : t + 1].topk(min(kept, t + 1)).indices
        mask = torch.zeros(1, 1, TOKENS, TOKENS, dtype=torch.bool)
        mask[..., chosen] = True
        row = same(x_TW[None], chunk, Uncached(mask=mask, value_size=16))[0, t]
        torch.testing.assert_close(got[t], row, rtol=1e-4, atol=1e-4)


def test_the_indexer_alone_learns_from_its_loss():
    tokens = torch.randint(97, (3, 30))
    model, _ = dsa_and_mla(index_topk=5)
    grads = []
    for of_loss in (False, True):
        model.train().zero_grad(set_to_none=True)
        loss = model(tokens).logsumexp(-1).mean()
        (model.own_loss() if of_loss else loss).backward()
        grads.append({name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0})
    names = {name for name, _ in model.named_parameters()}
    assert grads[1] == {name for name in names if ".indexer." in name} == names - grads[0]


def test_what_the_indexer_learns_is_where_the_heads_look():
    """Its loss is the divergence that PyTorch computes, and after some steps it selects more of attention's weight."""
    model, _ = dsa_and_mla(index_topk=5, dense_tokens=10**6)
    model.train().begin_step(0)
    x_BTW, attention = torch.randn(4, 30, W), model.blocks[0].attention
    losses = []

    def listen(score_BTS, q_BHTD, made):
        p = (q_BHTD @ made.k.mT * attention.scale).masked_fill(~made.mask, -torch.inf).softmax(-1).mean(1)
        log_index = score_BTS.masked_fill(~made.mask[:, 0], -torch.inf).log_softmax(-1)
        rows = [F.kl_div(log_index[:, t, : t + 1], p[:, t, : t + 1], reduction="batchmean") for t in range(30)]
        loss = type(attention).divergence(attention, score_BTS, q_BHTD, made)
        torch.testing.assert_close(loss, 120 * torch.stack(rows).mean(), rtol=1e-4, atol=1e-4)
        losses.append((loss.item(), p.gather(2, score_BTS.topk(5).indices).sum(-1).mean().item()))
        return loss

    attention.divergence = listen
    optimizer = torch.optim.Adam(attention.indexer.parameters(), lr=3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        attention(x_BTW, model.chunk(30, 0), model.new_layers(Training())[0])
        attention.loss.backward()
        optimizer.step()
    (first, before), (last, after) = losses[0], losses[-1]
    assert last < 0.8 * first
    assert after > before


def test_a_model_in_training_can_be_copied():
    model, tokens = make("dsa", {"kv_rank": 16, "rope_dim": 8}).train(), torch.randint(97, (2, 9))
    model(tokens)
    again = copy.deepcopy(model)
    assert torch.equal(again(tokens), model(tokens))


def test_training_begins_with_attention_to_everything():
    tokens = torch.randint(97, (2, 30))
    dsa, mla = dsa_and_mla(index_topk=5, dense_tokens=120)
    dsa.train()
    near = []
    for seen in (0, 60, 120):
        dsa.begin_step(seen)
        near.append(torch.allclose(dsa(tokens), mla(tokens), rtol=1e-4, atol=1e-4))
    dsa.begin_step(0)
    near.append(torch.allclose(dsa.eval()(tokens), mla(tokens), rtol=1e-4, atol=1e-4))
    assert near == [True, True, False, False]


@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("TPA", {}),
        ("DSA", {"kv_rank": 8, "rope_dim": 4}),
        ("Translution", {}),
    ],
)
def test_a_variant_that_computes_attention_itself_has_no_technique_and_no_blocks(arch, options):
    model = make(arch.lower(), options)
    for name in ("full", "h2o"):
        with pytest.raises(ValueError, match=f"{arch} computes attention itself, on the whole cache"):
            compressed_cache(model, technique(name), 1, 9)
    cache = PagedCache(model, 1, 4)
    with pytest.raises(ValueError, match=f"{arch} computes attention itself, and not on tokens in blocks"):
        cache.batch([cache.admit()])


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 31, 32, 33, 100])
def test_chunks_of_the_delta_rule_are_its_steps_and_those_of_qwen3_next(length):
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

    q, k = (F.normalize(torch.randn(2, H, length, 8, dtype=torch.float64), dim=-1) for _ in range(2))
    v, state = torch.randn(2, H, length, 12, dtype=torch.float64), torch.randn(2, H, 8, 12, dtype=torch.float64)
    log_a, b = -torch.rand(2, H, length, dtype=torch.float64), torch.rand(2, H, length, dtype=torch.float64)
    out, last = delta_chunkwise(q, k, v, log_a, b, state)
    steps, stepped = [], state.clone()
    for t in range(length):
        one = (x[:, :, t : t + 1] for x in (q, k, v, log_a.exp(), b))
        steps.append(delta_step(*one, stepped))
    torch.testing.assert_close(out, torch.cat(steps, 2), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(last, stepped, rtol=1e-9, atol=1e-9)
    theirs = [x.transpose(1, 2).float() for x in (q * 8**0.5, k, v, log_a, b)]  # it scales queries
    expected, theirs_last = torch_recurrent_gated_delta_rule(*theirs, state.float(), output_final_state=True)
    torch.testing.assert_close(out.float(), expected.transpose(1, 2), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last.float(), theirs_last, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_layer_above_asks_for_the_keys_of_the_layer_below():
    model, tokens = make("cla", {"kv_heads": 2, "share": 3}, layers=3), torch.randint(97, (2, TOKENS))
    gqa = make("gqa", {"kv_heads": 2}, layers=3)
    gqa.load_state_dict(model.state_dict(), strict=False)
    seen = {}
    gqa.blocks[0].attention_norm.register_forward_hook(lambda _, __, out: seen.setdefault("input", out))
    for block, ours in zip(gqa.blocks[1:], model.blocks[1:], strict=True):
        attention, kv = block.attention, gqa.blocks[0].attention.qkv.weight[H * D :]
        attention.qkv.weight.copy_(torch.cat((ours.attention.q.weight, kv)))

        def both(x_BTW, chunk, cache, attention=attention):
            """Queries from this layer's input, keys and values from the first one's."""
            first = F.linear(seen["input"], attention.qkv.weight)
            own = F.linear(x_BTW, attention.qkv.weight)
            mixed = torch.cat((own[..., : H * D], first[..., H * D :]), -1)
            attention.qkv.forward = lambda _: mixed
            return type(attention).forward(attention, x_BTW, chunk, cache)

        attention.forward = both
    torch.testing.assert_close(model(tokens), gqa(tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arch", "options", "layers"),
    [
        ("gta", {"kv_heads": 4, "gate": True}, 2),
        ("tpa", {}, 2),
        ("translution", {"offset_dim": 4, "qk_norm": True}, 2),
        ("dsa", {"kv_rank": 12, "rope_dim": 4, "index_topk": 15, "index_dim": 4, "qk_norm": True, "gate": True}, 2),
        ("windowed", {"kv_heads": 4, "window": 9, "global_every": 2, "qk_norm": True, "gate": True}, 2),
        ("dsa", {"kv_rank": 16, "rope_dim": 6, "nope_dim": 10, "v_dim": 14, "index_topk": 50}, 2),
        ("gla", {"kv_rank": 16, "rope_dim": 6, "nope_dim": 10, "v_dim": 14}, 2),
        ("delta", {"kv_heads": 1, "global_every": 3, "conv": 1, "qk_norm": True, "gate": True}, 4),
        ("cla", {"kv_heads": 1, "share": 2, "own_layers": 3, "gate": True}, 6),
        ("windowed", {"kv_heads": 1, "window": 5, "global_every": 3}, 6),
        ("windowed", {"kv_heads": 4, "window": 5, "global_every": 2, "sinks": True, "nope": True, "qk_norm": True}, 4),
    ],
)
def test_cached_logits_are_those_of_the_full_forward_with_other_options(arch, options, layers):
    """test_laws.py has the variants' examples."""
    model, tokens = make(arch, options, layers=layers), torch.randint(97, (2, 41))
    got = cached_logits(model, tokens, [9, 1, 4], model.new_cache(2, 41))
    with torch.no_grad():
        expected = model(tokens)
    for t, logits in got.items():
        torch.testing.assert_close(logits, expected[:, t], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arch", "options", "layers", "stored", "read"),
    [  # elements a token of heads of 16
        ("windowed", {"kv_heads": 2, "window": 4, "global_every": 3}, 6, 2 * 2 * 2 * 16, 2 * 2 * 2 * 16),
        ("cla", {"kv_heads": 1}, 6, 3 * 2 * 16, 6 * 2 * 16),
        ("cla", {"kv_heads": 1, "share": 1, "own_layers": 2}, 6, 2 * 2 * 16, 6 * 2 * 16),
        ("gqa", {"kv_heads": 2, "tied_kv": True}, 2, 2 * 2 * 16, 2 * 2 * 16),
        ("delta", {"kv_heads": 2, "global_every": 3}, 6, 2 * 2 * 2 * 16, 2 * 2 * 2 * 16),
        ("gta", {"kv_heads": 2}, 2, 2 * (2 * 16 + 8), 2 * (2 * 16 + 8)),
        ("translution", {"offset_dim": 8}, 2, 2 * (2 * 4 * 16 + 8), 2 * (2 * 4 * 16 + 8)),
        ("tpa", {"k_rank": 2, "v_rank": 3}, 2, 2 * 5 * (4 + 16), 2 * 5 * (4 + 16)),
        ("dsa", {"kv_rank": 24, "rope_dim": 8, "index_dim": 12}, 2, 2 * (24 + 8 + 12), 2 * 12),
        ("gla", {"kv_rank": 24, "rope_dim": 8}, 2, 2 * (2 * 24 + 8), 2 * (2 * 24 + 8)),
    ],
)
def test_bytes_are_those_of_the_papers(arch, options, layers, stored, read):
    model = make(arch, options, layers=layers)
    assert model.kv_bytes_per_token(torch.float32) == 4 * stored
    assert model.kv_read_bytes(10**6 + 1, torch.float32) - model.kv_read_bytes(10**6, torch.float32) == 4 * read


def test_a_step_reads_what_an_index_selects_and_the_matrices_of_offsets():
    dsa = make("dsa", {"kv_rank": 24, "rope_dim": 8, "index_dim": 12, "index_topk": 100})
    assert [dsa.kv_read_elements(tokens) for tokens in (50, 300)] == [2 * 44 * 50, 2 * (32 * 100 + 12 * 300)]
    model = make("translution", {"offset_dim": 8})
    plain = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert [model.weights_read(tokens) - plain for tokens in (10, 900)] == [2 * 64 * 10, 2 * 64 * 64]


@torch.no_grad()
@pytest.mark.parametrize(("weights", "kept"), [(64, 32), (64, 16), (32, 64), (16, 32)])
@pytest.mark.parametrize(("arch", "options"), NEIGHBOURS)
def test_cache_and_weights_of_other_dtypes(arch, options, weights, kept):
    dtypes = {16: torch.bfloat16, 32: torch.float32, 64: torch.float64}
    model, tokens = make(arch, options).to(dtypes[weights]), torch.randint(97, (2, 20))
    got = cached_logits(model, tokens, [9], model.new_cache(2, 20, dtypes[kept]))
    expected, near = model(tokens)[:, -1], 0.1 if 16 in (weights, kept) else 1e-4
    assert (got[19] - expected).abs().max() <= near * expected.abs().max()


@pytest.mark.parametrize(
    ("arch", "options", "message"),
    [
        ("windowed", {"kv_heads": 2, "global_every": 3}, "windowed: global_every=3: must be at most layers=2"),
        ("windowed", {"kv_heads": 3}, "windowed: kv_heads=3 must divide heads=4"),
        ("cla", {"kv_heads": 2, "share": 3}, "cla: share=3: must be at most layers=2"),
        ("cla", {"kv_heads": 2, "own_layers": 3}, "cla: own_layers=3: must be at most layers=2"),
        ("translution", {"offset_dim": 6}, "translution: offset_dim=6 must be a multiple of heads=4"),
        (
            "mla",
            {"kv_rank": 8, "rope_dim": 4, "latent_std": 1e39},
            "latent_std=1e.39: must be a number above 0 and up to 1",
        ),
        ("gta", {"kv_heads": 2, "head_dim": 2}, "gta: head_dim=2: must be at least 4, half of it is rotated"),
        (
            "dsa",
            {"kv_rank": 8, "rope_dim": 4, "index_dim": 2},
            "dsa: index_dim=2 must be at least rope_dim=4, which is",
        ),
        ("gla", {"kv_rank": 8, "rope_dim": 4, "latent_heads": 3}, "gla: latent_heads=3 must divide heads=4"),
    ],
)
def test_impossible_options_are_refused(arch, options, message):
    with pytest.raises(ValueError, match=message):
        make(arch, options)
