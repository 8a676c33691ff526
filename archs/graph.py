"""A decode step recorded once and replayed: as a CUDA graph, or on a CPU as a list of calls.

Without the model's Python between them, operators follow each other at once. On a CPU that Python takes longer than its
work would suggest: each layer's keys and values drive it out of the caches. A step's inputs are tensors at fixed
addresses, the position among them, so that one recording holds for every length.
"""

import contextlib
import ctypes
import functools
import importlib.util
import warnings
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves

from archs.cpu.building import PREPARE, takes

if TYPE_CHECKING:
    from archs.cache import Cache
    from archs.decoder import Decoder


def records(weight: Tensor, cache: "Cache") -> bool:
    """Whether decode steps are recorded: on a static cache, where the kernels are there that read a position.

    On a CPU that is in fp32, and not while a dispatch mode looks on at the operators: of a replay it would see none.
    """
    if not cache.static:
        return False
    if weight.is_cuda:
        return graphs_decode(weight.device)
    watched = _get_current_dispatch_mode() is not None or torch.is_autocast_enabled("cpu")
    return not watched and takes(weight) and cache.dtypes == {torch.float32}


@functools.cache
def graphs_decode(device: torch.device) -> bool:
    """Whether this is an NVIDIA GPU from Ampere on, and Triton can compile for it."""
    if torch.version.hip or not importlib.util.find_spec("triton"):
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


@functools.cache
def recording_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all recordings: libraries keep a workspace for each stream."""
    return torch.cuda.Stream(device)


class RecordedStep:
    """The decode step of a cache, with the position on the device; recorded anew when a weight of the model has moved
    or a module has been replaced.

    On a GPU the first step runs as it is (kernels are compiled, workspaces made) and the second is recorded; on a CPU
    the first is. Hooks on modules see the steps that are not replayed. A copy of a cache records its own.
    """

    def __init__(self, batch_size: int, device: torch.device):
        with torch.inference_mode(False):  # or they could not be written outside of it
            self.tokens_B = torch.zeros(batch_size, dtype=torch.int64, device=device)
            self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.at = 0  # what `position` holds
        self.held = None if device.type == "cuda" else ctypes.c_int64.from_address(self.position.data_ptr())
        self.model: Decoder | None = None
        self.ran: tuple | None = None  # what the last step ran on
        self.replay: Callable[[], object] | None = None
        self.backend = "split-kv triton, cuda graph" if device.type == "cuda" else "split-kv c++, recorded"

    def __reduce__(self) -> tuple:
        return type(None), ()  # it holds addresses

    def __call__(self, model: "Decoder", tokens_B: Tensor, cache: "Cache") -> Tensor:
        on_gpu = tokens_B.is_cuda
        with torch.cuda.device(tokens_B.device) if on_gpu else contextlib.nullcontext():
            self.tokens_B.copy_(tokens_B)
            if self.held is not None:
                self.held.value = cache.length  # an operator would take 50 us with cold caches
            elif self.at != cache.length:
                self.position.fill_(cache.length)
            self.at = -1  # unknown, should the step fail
            if self.model is not model or self.ran is None or self.ran != self._runs(model):
                self.model, self.ran, self.replay = model, None, None
                self.parts = [(m._modules, list(m._modules.values())) for m in model.modules() if m._modules]
                self.weights = [(m._parameters, name) for m in model.modules() for name in m._parameters]
                if on_gpu:
                    self.logits_BV = self._step(model, cache)
                else:
                    self._record_calls(model, cache)
                self.ran = self._runs(model)
            else:
                if self.replay is None:
                    self._record_graph(model, cache)
                self.replay()
            self.at = cache.length + 1
            return self.logits_BV.clone()

    def _runs(self, model: "Decoder") -> tuple | None:
        """What a recording is for; None when a module has been put in another's place."""
        if any(list(held.values()) != there for held, there in self.parts):
            return None
        places = [x.data_ptr() for held, name in self.weights if (x := held.get(name)) is not None]
        return places, model.training, torch.get_num_threads()

    def _step(self, model: "Decoder", cache: "Cache") -> Tensor:
        logits_BV = model.append(self.tokens_B[:, None], cache, self.position)
        if self.held is None:
            self.position += 1
        return logits_BV

    def _record_graph(self, model: "Decoder", cache: "Cache") -> None:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, stream=recording_stream(self.position.device)):
                self.logits_BV = self._step(model, cache)
            self.replay = graph.replay
        except RuntimeError as e:  # an operator that cannot be recorded
            torch.cuda.set_stream(stream)
            if isinstance(e, torch.OutOfMemoryError):
                raise
            warnings.warn(f"decode goes without a CUDA graph, more slowly: {e}", stacklevel=2)
            self.replay, self.backend = partial(self._plain_step, model, cache), "split-kv triton"

    def _plain_step(self, model: "Decoder", cache: "Cache") -> None:
        self.logits_BV = self._step(model, cache)

    def _record_calls(self, model: "Decoder", cache: "Cache") -> None:
        """Runs the step, too."""
        model.rope(self.tokens_B[:, None], self.position)  # makes what is kept from step to step
        calls = Calls()
        with torch.inference_mode(False), torch.no_grad(), calls:  # inference mode's tensors live in it alone
            self.logits_BV = self._step(model, cache)
        self.replay = calls.replay


class Calls(TorchDispatchMode):
    """Records the operators that run, and runs them again on the same tensors: views stay, the rest is written anew."""

    def __init__(self):
        super().__init__()
        self.calls: list[Callable[[], object]] = []
        self.storages: list[Any] = []  # what is called by address must live

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in PREPARE:
            result, call = PREPARE[func](*args)
            call()
        else:
            result = func(*args, **kwargs)
            call = again(func, args, kwargs, result)
        if call:
            self.calls.append(call)
            self.storages += [x.untyped_storage() for x in tree_leaves((args, result)) if isinstance(x, Tensor)]
        return result

    def replay(self) -> None:
        for call in self.calls:
            call()


def again(func: torch._ops.OpOverload, args: tuple, kwargs: dict, result: Any) -> Callable[[], object] | None:
    """A call of an operator that puts into `result` what it finds; None for a view. TypeError for a number."""
    made = [x for x in tree_leaves(result) if x is not None]
    if not all(isinstance(x, Tensor) for x in made):
        raise TypeError(
            f"{func} gives Python a value, which a recorded decode step would not see change: keep it in a tensor, or "
            "have the model's new_cache set `static = False` on its caches, and nothing is recorded"
        )
    given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
    if all(x.untyped_storage()._cdata in given for x in made):
        return partial(func, *args, **kwargs) if func._schema.is_mutable or not made else None
    if filling := filling_overload(func):
        return partial(filling, *args, **kwargs, out=result)

    def call() -> None:
        for x, new in zip(made, tree_leaves(func(*args, **kwargs)), strict=True):
            x.copy_(new)

    return call


@functools.cache
def filling_overload(func: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    """The overload with the same arguments and `out`."""
    wanted = [(a.name, str(a.type)) for a in func._schema.arguments]
    for name in func.overloadpacket.overloads():
        overload = getattr(func.overloadpacket, name)
        others = [(a.name, str(a.type)) for a in overload._schema.arguments if not a.is_out]
        outs = [a.name for a in overload._schema.arguments if a.is_out]
        if outs == ["out"] and others == wanted:
            return overload
    return None
