"""A pretended GPU: tensors that say they are on cuda:0 and keep their numbers on the CPU, so that all that is written
for a GPU runs without one.

It refuses what CUDA refuses (operators on mixed devices; inside a graph capture whatever waits for the host; arguments
of PyTorch's attention kernels, whose choice is transcribed from torch's sdp_utils.cpp) and counts synchronisations.
Speed and memory are not pretended, nor are kernels: Triton's are replaced by the formulas that define them.
"""

import contextlib
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from archs import ops
from archs.kernels import checked, triton
from archs.kernels.replay import Calls, recording_stream

GPU = torch.device("cuda:0")
MEMORY = 2**26  # bytes, which the test of the largest batch fills
aten = torch.ops.aten
# Operators whose result the host has to see before it can go on.
WAITS = {aten.nonzero, aten.masked_select, aten._unique2, aten._local_scalar_dense, aten.is_nonzero, aten.equal}
# Functions that CUDA's autocast runs in bf16 and in fp32 (torch/csrc: autocast_mode.h), as far as they are used here.
BF16 = {F.linear, torch.matmul, torch.bmm, torch.einsum, Tensor.matmul, Tensor.__matmul__, torch.addmm}
BF16 |= {F.scaled_dot_product_attention}
FP32 = {torch.softmax, Tensor.softmax, F.softmax, F.log_softmax, F.cross_entropy, torch.cumsum, Tensor.cumsum}
FP32 |= {F.softplus, Tensor.norm, Tensor.logsumexp, Tensor.exp, Tensor.pow, Tensor.sum, torch.sum}


class Refused(RuntimeError):
    """What CUDA would have refused."""


class OnGPU(Tensor):
    """`data_` holds the numbers, on the CPU; autograd sees a meta tensor of the same layout."""

    data_: Tensor
    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_cpu = is_meta = property(lambda self: False)

    @staticmethod
    def __new__(cls, data: Tensor, requires_grad: bool = False):
        with torch._C._DisableTorchDispatch(), torch.no_grad():
            meta = torch.empty_strided(data.size(), data.stride(), dtype=data.dtype, device="meta")
        made = Tensor._make_subclass(cls, meta, requires_grad, device_for_backend_keys=GPU)
        made.data_ = data
        return made

    def __repr__(self) -> str:
        return f"OnGPU({self.data_})"

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return self.data_.__reduce_ex__(protocol)

    def data_ptr(self) -> int:
        return self.data_.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.data_.untyped_storage()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise Refused(f"{func} on a tensor of a pretended GPU that is gone")


def each(function: Callable[[Any], Any], thing: Any) -> Any:
    """`function` of what is in tuples, lists and dictionaries; ten times as fast as PyTorch's tree_map."""
    if isinstance(thing, dict):
        return {key: each(function, x) for key, x in thing.items()}
    if isinstance(thing, tuple | list):
        return type(thing)([each(function, x) for x in thing]) if type(thing) in (tuple, list) else thing
    return function(thing)


def tensors_of(thing: Any) -> list[Tensor]:
    found: list[Tensor] = []
    each(lambda x: found.append(x) if isinstance(x, Tensor) else None, thing)
    return found


def unwrapped(thing: Any) -> Any:
    return each(lambda x: x.data_ if isinstance(x, OnGPU) else x, thing)


