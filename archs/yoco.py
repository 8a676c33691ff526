"""YOCO, you only cache once (Sun et al. 2024, arXiv 2405.05254): one K/V for the whole upper half of the model.

The first half of the layers, the self-decoder, has attention of constant memory: a sliding window (`swa`) or gated
retention (`gret`). Its output gives one K and one V, which all layers of the second half, the cross-decoder, read: they
have only queries and output projections. Prefill needs the cross-decoder for the last position alone (early exit), as
nothing of it is cached.

Shapes: B batch, T tokens, H heads, G KV heads, D head size, W width; N chunks of C tokens.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archs.cache import Cache, State
from archs.costs import mean_seen
from archs.decoder import Chunk, Decoder, RMSNorm, head_norm
from archs.grouped import CrossAttention, GroupedAttention, GroupedOptions
from archs.kv import KV, Training
from archs.ops import at_least_fp32, merge_heads, retention_step, rms_norm, self_score, split_heads
from archs.settings import Size

DECAY_TEMPERATURE = 16  # tau in the paper's equation for gamma
CHUNK = 32


class YOCOOptions(GroupedOptions):
    self_decoder: Literal["swa", "gret"] = "swa"
    window: Size = 1024  # of swa: how many tokens a token sees, itself included

    def complete(self) -> None:
        super().complete()
        self.check(self.layers % 2 == 0, f"layers={self.layers}: must be even, half of them are the self-decoder")


def retention_chunkwise(
    q_BHTD: Tensor,
    k_BHTD: Tensor,
    v_BHTD: Tensor,
    log_decay_BHT: Tensor,
    state_BHDD: Tensor,
    chunk: int,
    document_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gated retention over T tokens from a state: (outputs (B, H, T, D), the state after them).

    Within a chunk it is the parallel form, ((Q K^T) * decay mask) V, for all chunks at once; between chunks the state.
    With chunk >= T it is the parallel form alone. At the first token of a document the decay is 0, and the state that
    is given belongs to the first document.
    """
    T = q_BHTD.shape[2]
    C = min(chunk, T)
    tail = -T % C  # zeros, which leave the state as it is
    inputs = q_BHTD, k_BHTD, v_BHTD, log_decay_BHT[..., None]
    if tail:
        inputs = [F.pad(x, (0, 0, 0, tail)) for x in inputs]
    q, k, v, log_decay = (x.unflatten(2, (-1, C)) for x in inputs)
    total_BHNC = log_decay[..., 0].cumsum(-1)
    whole_BHN1 = total_BHNC[..., -1:]
    not_before = torch.ones(C, C, dtype=torch.bool, device=q.device).triu()
    decay_BHNCC = total_BHNC[..., :, None] - total_BHNC[..., None, :]
    to_end_BHNC = whole_BHN1 - total_BHNC
    if document_BT is not None:  # masks, as sums of -inf have no differences
        padded = torch.arange(T + tail, device=q.device).clamp(max=T - 1)
        document_B1NC = document_BT[:, None, padded].unflatten(2, (-1, C))
        last_B1N1 = document_B1NC[..., -1:]
        before_B1N1 = torch.cat((document_B1NC[:, :, :1, :1], last_B1N1[:, :, :-1]), dim=2)
        not_before = not_before | (document_B1NC[..., :, None] != document_B1NC[..., None, :])
        to_end_BHNC = to_end_BHNC.masked_fill(document_B1NC != last_B1N1, float("-inf"))
        total_BHNC = total_BHNC.masked_fill(document_B1NC != before_B1N1, float("-inf"))
        whole_BHN1 = total_BHNC[..., -1:]
    decay_BHNCC = decay_BHNCC.masked_fill_(not_before, float("-inf")).exp_()  # in place: the largest tensors here
    out_BHNCD = (q @ k.mT).mul_(decay_BHNCC) @ v + self_score(q, k) * v
    added_BHNDD = (k * to_end_BHNC.exp()[..., None]).mT @ v
    states = [state_BHDD]
    for added_BHDD, fade_BH11 in zip(added_BHNDD.unbind(2), whole_BHN1.exp()[..., None].unbind(2), strict=True):
        states.append(fade_BH11 * states[-1] + added_BHDD)
    out_BHNCD = out_BHNCD + (q * total_BHNC.exp()[..., None]) @ torch.stack(states[:-1], dim=2)
    return out_BHNCD.flatten(2, 3)[:, :, :T], states[-1]


