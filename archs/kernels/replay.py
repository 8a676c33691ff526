"""A decode step recorded once and replayed: as a CUDA graph, or on a CPU as a list of calls.

Without the model's Python between them, operators follow each other at once. On a CPU that Python takes longer than its
work suggests, as each layer's keys and values drive it out of the caches. A step's inputs are tensors at fixed
addresses, the position among them, so that one recording serves every length.
"""

import functools
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves

from archs.kernels import kernel, triton
from archs.kernels.checked import WRONG
from archs.kernels.cpu.build import PREPARE, STORED, bind, usable


def can_record(model: Any, tokens_B: Tensor, cache: Any) -> bool:
    """A static cache, and attention kernels that read the position on the device: not in fp64 on a GPU.

    On a CPU weights are in fp32, the cache is of any dtype in STORED, and no dispatch mode looks on, as it would see
    nothing of a replay.
    """
    weight = model.embed.weight
    if not cache.static:
        return False
    if weight.is_cuda:
        return {weight.dtype, *cache.dtypes} <= triton.DTYPES and triton.runs_on(weight.device)
    observed = _get_current_dispatch_mode() is not None or torch.is_autocast_enabled("cpu")
    return not observed and usable(weight) and cache.dtypes <= STORED.keys()


@kernel(can_record)
def decode_step(model: Any, tokens_B: Tensor, cache: Any) -> Tensor:
    cache.step = cache.step or RecordedStep(cache.batch_size, tokens_B.device)
    return cache.step(model, tokens_B, cache)


@functools.cache
def recording_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all recordings: libraries keep a workspace for each stream."""
    return torch.cuda.Stream(device)


class RecordedStep:
    """The decode step of a cache, with the position on the device. It is recorded again when a weight of the model has
    moved or a module was replaced.

    On a GPU the first step runs as it is (kernels are compiled, workspaces allocated) and the second is recorded; on a
    CPU the first is recorded. Hooks on modules see the steps that are not replayed. A copy of a cache records its own.
    """

    def __init__(self, batch_size: int, device: torch.device):
        with torch.inference_mode(False):  # or they could not be written outside of it
            self.tokens_B = torch.zeros(batch_size, dtype=torch.int64, device=device)
            self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.members: list[dict[str, Any]] = []  # the dictionaries in which modules hold weights and other modules
        self.recorded_for: list | None = None
        self.replay: Callable[[], object] | None = None
        self.how = "cuda graph" if device.type == "cuda" else "recorded"

    def __reduce__(self) -> tuple:
        return type(None), ()  # it holds addresses

    def __call__(self, model: Any, tokens_B: Tensor, cache: Any) -> Tensor:
        def step() -> None:
            self.logits_BV = model.append(self.tokens_B[:, None], cache, self.position)

        on_gpu = tokens_B.is_cuda
        with torch.cuda.device_of(tokens_B):
            self.tokens_B.copy_(tokens_B)
            self.position.fill_(cache.length)
            if self.recorded_for == self._places(model):
                self.replay = self.replay or self.capture(step)
                self.replay()
            else:
                self.recorded_for = self.replay = None  # should the step fail
                self.members = [members for m in model.modules() for members in (m._modules, m._parameters) if members]
                if on_gpu:
                    step()
                else:
                    model.chunk(1, self.position)  # computes what is cached from step to step
                    self.replay = record(step)
                self.recorded_for = self._places(model)
            return self.logits_BV.clone()

    @property
    def backend(self) -> str:
        """The kernel of attention, and whether it is recorded."""
        if not self.position.is_cuda:
            return f"split-kv c++, {self.how}"
        name = "sdpa" if triton.decode_attention in WRONG else "split-kv triton"
        return ", ".join(filter(None, [name, self.how, *WRONG.values()]))

    def _places(self, model: Any) -> list:
        """What a recording is valid for: the modules, and where their weights lie."""
        members = (x for each in self.members for x in each.values())
        places = [x.data_ptr() if isinstance(x, Tensor) else x for x in members]
        return [model, model.training, torch.get_num_threads(), *places]

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        """A replay of the step as a CUDA graph; after a warning the step itself where it cannot become one."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, stream=recording_stream(self.position.device)):
                step()
        except RuntimeError as e:  # an operator that cannot be recorded
            torch.cuda.set_stream(stream)
            if isinstance(e, torch.OutOfMemoryError):
                raise
            warnings.warn(f"decode goes without a CUDA graph, more slowly: {e}", stacklevel=2)
            self.how = ""
            return step
        return graph.replay