class GPUPretence(TorchDispatchMode):
    """`waits` counts what makes the host wait, by operator, and `attention` PyTorch's kernels; `largest` is the size of
    the largest tensor so far."""

    def __init__(self, capability: tuple[int, int]):
        super().__init__()
        self.capability, self.waits, self.attention, self.largest = capability, Counter(), Counter(), 0
        self.graph: Graph | None = None  # that is being captured

    def wait(self, what: str) -> None:
        self.waits[what] += 1
        if self.graph:
            raise Refused(f"{what} while a CUDA graph is captured")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func.overloadpacket is aten._pin_memory:
            pinned = args[0].clone()
            pinned.is_pinned_ = True
            return pinned
        if func._can_decompose() and func.overloadpacket is aten.to:
            with self:
                return func.decompose(*args, **kwargs)
        if "device" in kwargs:
            device = kwargs["device"] = torch.device(kwargs["device"] or "cpu")
        tensors = tensors_of((args, kwargs))
        ours = [x for x in tensors if isinstance(x, OnGPU)]
        to_gpu = "device" in kwargs and device.type in ("cuda", "meta")
        if not ours and not to_gpu:
            return func(*args, **kwargs)
        name, packet = func._schema.name.removeprefix("aten::"), func.overloadpacket
        others = [x for x in tensors if not isinstance(x, OnGPU)]
        stays = to_gpu or "device" not in kwargs  # on the GPU
        if packet in (aten._to_copy, aten.copy_):
            if not stays or not all(hasattr(x, "is_pinned_") and kwargs.get("non_blocking") for x in others):
                self.wait(f"{name} between host and device")
        elif packet in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_):
            given = tensors_of(args[1])
            if any(x.dtype in (torch.bool, torch.uint8) for x in given):
                self.wait(f"{name} by a mask")
            if any(not isinstance(x, OnGPU) for x in given):
                self.wait(f"{name} by numbers of the host")
            others = [x for x in others if all(x is not index for index in given)]
            if not isinstance(args[0], OnGPU):
                raise Refused(f"{name}: a tensor of the CPU is indexed by one of the GPU")
        if packet not in (aten._to_copy, aten.copy_) and any(x.dim() for x in others):
            raise Refused(f"Expected all tensors to be on the same device: {name}")
        if packet in WAITS or func is aten.repeat_interleave.Tensor:
            self.wait(name)
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        kwargs.pop("pin_memory", None)
        inner = unwrapped((args, kwargs))
        out = self.run(func, *inner)
        if packet is aten._to_copy and out is inner[0][0]:
            out = out.clone()
        self.largest = max([self.largest, *(x.numel() for x in tensors_of(out))])
        given = {id(unwrapped(x)): x for x in tensors}
        wrap = lambda x: given.get(id(x)) if id(x) in given else OnGPU(x) if stays else x  # noqa: E731
        return each(lambda x: wrap(x) if isinstance(x, Tensor) else x, out)

    def run(self, func, args, kwargs) -> Any:
        """On the CPU's tensors; while a graph is captured they are recorded, too."""
        if func is aten._fused_rms_norm.default:
            func, args, kwargs = rms_norm, args, {}
        elif func is aten._fused_rms_norm_backward.default:
            func, args, kwargs = rms_norm_backward, args, {}
        if not self.graph:
            return func(*args, **kwargs)
        schema = getattr(func, "_schema", None)
        if schema and schema.is_mutable:
            for argument, value in zip(schema.arguments, args, strict=False):
                if argument.alias_info and argument.alias_info.is_write:
                    self.graph.keep(value)
        with self.graph.calls:
            return func(*args, **kwargs)


