"""Windows, shared layers, tied and grouped latent heads, each against its equations written out token by token.

test_laws.py compares windows with transformers' SmolLM3 and Qwen3, and runs every law over all of them."""

import pytest
import torch
import torch.nn.functional as F
from helpers import cached_logits, make

from archs.delta_rule import delta_chunkwise, delta_step
from archs.kv import Training
from archs.ops import frequencies, rope_table, rotate

TOKENS, W, H, D = 11, 64, 4, 16


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
        ("gla", {"kv_rank": 16, "rope_dim": 6, "nope_dim": 10, "v_dim": 14}, 2),
        ("delta", {"kv_heads": 1, "global_every": 3, "conv": 1, "qk_norm": True, "gate": True}, 4),
        ("cla", {"kv_heads": 1, "share": 2, "own_layers": 3, "gate": True}, 6),
        ("windowed", {"kv_heads": 1, "window": 5, "global_every": 3}, 6),
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
        ("gla", {"kv_rank": 24, "rope_dim": 8}, 2, 2 * (2 * 24 + 8), 2 * (2 * 24 + 8)),
    ],
)
def test_bytes_are_those_of_the_papers(arch, options, layers, stored, read):
    model = make(arch, options, layers=layers)
    assert model.kv_bytes_per_token(torch.float32) == 4 * stored
    assert model.kv_read_bytes(10**6 + 1, torch.float32) - model.kv_read_bytes(10**6, torch.float32) == 4 * read


@pytest.mark.parametrize(
    ("arch", "options", "message"),
    [
        ("windowed", {"kv_heads": 2, "global_every": 3}, "windowed: global_every=3: must be at most layers=2"),
        ("windowed", {"kv_heads": 3}, "windowed: kv_heads=3 must divide heads=4"),
        ("cla", {"kv_heads": 2, "share": 3}, "cla: share=3: must be at most layers=2"),
        ("cla", {"kv_heads": 2, "own_layers": 3}, "cla: own_layers=3: must be at most layers=2"),
        ("gta", {"kv_heads": 2, "head_dim": 2}, "gta: head_dim=2: must be at least 4, half of it is rotated"),
        ("gla", {"kv_rank": 8, "rope_dim": 4, "latent_heads": 3}, "gla: latent_heads=3 must divide heads=4"),
    ],
)
def test_impossible_options_are_refused(arch, options, message):
    with pytest.raises(ValueError, match=message):
        make(arch, options)
