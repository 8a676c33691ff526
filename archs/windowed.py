"""Sliding windows alternating with global attention: the cache of most layers stops growing.

Every `global_every`-th layer attends to all tokens, the others to a window of the last ones: 5 windows to 1 global
layer in Gemma 3 (arXiv 2503.19786, section 2), 1 to 1 in gpt-oss (arXiv 2508.10925, section 2.2), where each head has a
learned logit besides those of its keys (`sinks`): softmax over all of them, of which the sink's share is dropped. With
`nope` global layers have no positions, as in Cohere's Command A (arXiv 2504.00698, section 2.1).

Shapes: B batch, T tokens, H heads, D head size.
"""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from archs.alternating import AlternatingOptions
from archs.costs import mean_seen
from archs.decoder import Chunk
from archs.grouped import Grouped, GroupedAttention
from archs.kv import KV
from archs.settings import Size


class WindowedOptions(AlternatingOptions):
    global_every: int = Field(6, ge=1, lt=2**31)
    window: Size = 1024  # how many tokens a token sees, itself included
    nope: bool = False  # no rotary positions in global layers
    sinks: bool = False  # a learned logit for each head, whose share of the softmax is dropped


class WithoutPositions(GroupedAttention):
    def rotate(self, x_BHTD: Tensor, chunk: Chunk) -> Tensor:
        return x_BHTD


class WithSinks(GroupedAttention):
    def __init__(self, o: WindowedOptions):
        super().__init__(o)
        self.sinks = nn.Parameter(torch.zeros(o.heads))

    def attend(self, q_BHTD: Tensor, kv: KV) -> Tensor:
        return kv.attend(q_BHTD, self.head_dim**-0.5, self.sinks.view(1, -1, 1, 1))


class WithSinksWithoutPositions(WithSinks, WithoutPositions):
    """A global layer with sinks."""


class Windowed(Grouped):
    """Windows, and a layer that sees everything after every few of them."""

    Options = WindowedOptions
    examples = (
        {"kv_heads": 2, "window": 7, "global_every": 2, "nope": True},
        {"kv_heads": 2, "window": 9, "global_every": 2, "sinks": True, "qk_norm": True, "gate": True},
    )

    @property
    def keys_turn(self) -> bool:
        return not self.options.nope

    def layer_attention(self, layer: int) -> nn.Module:
        o = self.options
        without_positions = o.nope and o.is_global(layer)
        if o.sinks:
            return WithSinksWithoutPositions(o) if without_positions else WithSinks(o)
        return WithoutPositions(o) if without_positions else GroupedAttention(o)

    def new_layers(self, make: Any) -> list:
        o = self.options
        full, ring = (o.kv_heads, o.head_dim), (o.window, o.kv_heads, o.head_dim)
        return [make.full(*full) if o.is_global(layer) else make.ring(*ring) for layer in range(o.layers)]

    def kv_stored_elements(self, context: int) -> int:
        """2 g d a token in global layers, 2 g d min(context, window) in each other one."""
        o = self.options
        return 2 * o.kv_heads * o.head_dim * o.over_layers(context, min(context, o.window))

    def score_flops(self, context: int) -> float:
        return self.flops(mean_seen(context), mean_seen(context, self.options.window))

    def decode_score_flops(self, context: float) -> float:
        return self.flops(context, min(context, self.options.window))

    def flops(self, everything: float, in_window: float) -> float:
        o = self.options
        return 4 * o.heads * o.head_dim * o.over_layers(everything, in_window)

    def hf_class(self) -> tuple[str, str, dict]:
        o = self.options
        if o.sinks:
            raise ValueError("transformers has no class with sinks and without experts")
        if o.nope and o.qk_norm:
            raise ValueError("transformers has no class with qk_norm and layers without positions")
        kinds = ["full_attention" if o.is_global(layer) else "sliding_attention" for layer in range(o.layers)]
        special = {"layer_types": kinds, "use_sliding_window": True, "sliding_window": o.window, "max_window_layers": 0}
        special |= {"no_rope_layer_interval": 1, "pad_token_id": None}
        special |= {"num_key_value_heads": o.kv_heads, "head_dim": o.head_dim}
        if o.qk_norm:
            return "qwen3", "Qwen3ForCausalLM", special
        rotated = [int(not (o.nope and o.is_global(layer))) for layer in range(o.layers)]
        return "smollm3", "SmolLM3ForCausalLM", special | {"no_rope_layers": rotated}