def rms_norm(x: Tensor, shape: list[int], weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    scale = (x.float().pow(2).mean(-1, keepdim=True) + eps).rsqrt()
    return (x.float() * scale * (1 if weight is None else weight.float())).to(x.dtype), scale


def rms_norm_backward(grad, x, shape, scale, weight, wanted) -> tuple[Tensor, Tensor | None]:
    normed = x.float() * scale
    to_normed = grad.float() * (1 if weight is None else weight.float())
    to_x = scale * (to_normed - normed * (to_normed * normed).mean(-1, keepdim=True))
    to_weight = None if weight is None else (grad.float() * normed).flatten(0, -2).sum(0).to(weight.dtype)
    return to_x.to(x.dtype), to_weight


class Graph:
    """A torch.cuda.CUDAGraph. Capturing computes nothing: what the operators wrote is undone at its end."""

    def __init__(self):
        self.calls, self.before = Calls(), {}

    def keep(self, written: Any) -> None:
        for x in tensors_of(written):
            storage = x.untyped_storage()
            self.before.setdefault(storage._cdata, (storage, storage.clone()))

    def replay(self) -> None:
        self.calls.replay()


class Functions(TorchFunctionMode):
    """What is decided above the operators: autocast, the choice of an attention kernel, tensors made from numbers."""

    def __init__(self, gpu: GPUPretence):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.tensor and torch.device(kwargs.get("device") or "cpu").type == "cuda":
            self.gpu.wait("torch.tensor")
            return OnGPU(torch.tensor(*args, **kwargs | {"device": "cpu"}))
        ours = any(isinstance(x, OnGPU) for x in tensors_of((args, kwargs)))
        if ours and torch.is_autocast_enabled("cuda") and func in BF16 | FP32:
            dtype = torch.get_autocast_dtype("cuda") if func in BF16 else torch.float32
            cast = lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x  # noqa: E731
            args, kwargs = each(cast, (args, kwargs))
        if ours and func is F.scaled_dot_product_attention:
            return self.attention(*args, **kwargs)
        return func(*args, **kwargs)

    def attention(self, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        chosen = attention_kernel(self.gpu.capability, q, k, v, attn_mask, is_causal, enable_gqa)
        self.gpu.attention[chosen] += 1
        if attn_mask is not None:
            if chosen == "cudnn" and attn_mask.requires_grad:
                raise Refused("cuDNN's attention is not differentiable with respect to argument 'attn_bias'")
            if attn_mask.dtype not in (torch.bool, q.dtype):
                raise Refused(f"a mask of {attn_mask.dtype} for queries of {q.dtype}")
        if not q.dtype == k.dtype == v.dtype:
            raise Refused(f"queries, keys and values of {q.dtype}, {k.dtype}, {v.dtype}")
        T, S = q.shape[2], k.shape[2]
        if is_causal:
            attn_mask = torch.ones(T, S, dtype=torch.bool, device=GPU).tril()
        elif attn_mask is None:
            attn_mask = torch.ones(T, S, dtype=torch.bool, device=GPU)
        with torch.autocast("cuda", enabled=False):
            inputs = (x.float() if x.dtype != torch.float64 else x for x in (q, k, v))
            return ops.masked_attention.formula(*inputs, scale or q.shape[-1] ** -0.5, attn_mask).to(q.dtype)


def attention_kernel(capability: tuple[int, int], q, k, v, mask, causal: bool, gqa: bool) -> str:
    """The first of the kernels that are enabled which takes the arguments: sdp_utils.cpp of torch 2.15."""
    D, E, half = q.shape[-1], v.shape[-1], q.dtype in (torch.float16, torch.bfloat16)
    hopper = capability[0] in (9, 10)
    gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    heads = q.shape[1] == k.shape[1] == v.shape[1] or (gqa and q.shape[1] % k.shape[1] == 0)
    contiguous, units = all(x.stride(-1) == 1 for x in (q, k, v)), 8 if half else 4
    most = 256 if hopper and not gradient else 128
    cudnn = half and heads and max(D, E) <= most and D % 8 == E % 8 == 0 and k.shape[2] > 1 and contiguous
    flash = mask is None and half and heads and D == E <= 256 and contiguous
    flash = flash and not (causal and q.shape[2] != k.shape[2])
    efficient = q.dtype != torch.float64 and D % units == E % units == 0 and heads and contiguous
    cuda = torch.backends.cuda
    choices = {
        "cudnn": cudnn and hopper and cuda.cudnn_sdp_enabled(),
        "flash": flash and cuda.flash_sdp_enabled(),
        "efficient": efficient and cuda.mem_efficient_sdp_enabled(),
    }
    return next((name for name, takes in choices.items() if takes), "math")


class Event:
    def __init__(self, **options: Any):
        self.time = 0.0

    def record(self, *stream: Any) -> None:
        self.time = time.perf_counter()

    def elapsed_time(self, end: "Event") -> float:
        return (end.time - self.time) * 1e3 + 1e-3


@contextlib.contextmanager
def pretended_gpu(capability: tuple[int, int] = (9, 0)) -> Iterator[GPUPretence]:
    gpu = GPUPretence(capability)
    torch._C._ensureCUDADeviceGuardSet()  # one that does nothing, as no driver is here

    @contextlib.contextmanager
    def capture(graph: Graph, **options: Any) -> Iterator[None]:
        gpu.graph = graph
        try:
            yield
        finally:
            gpu.graph = None
            for storage, before in graph.before.values():
                storage.copy_(before)

    def attend(q, k, v, scale, position, sinks=None) -> Tensor:
        if not q.dtype == k.dtype == v.dtype or not all(x.stride(-1) == 1 for x in (q, k, v)):
            raise Refused("queries, keys and values of different dtypes, or with gaps")
        return kernel(ops.attention.formula, q, k, v, scale, 0, position, sinks)

    def varlen_attn(q, k, v, q_starts, k_starts, T, S, scale, window_size, enable_gqa) -> Tensor:
        """Sequences of equal length, in half precision."""
        if q.dtype not in (torch.float16, torch.bfloat16) or not q.dtype == k.dtype == v.dtype:
            raise Refused("flash attention only supports half precision")
        if k_starts.dtype != torch.int32 or (q.shape[1] != k.shape[1] and not enable_gqa):
            raise Refused("varlen_attn: starts are int32, and groups have to be allowed")
        gpu.attention["flash varlen"] += 1
        lengths = zip((q, k, v), (T, S, S), strict=True)
        inputs = (x.float().unflatten(0, (len(q_starts) - 1, n)).transpose(1, 2) for x, n in lengths)
        return ops.attention.formula(*inputs, scale, window_size[0] + 1).transpose(1, 2).flatten(0, 1).to(q.dtype)

    def kernel(formula, *arguments: Any) -> Tensor:
        """A Triton kernel: all of its tensors are on the GPU."""
        if any(isinstance(x, Tensor) and not isinstance(x, OnGPU) for x in arguments):
            raise Refused("Pointer argument cannot be accessed from Triton (cpu tensor?)")
        inner = unwrapped(arguments)
        if gpu.graph:
            gpu.graph.keep(inner)
        with gpu.graph.calls if gpu.graph else contextlib.nullcontext():
            return OnGPU(formula(*inner))

    major, minor = capability
    properties = types.SimpleNamespace(
        name="pretended GPU",
        multi_processor_count=4,
        total_memory=MEMORY,
        major=major,
        minor=minor,
        shared_memory_per_block_optin=232_448 if major in (9, 10) else 101_376,
    )
    functions = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "is_bf16_supported": lambda *a, **k: capability >= (8, 0),
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda *a: None,
        "get_device_capability": lambda *a: capability,
        "get_device_properties": lambda *a: properties,
        "get_device_name": lambda *a: properties.name,
        "get_arch_list": lambda: ["sm_80", "sm_90", "sm_100", "sm_120"],
        "mem_get_info": lambda *a: (MEMORY, MEMORY),
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda *a: None,
        "max_memory_allocated": lambda *a: MEMORY,
        "synchronize": lambda *a: gpu.wait("synchronize"),
        "manual_seed": lambda *a: None,
        "manual_seed_all": lambda *a: None,
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": capture,
        "Stream": lambda *a, **k: None,
        "current_stream": lambda *a: None,
        "set_stream": lambda *a: None,
        "is_current_stream_capturing": lambda: gpu.graph is not None,
        "device": lambda *a: contextlib.nullcontext(),
    }
    caches = triton.runs_on, recording_stream, ops.frequencies
    with pytest.MonkeyPatch.context() as patch:
        for name, function in functions.items():
            patch.setattr(torch.cuda, name, function)
        patch.setattr(torch.accelerator, "synchronize", functions["synchronize"])
        patch.setattr(torch, "inference_mode", inference_mode)
        patch.setattr(torch, "Generator", lambda device=None, make=torch.Generator: make())
        patch.setattr("train.module.matmul_flops_per_s", lambda *a: 1e12)  # these take a GPU's time and memory
        patch.setattr("eval.evaluate.measure_roof", lambda device: 100.0)
        patch.setattr("archs.kernels.fused.varlen", types.SimpleNamespace(varlen_attn=varlen_attn))
        patch.setattr("archs.kernels.fused.HAS_WINDOWS", True)
        patch.setattr("archs.kernels.triton_attention.split_kv_attention", attend)
        patch.setattr("archs.kernels.triton_retention.retain", lambda *a: kernel(ops.retention_step.formula, *a))
        patch.setattr(checked, "_seen", set())
        for function in caches:
            function.cache_clear()
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            with Functions(gpu), gpu:
                yield gpu
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)
            checked.WRONG.clear()
            for function in caches:
                function.cache_clear()


class inference_mode(torch.no_grad):
    """Tensors of torch's inference mode cannot be made from Python."""

    def __new__(cls, mode: Any = True):
        if callable(mode):
            return torch.no_grad()(mode)
        return super().__new__(cls) if mode else contextlib.nullcontext()

    def __init__(self, mode: bool = True):
        super().__init__()
