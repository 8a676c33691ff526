"""YOCO, you only cache once (Sun et al. 2024, arXiv 2405.05254): one K/V for the whole upper half of the model.

The first half of the layers, the self-decoder, has attention of constant memory: a sliding window (`swa`) or gated
retention (`gret`). Its output gives one K and one V, which all layers of the second half, the cross-decoder, read: they
own only queries and output projections. Prefill needs the cross-decoder for the last position alone (early exit), as
nothing of it is cached.

Shapes: B batch, T tokens, H heads, G KV heads, D head size, W width; N chunks of C tokens.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archs.attention import Rope, attend, attend_window, last, merge_heads, rotate, split_heads, wide
from archs.cache import Cache, FullCache, StateCache, WindowCache
from archs.cpu.building import takes, transformed
from archs.cpu.layers import fade, retention, takes_retention
from archs.decoder import Decoder, Linear, Options, RMSNorm, kv_heads_divide, mean_seen, normed, option
from archs.graph import graphs_decode
from archs.grouped import GroupedAttention

DECAY_TEMPERATURE = 16  # tau of the paper's equation for gamma
CHUNK = 64


@dataclass(kw_only=True)
class YOCOOptions(Options):
    kv_heads: int = option()
    self_decoder: Literal["swa", "gret"] = option("swa")
    window: int = option(1024)  # of swa: tokens that a token sees, itself included

    def derive(self) -> None:
        kv_heads_divide(self)
        self.check(self.layers % 2 == 0, f"layers={self.layers}: must be even, half of them are the self-decoder")


class WindowAttention(GroupedAttention):
    """Grouped attention in which a token sees itself and the window - 1 tokens before it."""

    def __init__(self, width: int, heads: int, kv_heads: int, head_dim: int, window: int):
        super().__init__(width, heads, kv_heads, head_dim)
        self.window = window

    def attend(
        self, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, cache: WindowCache | None = None, start: int | Tensor = 0
    ) -> Tensor:
        if cache is None:
            return attend_window(q_BHTD, k_BGTD, v_BGTD, self.window)
        if q_BHTD.shape[2] == 1:
            (k, v), seen = cache.append(start, k_BGTD, v_BGTD)
            return attend(q_BHTD, k, v, seen=seen)
        before = cache.recent(start, self.window - 1)
        cache.append(start, k_BGTD, v_BGTD)
        k, v = (torch.cat((old, new.to(old.dtype)), 2) for old, new in zip(before, (k_BGTD, v_BGTD), strict=True))
        return attend_window(q_BHTD, k, v, self.window)


def retention_chunkwise(
    q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, log_decay_BHT: Tensor, state_BHDD: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """Gated retention over T tokens from a state: (outputs (B, H, T, D), the state after them).

    Within a chunk the parallel form, ((Q K^T) * decay mask) V, of all chunks at once; between chunks the state. With
    chunk >= T it is the parallel form alone.
    """
    T = q_BHTD.shape[2]
    C = min(chunk, T)
    tail = -T % C  # of zeros, which leave the state as it is
    q, k, v = (F.pad(x, (0, 0, 0, tail)).unflatten(2, (-1, C)) for x in (q_BHTD, k_BHTD, v_BHTD))
    total_BHNC = F.pad(log_decay_BHT, (0, tail)).unflatten(2, (-1, C)).cumsum(-1)
    whole_BHN = total_BHNC[..., -1:]
    scores_BHNCC = q @ k.mT
    if takes(scores_BHNCC, q, k, total_BHNC):
        fade(scores_BHNCC, q.contiguous(), k.contiguous(), total_BHNC.contiguous())
        out_BHNCD = scores_BHNCC @ v
    else:
        not_before = torch.ones(C, C, dtype=torch.bool, device=q.device).triu()
        decay_BHNCC = (total_BHNC[..., :, None] - total_BHNC[..., None, :]).masked_fill(not_before, float("-inf")).exp()
        out_BHNCD = (scores_BHNCC * decay_BHNCC) @ v + own(q, k) * v
    added_BHNDD = (k * (whole_BHN - total_BHNC).exp()[..., None]).mT @ v
    states = [state_BHDD]
    for added_BHDD, fade_BH11 in zip(added_BHNDD.unbind(2), whole_BHN.exp()[..., None].unbind(2), strict=True):
        states.append(fade_BH11 * states[-1] + added_BHDD)
    out_BHNCD = out_BHNCD + (q * total_BHNC.exp()[..., None]) @ torch.stack(states[:-1], dim=2)
    return out_BHNCD.flatten(2, 3)[:, :, :T], states[-1]


def retention_recurrent(
    q_BH1D: Tensor, k_BH1D: Tensor, v_BH1D: Tensor, log_decay_BH1: Tensor, state_BHDD: Tensor
) -> Tensor:
    """One token: S_n = gamma_n S_{n-1} + K_n^T V_n, output Q_n S_n (B, H, 1, D); S_n replaces S_{n-1} in its storage,
    in its dtype."""
    decay_BH1 = log_decay_BH1.exp()
    inputs = q_BH1D, k_BH1D, v_BH1D, decay_BH1, state_BHDD
    if isinstance(state_BHDD, Tensor):
        if takes_retention(*inputs):
            return retention(*inputs)
        if retains_on_device(*inputs):
            from archs.retention import retain  # which imports Triton

            return retain(*inputs)
    state = wide(state_BHDD) * decay_BH1[..., None]
    state_BHDD.copy_(state + k_BH1D.mT @ v_BH1D)
    return q_BH1D @ state + own(q_BH1D, k_BH1D) * v_BH1D


def retains_on_device(q_BH1D: Tensor, k_BH1D: Tensor, v_BH1D: Tensor, decay_BH1: Tensor, state_BHDD: Tensor) -> bool:
    """Whether Triton's kernel takes these: on a GPU, fp32 but for the state, and no gradient wanted."""
    if not state_BHDD.is_cuda or torch.compiler.is_compiling() or transformed():
        return False
    inputs = q_BH1D, k_BH1D, v_BH1D, decay_BH1
    fits = all(x.dtype == torch.float32 for x in inputs) and all(x.stride(3) == 1 for x in inputs[:3])
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    return fits and not learns and state_BHDD.is_contiguous() and graphs_decode(state_BHDD.device)