def record(function: Callable[[], object]) -> Callable[[], None]:
    """Runs a function on CPU tensors and returns a call that runs its operators again, on the same tensors."""
    calls = Calls()
    with torch.inference_mode(False), torch.no_grad(), calls:  # tensors of inference mode could not be written later
        function()
    return calls.replay


def repeated(function: Callable[..., Tensor], *inputs: Tensor) -> Callable[..., Tensor]:
    """The function for further tensors of these shapes; recorded on a CPU, where its Python, which a replayed step has
    driven out of the caches, would take several times as long as its work."""
    if _get_current_dispatch_mode() is not None or not usable(*inputs):
        return function
    with torch.inference_mode(False):
        kept = [x.clone() for x in inputs]
    results: list[Tensor] = []
    replay = record(lambda: results.append(function(*kept)))

    def call(*inputs: Tensor) -> Tensor:
        for x, new in zip(kept, inputs, strict=True):
            x.copy_(new)
        replay()
        return results[0].clone()

    return call


class Calls(TorchDispatchMode):
    """Records the operators that run. A replay makes no views again, and writes all other results in their places."""

    def __init__(self):
        super().__init__()
        self.calls: list[Callable[[], object]] = []
        self.storages: list[Any] = []  # kept alive, as calls go by address

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False, or torch would import its compiler, which takes a second, to say that it must not compile a mode."""
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if prepared := func in PREPARE and PREPARE[func](*args, **kwargs):
            result, call = prepared[0], bind(*prepared[1:])
            call()
        else:
            result = func(*args, **kwargs)
            call = call_again(func, args, kwargs, result)
        if call:
            self.calls.append(call)
            self.storages += [x.untyped_storage() for x in tree_leaves((args, result)) if isinstance(x, Tensor)]
        return result

    def replay(self) -> None:
        with torch.no_grad():  # what writes into a given tensor has no gradient
            for call in self.calls:
                call()


def call_again(func: torch._ops.OpOverload, args: tuple, kwargs: dict, result: Any) -> Callable[[], object] | None:
    """A call of an operator that writes into `result`; None for a view. TypeError for a number."""
    results = [x for x in tree_leaves(result) if x is not None]
    if not all(isinstance(x, Tensor) for x in results):
        raise TypeError(
            f"{func} gives Python a value, which a recorded decode step would not see change: keep it in a tensor, or "
            "set `static = False` on the cache, and nothing is recorded"
        )
    arguments = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
    if all(x.untyped_storage()._cdata in arguments for x in results):
        return partial(func, *args, **kwargs) if func._schema.is_mutable or not results else None

    into, names = out_variant(func, len(results))
    tensors = [x for a, x in zip(func._schema.arguments, args, strict=False) if str(a.type) == "Tensor"]
    if into and all(isinstance(x, Tensor) for x in tensors):  # and not a number, as in x * 2
        return partial(into, *args, **kwargs, **dict(zip(names, results, strict=True)))

    def call() -> None:
        for x, new in zip(results, tree_leaves(func(*args, **kwargs)), strict=True):
            x.copy_(new)

    return call


@functools.cache
def out_variant(func: torch._ops.OpOverload, count: int) -> tuple[torch._ops.OpOverload | None, list[str]]:
    """The same operator with `count` more arguments, into which it writes its results, and their names; none where the
    shape of a result depends on the values of its arguments."""
    if torch.Tag.dynamic_output_shape in func.tags:
        return None, []
    given = [(a.name, str(a.type)) for a in func._schema.arguments]
    for name in func.overloadpacket.overloads():
        arguments = (other := getattr(func.overloadpacket, name))._schema.arguments
        outs = [a.name for a in arguments if a.is_out and str(a.type) == "Tensor"]
        if len(outs) == count and given == [(a.name, str(a.type)) for a in arguments if not a.is_out]:
            return other, outs
    return None, []
