"""Attention against the definition written out: repeated keys, explicit masks, softmax."""

import pytest
import torch
from archs.attention import attend, attend_window, rope_table, rotate


def by_definition(q, k, v, window=None, scale=None):
    H, T, D = q.shape[1:]
    G, S = k.shape[1:3]
    k, v = k.repeat_interleave(H // G, 1), v.repeat_interleave(H // G, 1)
    key = torch.arange(S, device=q.device)
    query = key[S - T :, None]
    seen = key <= query
    if window:
        seen &= key > query - window
    scores = (q @ k.mT * (scale or D**-0.5)).masked_fill(~seen, float("-inf"))
    return scores.softmax(-1) @ v


@pytest.fixture(params=["ours", "torch's"], autouse=True)
def kernel(request, monkeypatch):
    """A prompt's on a CPU."""
    if request.param == "torch's":
        monkeypatch.setattr("archs.attention.takes_causal", lambda *_: False)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize(("T", "S"), [(1, 1), (1, 9), (5, 5), (3, 8), (9, 9), (20, 33)])
def test_attend_is_grouped_causal_attention(heads, T, S):
    H, G = heads
    q, k, v = torch.randn(2, H, T, 8), torch.randn(2, G, S, 8), torch.randn(2, G, S, 6)
    torch.testing.assert_close(attend(q, k, v), by_definition(q, k, v))
    torch.testing.assert_close(attend(q, k, v, scale=0.3), by_definition(q, k, v, scale=0.3))


@pytest.mark.parametrize("window", [1, 2, 5, 8, 31, 64])
@pytest.mark.parametrize(("T", "before"), [(1, 0), (5, 0), (16, 0), (23, 0), (40, 0), (23, 4), (40, 1), (3, 30)])
@pytest.mark.parametrize("G", [4, 1])
def test_window_attention_in_blocks_is_masked_attention(window, T, before, G):
    before = min(before, window - 1)
    q, k, v = torch.randn(2, 4, T, 8), torch.randn(2, G, before + T, 8), torch.randn(2, G, before + T, 8)
    torch.testing.assert_close(attend_window(q, k, v, window), by_definition(q, k, v, window))


def test_window_attention_has_finite_gradients():
    q, k, v = (torch.randn(1, 2, 13, 4, requires_grad=True) for _ in range(3))
    attend_window(q, k, v, 4).square().sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


def test_rotary_scores_depend_on_distance_alone():
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)
    near = rotate(q, rope_table(7, 1, 16, 1e4, "cpu")) @ rotate(k, rope_table(3, 1, 16, 1e4, "cpu")).mT
    far = rotate(q, rope_table(104, 1, 16, 1e4, "cpu")) @ rotate(k, rope_table(100, 1, 16, 1e4, "cpu")).mT
    torch.testing.assert_close(near, far, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(near, q @ k.mT)