def own(q: Tensor, k: Tensor) -> Tensor:
    """Q_n K_n^T of each token, (..., 1), summed in fp64.

    Of a sequence's first token it is all there is: the norm makes an output of full size of however small a sum, and
    would of its rounding, too.
    """
    return (q.double() * k.double()).sum(-1, keepdim=True).to(q.dtype)


class GatedRetention(nn.Module):
    """Retention with a data-dependent decay a head, gamma = sigmoid(x W_gamma)^(1/16), normed a head and swish-gated.

    Computed in fp32 at least, whatever the model's precision: products of many decays lose their tails in bf16. The
    cached state has the cache's dtype: in bf16 decode stays within about 1 % of the full forward.
    """

    def __init__(self, width: int, heads: int, head_dim: int):
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.qkvg = Linear(width, 4 * heads * head_dim)
        self.decay = Linear(width, heads)
        self.out = Linear(heads * head_dim, width)

    def forward(self, x_BTW: Tensor, rope: Rope, cache: StateCache | None = None, start: int | Tensor = 0) -> Tensor:
        qk_BXTD, v_BHTD, gate_BHTD = split_heads(self.qkvg(x_BTW), 2 * self.heads, self.heads, self.heads)
        log_decay_BHT = F.logsigmoid(wide(self.decay(x_BTW))).transpose(1, 2) / DECAY_TEMPERATURE
        with torch.autocast(x_BTW.device.type, enabled=False):
            q_BHTD, k_BHTD = rotate(wide(qk_BXTD), rope).chunk(2, dim=1)
            k_BHTD = k_BHTD * self.head_dim**-0.5
            inputs = q_BHTD, k_BHTD, wide(v_BHTD), log_decay_BHT
            if cache and x_BTW.shape[1] == 1:
                out_BHTD = retention_recurrent(*inputs, cache.state)
            else:
                none = q_BHTD.new_zeros(x_BTW.shape[0], self.heads, self.head_dim, self.head_dim)
                state = wide(cache.state) if cache else none
                out_BHTD, state = retention_chunkwise(*inputs, state, CHUNK)
                if cache:
                    cache.state.copy_(state)
            out_BHTD = normed(out_BHTD)
        return self.out(merge_heads(out_BHTD.to(gate_BHTD.dtype) * F.silu(gate_BHTD)))


