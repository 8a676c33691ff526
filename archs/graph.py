"""A decode step recorded once as a CUDA graph and replayed: no launch, no Python, no synchronisation between layers.

Its inputs are tensors at fixed addresses, the position among them, so that one recording holds for every length.
"""

import contextlib
import functools
import importlib.util
import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from archs.cache import Cache
    from archs.decoder import Decoder


@functools.cache
def graphs_decode(device: torch.device) -> bool:
    """Whether decode steps on this device are recorded: on NVIDIA GPUs from Ampere on, where Triton can compile."""
    if device.type != "cuda" or torch.version.hip or not importlib.util.find_spec("triton"):
        return False
    if torch.cuda.get_device_capability(device) < (8, 0):
        return False
    from archs.split_kv import split_kv_attention

    try:
        x = torch.zeros(1, 1, 16, 16, device=device)
        split_kv_attention(x[:, :, 0], x, x, torch.ones(1, dtype=torch.int64, device=device), 1.0)
    except Exception as e:  # no C compiler, for one
        warnings.warn(f"decode goes without Triton and CUDA graphs, more slowly: {e}", stacklevel=2)
        return False
    return True


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
        self.ran: tuple | None = None  # the model that last did, by where its weights are
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, model: "Decoder", tokens_B: Tensor, cache: "Cache") -> Tensor:
        on_gpu = tokens_B.is_cuda
        with torch.cuda.device(tokens_B.device) if on_gpu else contextlib.nullcontext():
            self.tokens_B.copy_(tokens_B)
            if self.at != cache.length:
                self.position.fill_(cache.length)
            self.at = -1  # unknown, should the step fail
            runs = model.embed.weight.data_ptr(), model.embed.weight.dtype, model.training
            if self.ran != runs or not on_gpu:
                self.graph = None
                logits_BV = self._step(model, cache)
                self.ran = runs
            else:
                if self.graph is None:
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
                        self.logits_BV = self._step(model, cache)
                    self.graph = graph
                self.graph.replay()
                logits_BV = self.logits_BV.clone()
            self.at = cache.length + 1
            return logits_BV

    def _step(self, model: "Decoder", cache: "Cache") -> Tensor:
        logits_BV = model.append(self.tokens_B[:, None], cache, self.position)
        self.position += 1
        return logits_BV
