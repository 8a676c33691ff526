"""A decode step recorded once as a CUDA graph and replayed: no launch, no Python, no synchronisation between layers.

Its inputs are tensors at fixed addresses, the position among them, so that one recording holds for every length.
"""

import importlib.util
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from archs.cache import Cache
    from archs.decoder import Decoder


class GraphedStep:
    """The decode step of a cache, with the position on the device.

    The first step runs as it is (kernels are compiled, workspaces made), the second is recorded, and that is replayed
    from then on. On a CPU every step runs as it is.
    """

    backend = "split-kv triton, cuda graph"

    def __init__(self, batch_size: int, device: torch.device):
        with torch.inference_mode(False):  # or they could not be written outside of it
            self.tokens_B = torch.zeros(batch_size, dtype=torch.int64, device=device)
            self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.at = 0  # what `position` holds
        self.weights = 0  # the address of the model's that last ran
        self.graph: torch.cuda.CUDAGraph | None = None

    @staticmethod
    def supports(tokens: Tensor) -> bool:
        return tokens.is_cuda and torch.version.hip is None and importlib.util.find_spec("triton") is not None

    def __call__(self, model: "Decoder", tokens_B: Tensor, cache: "Cache") -> Tensor:
        self.tokens_B.copy_(tokens_B)
        if self.at != cache.length:
            self.position.fill_(cache.length)
        self.at = cache.length + 1
        if self.weights != model.embed.weight.data_ptr() or not tokens_B.is_cuda:  # the first step, or it was moved
            self.weights, self.graph = model.embed.weight.data_ptr(), None
            return self._step(model, cache)
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.logits_BV = self._step(model, cache)
        self.graph.replay()
        return self.logits_BV.clone()

    def _step(self, model: "Decoder", cache: "Cache") -> Tensor:
        logits_BV = model.append(self.tokens_B[:, None], cache, self.position)
        self.position += 1
        return logits_BV
