"""What a token of a model costs: parameters, bytes of KV cache, FLOPs.

These are methods of the model, so that they cannot drift from it. Tests and evaluations compare the formulas of a
variant's cache with its real storages.
"""

import torch
from torch import nn

LONG = 2**40  # tokens; longer than any window


class Costs:
    """A variant defines `kv_stored_elements`, `decode_score_flops` and, where the defaults do not fit,
    `kv_read_elements` and `score_flops`, each for one sequence and all layers."""

    embed: nn.Embedding
    unembed: nn.Linear

    def count_params(self, embedding: bool = True) -> int:
        """Parameters, each once; without `embedding` the token embedding and the unembedding are left out."""
        tables = {self.embed.weight, self.unembed.weight}
        return sum(p.numel() for p in self.parameters() if embedding or p not in tables)

    def kv_stored_bytes(self, context: int, dtype: torch.dtype) -> int:
        """Bytes that one sequence of `context` tokens holds."""
        return self.kv_stored_elements(context) * dtype.itemsize

    def kv_read_bytes(self, context: int, dtype: torch.dtype) -> int:
        """Bytes of cache that one decode step of one sequence must read when it holds `context` tokens."""
        return self.kv_read_elements(context) * dtype.itemsize

    def kv_bytes_per_token(self, dtype: torch.dtype) -> int:
        """Bytes that each further token adds to one sequence's cache, once every window is full."""
        return self.kv_stored_bytes(LONG + 1, dtype) - self.kv_stored_bytes(LONG, dtype)

    def kv_constant_bytes(self, dtype: torch.dtype) -> int:
        """Bytes that one sequence holds however long it grows."""
        return self.kv_stored_bytes(LONG, dtype) - LONG * self.kv_bytes_per_token(dtype)

    def flops_per_token(self, context: int) -> float:
        """Forward FLOPs a token, mean over a training sequence of `context` tokens; training takes three times this."""
        return self.matmul_flops() + self.score_flops(context)

    def decode_flops(self, context: int) -> float:
        """FLOPs of one decode step of one sequence that then holds `context` tokens."""
        return self.matmul_flops() + self.decode_score_flops(context)

    def matmul_flops(self) -> int:
        """Forward FLOPs a token in the weight matrices, unembedding included: two for each weight."""
        return 2 * sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))

    def weights_read(self, context: int) -> int:
        """Weights that one decode step multiplies with, each once, when it holds `context` tokens."""
        return self.matmul_flops() // 2

    def kv_stored_elements(self, context: int) -> int:
        raise NotImplementedError

    def kv_read_elements(self, context: int) -> int:
        return self.kv_stored_elements(context)

    def score_flops(self, context: int) -> float:
        """Forward FLOPs a token of queries against keys and weights against values, over the pairs that are seen."""
        return self.decode_score_flops(mean_seen(context))

    def decode_score_flops(self, context: float) -> float:
        """The same for one decode step that holds `context` tokens."""
        raise NotImplementedError


def mean_seen(context: int, window: int | None = None) -> float:
    """Mean number of tokens that a token of a sequence sees, itself included: min(t, window) over t = 1 .. context."""
    window = min(window or context, context)
    return (window * (window + 1) / 2 + (context - window) * window) / context