class GatedRetention(nn.Module):
    """Retention with a data-dependent decay a head, gamma = sigmoid(x W_gamma)^(1/16), normed a head and swish-gated.

    Computed in fp32 at least, whatever the model's precision: products of many decays lose their tails in bf16. The
    cached state has the cache's dtype. In bf16, where each step rounds it, decode differs from the full forward by
    about 0.1 % with initial weights, and by 1 to 4 % with weights four times as large. The option `gate` adds nothing
    to its own gate.
    """

    def __init__(self, o: YOCOOptions):
        super().__init__()
        self.heads, self.head_dim = o.heads, o.head_dim
        self.qkvg = nn.Linear(o.width, 4 * o.heads * o.head_dim, bias=False)
        self.qk_norm = head_norm(o, o.head_dim, o.heads, o.heads)
        self.decay = nn.Linear(o.width, o.heads, bias=False)
        self.out = nn.Linear(o.heads * o.head_dim, o.width, bias=False)

    def forward(self, x_BTW: Tensor, chunk: Chunk, kv: State | Training | None) -> Tensor:
        kv, document_BT = (None, kv.document_BT) if isinstance(kv, Training) else (kv, None)
        qk_BXTD, v_BHTD, gate_BHTD = split_heads(self.qkvg(x_BTW), 2 * self.heads, self.heads, self.heads)
        log_decay_BHT = F.logsigmoid(at_least_fp32(self.decay(x_BTW))).transpose(1, 2) / DECAY_TEMPERATURE
        with torch.autocast(x_BTW.device.type, enabled=False):
            q_BHTD, k_BHTD = chunk.rotate(at_least_fp32(self.qk_norm(qk_BXTD))).chunk(2, dim=1)
            inputs = q_BHTD, k_BHTD * self.head_dim**-0.5, at_least_fp32(v_BHTD)
            state = kv.read() if kv else None
            if state is not None and x_BTW.shape[1] == 1:
                out_BHTD = retention_step(*inputs, log_decay_BHT.exp(), state)
            else:
                if state is None:
                    state = q_BHTD.new_zeros(len(x_BTW), self.heads, self.head_dim, self.head_dim)
                inputs = *inputs, log_decay_BHT, state.to(q_BHTD.dtype)
                out_BHTD, state = retention_chunkwise(*inputs, CHUNK, document_BT)
            if kv:
                kv.write(state)
            out_BHTD = rms_norm(out_BHTD)
        return self.out(merge_heads(out_BHTD.to(gate_BHTD.dtype) * F.silu(gate_BHTD)))


class SharedKV(nn.Module):
    """The one K and V of the cross-decoder, from the self-decoder's normed output; rotary positions applied once."""

    def __init__(self, o: YOCOOptions):
        super().__init__()
        self.kv_heads = o.kv_heads
        self.norm = RMSNorm(o.width, o.norm_eps)
        self.kv = nn.Linear(o.width, 2 * o.kv_heads * o.head_dim, bias=False)
        self.k_norm = head_norm(o, o.head_dim, o.kv_heads)

    def forward(self, x_BTW: Tensor, chunk: Chunk, kv: KV) -> None:
        k_BGTD, v_BGTD = split_heads(self.kv(self.norm(x_BTW)), self.kv_heads, self.kv_heads)
        kv.append(chunk.start, chunk.rotate(self.k_norm(k_BGTD)), v_BGTD)


class YOCO(Decoder):
    """Self-decoder of constant memory, cross-decoder on one shared K/V."""

    Options = YOCOOptions
    early_exit = True
    examples = (
        {"kv_heads": 4, "self_decoder": "swa", "window": 7},
        {"kv_heads": 2, "self_decoder": "gret", "qk_norm": True, "gate": True},
    )

    def layer_attention(self, layer: int) -> nn.Module:
        o = self.options
        if layer >= o.layers // 2:
            return CrossAttention(o)
        return GroupedAttention(o) if o.self_decoder == "swa" else GatedRetention(o)

    def add_modules(self) -> None:
        self.shared_kv = SharedKV(self.options)

    def new_layers(self, make: Any) -> list:
        """Windows or states, then the same shared K/V for each layer of the cross-decoder."""
        o, half = self.options, self.options.layers // 2
        if o.self_decoder == "swa":
            layers = [make.ring(o.window, o.kv_heads, o.head_dim) for _ in range(half)]
        else:
            layers = [make.state(o.heads, o.head_dim, o.head_dim) for _ in range(half)]
        return layers + [make.full(o.kv_heads, o.head_dim)] * half

    def hidden(
        self, x_BTW: Tensor, cache: Cache | None = None, start: int | Tensor = 0, document_BT: Tensor | None = None
    ) -> Tensor:
        """With a cache the cross-decoder computes the last position alone (early exit)."""
        chunk = self.chunk(x_BTW.shape[1], start)
        layers = cache.layers if cache else self.new_layers(Training(document_BT))
        for layer, (block, kv) in enumerate(zip(self.blocks, layers, strict=True)):
            if layer == len(layers) // 2:
                self.shared_kv(x_BTW, chunk, kv)
                chunk = chunk._replace(queries=1) if cache else chunk
            x_BTW = block(x_BTW, chunk, kv)
        return x_BTW

    def kv_stored_elements(self, context: int) -> int:
        return self._kv_elements(context, readers=1)

    def kv_read_elements(self, context: int) -> int:
        """The shared K/V is stored once and read by every cross-decoder layer."""
        return self._kv_elements(context, readers=self.options.layers // 2)

    def _kv_elements(self, context: int, readers: int) -> int:
        """The shared K/V, 2 g d a token, and for each layer of the self-decoder a window, 2 g d min(context, window),
        or a state, h d d."""
        o = self.options
        rows = 2 * o.kv_heads * min(context, o.window) if o.self_decoder == "swa" else o.heads * o.head_dim
        return (readers * 2 * o.kv_heads * context + o.layers // 2 * rows) * o.head_dim

    def score_flops(self, context: int) -> float:
        """Retention in the recurrent form: two FLOPs for writing and two for reading each element of the state."""
        return self._score_flops(mean_seen(context), mean_seen(context, self.options.window))

    def decode_score_flops(self, context: float) -> float:
        return self._score_flops(context, min(context, self.options.window))

    def _score_flops(self, seen: float, seen_in_window: float) -> float:
        o = self.options
        self_decoder = seen_in_window if o.self_decoder == "swa" else o.head_dim
        return 4 * o.heads * o.head_dim * (o.layers // 2) * (seen + self_decoder)
