"""Keys and values shared between layers: a layer makes them, those above it only ask.

CLA (arXiv 2405.12981, section 2): `share` adjacent layers read the keys and values of the first of them, over any
number of KV heads (MLKV, arXiv 2406.09297). Gemma 3n's upper layers read those of one layer of their kind: with
`own_layers` the layers above these share the last ones.

Shapes: B batch, T tokens, W width.
"""

from typing import Any

from torch import nn

from archs.decoder import Decoder
from archs.grouped import CrossAttention, GroupedAttention, GroupedOptions
from archs.settings import Size


class CrossLayerOptions(GroupedOptions):
    share: Size = 2
    own_layers: Size | None = None  # all

    def complete(self) -> None:
        super().complete()
        self.own_layers = self.own_layers or self.layers
        most = f"must be at most layers={self.layers}"
        self.check(self.own_layers <= self.layers, f"own_layers={self.own_layers}: {most}")
        self.check(self.share <= self.layers, f"share={self.share}: {most}")

    def makes(self, layer: int) -> bool:
        """True if the layer makes keys and values."""
        return layer % self.share == 0 and layer < self.own_layers


class CrossLayer(Decoder):
    """Cross-layer attention: several layers on one K/V."""

    Options = CrossLayerOptions
    examples = ({"kv_heads": 2, "qk_norm": True},)

    def layer_attention(self, layer: int) -> nn.Module:
        return (GroupedAttention if self.options.makes(layer) else CrossAttention)(self.options)

    def new_layers(self, make: Any) -> list:
        o, layers = self.options, []
        for layer in range(o.layers):
            layers.append(make.full(o.kv_heads, o.head_dim) if o.makes(layer) else layers[-1])
        return layers

    def kv_stored_elements(self, context: int) -> int:
        """2 g d a token for each layer that makes keys and values."""
        o = self.options
        return 2 * o.kv_heads * o.head_dim * sum(map(o.makes, range(o.layers))) * context

    def kv_read_elements(self, context: int) -> int:
        """Every layer reads the keys and values that it attends to."""
        return 2 * self.options.kv_heads * self.options.head_dim * self.options.layers * context

    def decode_score_flops(self, context: float) -> float:
        return 4 * self.options.heads * self.options.head_dim * self.options.layers * context
