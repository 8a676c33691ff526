"""Gated DeltaNet (Yang, Kautz and Hatamizadeh 2025, arXiv 2412.06464) beside a few global layers.

A state S (D, E) of each head is read by queries and corrected by keys (eq. 10): S_t = a_t (I - b_t k_t k_t^T) S_{t-1} +
b_t k_t v_t^T, o_t = S_t^T q_t, with a decay a and a strength b of each token. Queries, keys and values come through a
causal convolution over `conv` tokens, of which the last ones are kept as well. Every `global_every`-th layer is GQA: 3
to 1 in Qwen3-Next. Kimi Linear (arXiv 2510.26692) has MLA there, and a decay of its own for each channel of a key.

Shapes: B batch, T tokens, H heads, D head size (E = D), X channels, W width.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archs.alternating import AlternatingOptions
from archs.cache import State
from archs.decoder import Chunk, Decoder
from archs.delta_rule import delta_chunkwise, delta_step
from archs.grouped import GroupedAttention
from archs.kv import Training
from archs.ops import at_least_fp32, merge_heads, rms_norm, split_heads
from archs.settings import Size


class DeltaOptions(AlternatingOptions):
    conv: Size = 4


class GatedDelta(nn.Module):
    """All but projections is computed in fp32 at least. The state that is kept has the cache's dtype; in bf16 a decay
    by less than about 0.2 % a token is rounded away. The option `gate` adds nothing to its own gate, nor `qk_norm` to
    unit vectors."""

    def __init__(self, o: DeltaOptions):
        super().__init__()
        self.heads, self.size, self.before = o.heads, o.head_dim, o.conv - 1
        self.qkv = nn.Linear(o.width, 3 * o.heads * o.head_dim, bias=False)
        self.gates = nn.Linear(o.width, 2 * o.heads, bias=False)  # decay and strength
        self.z = nn.Linear(o.width, o.heads * o.head_dim, bias=False)
        self.taps = nn.Parameter(torch.empty(3 * o.heads * o.head_dim * o.conv).uniform_(-1, 1) / o.conv**0.5)
        slow = torch.linspace(math.log(1e-3), math.log(0.1), o.heads).exp()
        self.bias = nn.Parameter(slow + (-(-slow).expm1()).log())  # softplus of it is `slow`
        self.log_rate = nn.Parameter(torch.linspace(1, 16, o.heads).log())
        self.norm = nn.Parameter(torch.ones(o.head_dim))
        self.out = nn.Linear(o.heads * o.head_dim, o.width, bias=False)

    def forward(self, x_BTW: Tensor, chunk: Chunk, kv: State | Training | None) -> Tensor:
        kv, document_BT = (None, kv.document_BT) if isinstance(kv, Training) else (kv, None)
        B, T, _ = x_BTW.shape
        a_BHT, b_BHT = at_least_fp32(self.gates(x_BTW)).mT.chunk(2, dim=1)
        x_BTX = at_least_fp32(self.qkv(x_BTW))
        with torch.autocast(x_BTW.device.type, enabled=False):
            rate_H, bias_H = at_least_fp32(self.log_rate).exp(), at_least_fp32(self.bias)
            log_a_BHT = -rate_H[:, None] * F.softplus(a_BHT + bias_H[:, None])
            kept = kv.read() if kv else None
            if kept is None:
                state_BHDE = x_BTX.new_zeros(B, self.heads, self.size, self.size)
                last_BTX = x_BTX.new_zeros(B, self.before, x_BTX.shape[-1])
            else:
                state_BHDE, last_BHYD = kept.to(x_BTX.dtype).split((self.size, 3 * self.before), dim=2)
                last_BTX = last_BHYD.unflatten(2, (3, self.before)).permute(0, 3, 2, 1, 4).flatten(2)
            x_BTX = torch.cat((last_BTX, x_BTX), dim=1)
            q, k, v = split_heads(F.silu(self.convolved(x_BTX, T, document_BT)), *[self.heads] * 3)
            inputs = F.normalize(q, dim=-1) * self.size**-0.5, F.normalize(k, dim=-1), v
            if kept is not None and T == 1:
                state_BHDE = state_BHDE.clone()
                out_BHTE = delta_step(*inputs, log_a_BHT.exp(), b_BHT.sigmoid(), state_BHDE)
            else:
                out_BHTE, state_BHDE = delta_chunkwise(*inputs, log_a_BHT, b_BHT.sigmoid(), state_BHDE, document_BT)
            if kv:
                last_BTX = x_BTX[:, x_BTX.shape[1] - self.before :]
                last_BHYD = last_BTX.unflatten(2, (3, self.heads, -1)).permute(0, 3, 2, 1, 4).flatten(2, 3)
                kv.write(torch.cat((state_BHDE, last_BHYD), dim=2).to(kept.dtype))
            out_BTX = merge_heads(rms_norm(out_BHTE, self.norm.to(out_BHTE.dtype)))
        return self.out(out_BTX.to(x_BTW.dtype) * F.silu(self.z(x_BTW)))

    def convolved(self, x_BTX: Tensor, T: int, document_BT: Tensor | None) -> Tensor:
        """Each channel's own weighted sum over the last tokens; the last T of them, (B, T, X)."""
        taps_XC, out_BTX = self.taps.view(-1, self.before + 1).to(x_BTX.dtype), 0
        for back in range(self.before + 1):
            earlier_BTX = x_BTX[:, self.before - back :][:, :T]
            if document_BT is not None and back:
                same_BT = F.pad(document_BT[:, back:] == document_BT[:, :-back], (min(back, T), 0))[:, :T]
                earlier_BTX = earlier_BTX * same_BT[..., None]
            out_BTX = out_BTX + earlier_BTX * taps_XC[:, self.before - back]
        return out_BTX


class GatedDeltaNet(Decoder):
    """Layers that keep a state, and global layers among them."""

    Options = DeltaOptions
    examples = ({"kv_heads": 2, "global_every": 2, "conv": 3},)

    def layer_attention(self, layer: int) -> nn.Module:
        return GroupedAttention(self.options) if self.options.is_global(layer) else GatedDelta(self.options)

    def new_layers(self, make: Any) -> list:
        o = self.options
        state, full = (o.heads, o.head_dim + 3 * (o.conv - 1), o.head_dim), (o.kv_heads, o.head_dim)
        return [make.full(*full) if o.is_global(layer) else make.state(*state) for layer in range(o.layers)]

    def kv_stored_elements(self, context: int) -> int:
        """2 g d a token in global layers, h d d in each other one, where a convolution keeps 3 h d for a token."""
        o = self.options
        state = o.heads * (o.head_dim + 3 * (o.conv - 1)) * o.head_dim
        return o.over_layers(2 * o.kv_heads * o.head_dim * context, state)

    def decode_score_flops(self, context: float) -> float:
        """Two FLOPs for each element of a state that is asked for its key, corrected and read."""
        o = self.options
        return o.over_layers(4 * o.heads * o.head_dim * context, 6 * o.heads * o.head_dim**2)