class SharedKV(nn.Module):
    """The one K and V of the cross-decoder, from the self-decoder's normed output; rotary positions applied once."""

    def __init__(self, width: int, kv_heads: int, head_dim: int):
        super().__init__()
        self.kv_heads = kv_heads
        self.norm = RMSNorm(width)
        self.kv = Linear(width, 2 * kv_heads * head_dim)

    def forward(self, x_BTW: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        k_BGTD, v_BGTD = split_heads(self.kv(self.norm(x_BTW)), self.kv_heads, self.kv_heads)
        return rotate(k_BGTD, rope), v_BGTD


class CrossAttention(nn.Module):
    """Queries of its own against the shared keys and values."""

    def __init__(self, width: int, heads: int, head_dim: int):
        super().__init__()
        self.heads = heads
        self.q = Linear(width, heads * head_dim)
        self.out = Linear(heads * head_dim, width)

    def forward(self, x_BTW: Tensor, rope: Rope, k_BGSD: Tensor, v_BGSD: Tensor, seen: Tensor | None = None) -> Tensor:
        (q_BHTD,) = split_heads(self.q(x_BTW), self.heads)
        return self.out(merge_heads(attend(rotate(q_BHTD, rope), k_BGSD, v_BGSD, seen=seen)))


class YOCO(Decoder):
    """Self-decoder of constant memory, cross-decoder on one shared K/V."""

    Options = YOCOOptions
    early_exit = True
    examples = (
        {"kv_heads": 4, "self_decoder": "swa", "window": 7},
        {"kv_heads": 2, "self_decoder": "gret"},
    )

    def layer_attention(self, layer: int) -> nn.Module:
        o = self.options
        if layer >= o.layers // 2:
            return CrossAttention(o.width, o.heads, o.head_dim)
        if o.self_decoder == "swa":
            return WindowAttention(o.width, o.heads, o.kv_heads, o.head_dim, o.window)
        return GatedRetention(o.width, o.heads, o.head_dim)

    def add_modules(self) -> None:
        self.shared_kv = SharedKV(self.options.width, self.options.kv_heads, self.options.head_dim)

    def new_parts(self, batch_size: int, max_tokens: int, dtype, device) -> list:
        """One part for each self-decoder layer, then the shared K/V."""
        o = self.options
        if o.self_decoder == "swa":
            args = batch_size, max_tokens, o.window, o.kv_heads, o.head_dim, dtype, device
            parts = [WindowCache(*args) for _ in range(o.layers // 2)]
        else:
            parts = [StateCache(batch_size, o.heads, o.head_dim, dtype, device) for _ in range(o.layers // 2)]
        return [*parts, FullCache(batch_size, max_tokens, [(o.kv_heads, o.head_dim)] * 2, dtype, device)]

    def hidden(self, x_BTW: Tensor, cache: Cache | None = None, start: int | Tensor = 0) -> Tensor:
        """Of the last position alone when there is a cache (early exit)."""
        rope, seen = self.rope(x_BTW, start), None
        half = self.options.layers // 2
        for layer, block in enumerate(self.blocks[:half]):
            x_BTW = block(x_BTW, rope, cache.parts[layer], start) if cache else block(x_BTW, rope)
        k_BGSD, v_BGSD = self.shared_kv(x_BTW, rope)
        if cache:
            (k_BGSD, v_BGSD), seen = cache.parts[half].append(start, k_BGSD, v_BGSD)
            x_BTW, rope = x_BTW[:, -1:], last(rope)
        for block in self.blocks[half:]:
            x_BTW = block(x_BTW, rope, k_BGSD, v_BGSD, seen)
        return x_BTW

    def kv_elements_per_token(self) -> int:
        """2 g d, once for all cross-decoder layers."""
        return 2 * self.options.kv_heads * self.options.head_dim

    def kv_constant_elements(self) -> int:
        return self._self_decoder_elements(self.options.window)

    def kv_stored_elements(self, context: int) -> int:
        return self.kv_elements_per_token() * context + self._self_decoder_elements(context)

    def kv_read_elements(self, context: int) -> int:
        """The shared K/V is stored once and read by every cross-decoder layer."""
        half = self.options.layers // 2
        return half * self.kv_elements_per_token() * context + self._self_decoder_elements(context)

    def _self_decoder_elements(self, context: int) -> int:
        """A window's 2 g d min(context, window) a layer, or a state's h d d."""
        o = self.options
        held = 2 * o.kv_heads * min(context, o.window) if o.self_decoder == "swa" else o.heads * o.head_dim
        return o.layers // 2 * o.head_dim * held

    def score_flops(self, context: int) -> float:
        """Retention in the recurrent form: two FLOPs for writing and two for reading each element of the state."""
        return self._score_flops(mean_seen(context), mean_seen(context, self.options.window))

    def decode_score_flops(self, context: float) -> float:
        return self._score_flops(context, min(context, self.options.window))

    def _score_flops(self, seen: float, seen_in_window: float) -> float:
        o = self.options
        self_decoder = seen_in_window if o.self_decoder == "swa" else o.head_dim
        return 4 * o.heads * o.head_dim * (o.layers // 2) * (seen + self_decoder)
