"""What torch is slow at on a CPU, in C++ that is built for each shape when first needed.

Attention of one new token over a static cache: torch's kernel computes and waits for memory by turns, ours fetches
ahead (cpu_kernel.cpp says how). Of a prompt, and its gradients: torch's computes at half the rate of a matrix product
or less. Products of few rows with a weight matrix: torch's takes twice as long as reading it. Norms, gates, rotary
positions, retention's decay, cross-entropy: several passes in torch, or operators that take longer to start than to
run. And a read of memory, the roof. A build takes a second or two and is kept in the user's cache folder; without a
compiler, torch's take over.

Shapes: B batch, H query heads, G KV heads, M = H/G, S cached tokens, D key size, E value size; K inputs and F outputs
of a matrix.
"""

import ctypes
import functools
import hashlib
import math
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

SOURCE = Path(__file__).with_suffix(".cpp")
FEW = 32  # rows; torch's products are as fast with more
FLAGS = ["-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC"]


def compiler() -> str | None:
    """The C++ compiler, the one that torch.compile looks for; None where there is none."""
    return shutil.which(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++"))


@functools.cache
def build(D: int = 0, E: int = 0, M: int = 0) -> ctypes.CDLL | None:
    """cpu_kernel.cpp, or None (after a warning, unless it is for want of a compiler).

    With sizes a prompt's attention alone, with M one token's; without, all else.
    """
    if not compiler():
        return None
    sizes = [f"-D{name}={value}" for name, value in (("D", D), ("E", E), ("M", M)) if value]
    try:
        try:
            built = _load(kept(), sizes)
        except (OSError, RuntimeError):  # no home, a folder that cannot be written, or nothing run from
            with tempfile.TemporaryDirectory(prefix="kvfrontier-") as folder:
                built = _load(Path(folder), sizes)
    except (subprocess.CalledProcessError, OSError) as e:
        said = e.stderr.decode(errors="replace") if isinstance(e, subprocess.CalledProcessError) else str(e)
        reason = (said.strip().splitlines() or ["no message"])[0]
        warnings.warn(f"decode, prefill and training go without the C++ kernel, more slowly: {reason}", stacklevel=2)
        return None
    if not D:
        built.take.errcheck = built.cross_entropy.errcheck = _all_there
        built.read_all.restype = ctypes.c_float
    return built


def kept() -> Path:
    """Where libraries stay that were built: $XDG_CACHE_HOME/kvfrontier/kernels, else ~/.cache/kvfrontier/kernels."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvfrontier" / "kernels"


def _load(folder: Path, sizes: list[str]) -> ctypes.CDLL:
    """Built, unless the folder has one of the same source, flags, compiler and processor."""
    command = [compiler(), *FLAGS, *sizes]
    macros = subprocess.run([*command, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, check=True).stdout
    key = hashlib.sha256(b"\0".join((macros, " ".join(command).encode(), SOURCE.read_bytes()))).hexdigest()[:24]
    path = folder / f"{key}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as new:
            subprocess.run([*command, "-o", f"{new}/new.so", str(SOURCE)], capture_output=True, check=True)
            os.replace(f"{new}/new.so", path)  # whole, whoever else builds it
    return ctypes.CDLL(str(path))


def _all_there(missing: int, *call: Any) -> None:
    if missing:
        raise IndexError(f"{missing} of the numbers are out of range")


def bound(function: Callable, *arguments: Tensor | float | None) -> Callable[[], Any]:
    """A call of a function in C: tensors by address (keep them), whole numbers as long, others as float."""

    def in_c(x: Tensor | float | None) -> Any:
        if x is None or isinstance(x, Tensor):
            return ctypes.c_void_p(None if x is None else x.data_ptr())
        return ctypes.c_float(x) if isinstance(x, float) else ctypes.c_long(x)

    return partial(function, *map(in_c, arguments))


def reader(x: Tensor) -> Callable[[], float] | None:
    """Reads all of x as fast as the kernel could, returns the sum; for 2^17 fp32 numbers, or a multiple, on a CPU."""
    built = build()
    return built and (lambda: bound(built.read_all, x, x.numel(), torch.get_num_threads())())


def takes(*tensors: Tensor, learns: bool = False) -> bool:
    """Whether the operators below may get these: fp32 on a CPU, and a compiler to build them.

    No gradient is wanted either, unless there is one (`learns`). torch.compile makes its own, torch.func needs torch's.
    """
    grad = torch.is_grad_enabled() and not learns
    for x in tensors:
        if not x.is_cpu or x.dtype != torch.float32 or (grad and x.requires_grad):
            return False
    return not torch.compiler.is_compiling() and not transformed() and build() is not None


def transformed() -> bool:
    """Whether torch.func (grad, vmap, ...) or forward-mode differentiation is at work: neither knows our operators."""
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


def takes_attention(q_BHTD: Tensor, k_BGSD: Tensor, v_BGSE: Tensor) -> bool:
    """Whether `split_kv` takes these: also one token, and no gaps between tokens or between queries."""
    (H, T, D), (G, _, E) = q_BHTD.shape[1:], v_BGSE.shape[1:]
    fits = T == 1 and q_BHTD[0].is_contiguous() and k_BGSD.stride()[2:] == v_BGSE.stride()[2:] == (D, 1)
    fits = fits and takes(q_BHTD, k_BGSD, v_BGSE)
    if fits and D != E:  # values are columns of the keys
        fits = v_BGSE.data_ptr() == k_BGSD.data_ptr() and v_BGSE.stride() == k_BGSD.stride()
    return fits and build(D, E, H // G) is not None


def takes_causal(q_BHTD: Tensor, k_BGSD: Tensor, v_BGSE: Tensor) -> bool:
    """Whether `causal` takes these, once they are in fp32, and keys and values have no gaps.

    Of few tokens torch's is as fast. It has gradients, and torch.compile takes it as it is.
    """
    (T, D), E = q_BHTD.shape[2:], v_BGSE.shape[3]
    widened = torch.is_autocast_enabled("cpu")  # torch's would be, too
    ours = all(x.is_cpu and (widened or x.dtype == torch.float32) for x in (q_BHTD, k_BGSD, v_BGSE))
    ours = ours and (torch.compiler.is_compiling() or not transformed())
    return ours and T >= 8 and q_BHTD.stride(3) == 1 and builds(D, E)


@torch.compiler.assume_constant_result
def builds(D: int, E: int) -> bool:
    return build(D, E) is not None


def takes_few(x: Tensor, *weights: Tensor) -> bool:
    """Whether `linear` or `swiglu` takes these: also few rows, and sizes of 16 or more."""
    for w in weights:
        if min(w.shape) < 16 or not w.is_contiguous():
            return False
    return x.numel() <= FEW * x.shape[-1] and not torch.is_autocast_enabled("cpu") and takes(x, *weights)


def takes_heads(x_BHTK: Tensor, weight_HKF: Tensor) -> bool:
    """Whether `head_linear` takes these: also one token of few sequences, and sizes that are multiples of 16."""
    B, _, T, K = x_BHTK.shape
    fits = T == 1 and B <= FEW and K % 16 == weight_HKF.shape[2] % 16 == 0
    fits = fits and x_BHTK.stride(3) == 1 and 1 in weight_HKF.stride()[1:]
    return fits and takes(x_BHTK, weight_HKF)


def takes_retention(q_BH1D: Tensor, k_BH1D: Tensor, v_BH1D: Tensor, decay_BH1: Tensor, state_BHDD: Tensor) -> bool:
    """Whether `retention` takes these: also nothing between heads."""
    dense = all(x[0].is_contiguous() for x in (q_BH1D, k_BH1D, v_BH1D)) and decay_BH1.is_contiguous()
    return dense and state_BHDD.is_contiguous() and takes(q_BH1D, k_BH1D, v_BH1D, decay_BH1, state_BHDD)


library = torch.library.Library("kvfrontier", "DEF")
Prepared = tuple[Any, Callable[[], object]]
PREPARE: dict[Any, Callable[..., Prepared]] = {}


def operator(schema: str) -> Callable[[Callable[..., Prepared]], Callable]:
    """Makes an operator of torch's, seen by what counts operators, of what returns its result and a call that fills it.

    The call goes by addresses: a step that is recorded (graph.py) keeps it, and all that it was prepared with.
    """

    def define(prepare: Callable[..., Prepared]) -> Callable:
        def run(*arguments: Any) -> Any:
            result, call = prepare(*arguments)
            call()
            return result

        name = schema.partition("(")[0]
        library.define(schema)
        library.impl(name, run, "CPU")
        made = getattr(torch.ops.kvfrontier, name).default
        PREPARE[made] = prepare
        return made

    return define


@operator("split_kv(Tensor q, Tensor k, Tensor v, float scale, Tensor? position=None, Tensor? table=None) -> Tensor")
def split_kv(
    q_BHTD: Tensor,
    k_BGSD: Tensor,
    v_BGSE: Tensor,
    scale: float,
    position: Tensor | None = None,
    table_BN: Tensor | None = None,
) -> Prepared:
    """Attention of one token over S tokens, or those up to `position`, query head h using KV head h // (H/G).

    Returns (B, H, 1, E). Queries have no gaps within a sequence, keys and values none between tokens. The position is
    that of all (1), or one for each sequence (B). With a table each sequence's tokens are in the blocks it numbers, of
    keys (P, G, C, D) and values (P, G, C, E): C is a multiple of 16, or there is one block.
    """
    B, H, T, D = q_BHTD.shape
    G, C, E = v_BGSE.shape[1:]
    blocks = 1 if table_BN is None else table_BN.shape[1]
    out_BHTE = q_BHTD.new_empty(B, H, T, E)
    tensors = q_BHTD, k_BGSD, v_BGSE, out_BHTE
    sizes = q_BHTD.stride(0), *k_BGSD.stride()[:2], *v_BGSE.stride()[:2], B, G, blocks * C
    held = position, position is not None and len(position) > 1, table_BN, blocks, C
    return out_BHTE, bound(build(D, E, H // G).split_kv, *tensors, *sizes, *held, scale, torch.get_num_threads())


@operator("causal(Tensor q, Tensor k, Tensor v, float scale, int? window=None) -> (Tensor, Tensor)")
def causal(q_BHTD: Tensor, k_BGSD: Tensor, v_BGSE: Tensor, scale: float, window: int | None = None) -> Prepared:
    """Causal attention of the last T of S tokens, query head h using KV head h // (H/G).

    With a window each token sees only itself and the window - 1 before it.
    Returns (B, H, T, E), laid out as (B, T, H, E), and of each query log2 of the sum of its weights 2^score (B, H, T).
    Keys and values have no gaps between tokens. It has gradients.
    """
    B, H, T, D = q_BHTD.shape
    G, S, E = v_BGSE.shape[1:]
    out_BTHE = q_BHTD.new_empty(B, T, H, E)
    strides = *q_BHTD.stride()[:3], *k_BGSD.stride()[:2], *v_BGSE.stride()[:2]
    sizes = B, H, G, T, S, S if window is None else window, scale, torch.get_num_threads()
    weight_BHT = q_BHTD.new_empty(B, H, T)
    call = bound(build(D, E).causal, q_BHTD, k_BGSD, v_BGSE, out_BTHE, weight_BHT, *strides, *sizes)
    return (out_BTHE.transpose(1, 2), weight_BHT), call


@operator(
    "causal_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor weight, float scale, "
    "int? window=None) -> (Tensor, Tensor, Tensor)"
)
def causal_backward(
    grad_BHTE: Tensor,
    q_BHTD: Tensor,
    k_BGSD: Tensor,
    v_BGSE: Tensor,
    out_BHTE: Tensor,
    weight_BHT: Tensor,
    scale: float,
    window: int | None = None,
) -> Prepared:
    """Gradients of `causal`: of queries, and of keys and values each query head's own, (B, H, S, D) and (B, H, S, E).

    All are laid out as (B, tokens, H, size). Results and their gradients have no gaps within a query's.
    """
    B, H, T, D = q_BHTD.shape
    G, S, E = v_BGSE.shape[1:]
    found = [q_BHTD.new_empty(B, tokens, H, size) for tokens, size in ((T, D), (S, D), (S, E))]
    tensors = grad_BHTE, q_BHTD, k_BGSD, v_BGSE, out_BHTE, weight_BHT, *found
    strides = *grad_BHTE.stride()[:3], *q_BHTD.stride()[:3], *k_BGSD.stride()[:2], *v_BGSE.stride()[:2]
    sizes = *out_BHTE.stride()[:3], B, H, G, T, S, S if window is None else window, scale, torch.get_num_threads()
    return tuple(x.transpose(1, 2) for x in found), bound(build(D, E).causal_backward, *tensors, *strides, *sizes)


@torch.library.register_fake(causal, lib=library)
def _(q_BHTD, k_BGSD, v_BGSE, scale, window=None):
    B, H, T, _ = q_BHTD.shape
    return q_BHTD.new_empty(B, T, H, v_BGSE.shape[3]).transpose(1, 2), q_BHTD.new_empty(B, H, T)


@torch.library.register_fake(causal_backward, lib=library)
def _(grad_BHTE, q_BHTD, k_BGSD, v_BGSE, out_BHTE, weight_BHT, scale, window=None):
    B, H, T, D = q_BHTD.shape
    S, E = v_BGSE.shape[2:]
    return tuple(q_BHTD.new_empty(B, tokens, H, size).transpose(1, 2) for tokens, size in ((T, D), (S, D), (S, E)))


def _keeps(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *ctx.how = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx, grad_BHTE: Tensor, _) -> tuple:
    q_BHTD, k_BGSD, *rest = ctx.saved_tensors
    grad_BHTE = grad_BHTE if grad_BHTE.stride(3) == 1 else grad_BHTE.contiguous()
    q_grad, *grads = causal_backward(grad_BHTE, q_BHTD, k_BGSD, *rest, *ctx.how)
    H, G = q_BHTD.shape[1], k_BGSD.shape[1]
    return q_grad, *(x if H == G else x.unflatten(1, (G, H // G)).sum(2) for x in grads), None, None


def _no_second_gradients(ctx, *grads: Tensor) -> None:
    raise NotImplementedError("attention has no second gradients on a CPU")


torch.library.register_autograd(causal, _gradients, setup_context=_keeps, lib=library)
torch.library.register_autograd(causal_backward, _no_second_gradients, lib=library)


def learning(made: Callable, gradients: Callable, tensors: slice = slice(None)) -> Callable:
    """An operator with gradients: `gradients` gives them for that of its result, followed by its arguments.

    Of those some are `tensors`, or None, that it needs.
    """

    class Learning(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Tensor:
            kept = arguments[tensors]
            ctx.save_for_backward(*(x for x in kept if x is None or isinstance(x, Tensor)))
            ctx.others = [x for x in kept if not (x is None or isinstance(x, Tensor))]
            return made(*arguments)

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            return gradients(grad, *ctx.saved_tensors, *ctx.others)

    def run(*arguments: Any) -> Tensor:
        return Learning.apply(*arguments) if torch.is_grad_enabled() else made(*arguments)

    return run


@operator("put(Tensor(a!) stream, Tensor new, Tensor position) -> ()")
def put(stream_BGSD: Tensor, new_BG1D: Tensor, position: Tensor) -> Prepared:
    """Writes one token's vectors into the slot that `position` says."""
    B, G, _, D = new_BG1D.shape
    strides = *stream_BGSD.stride()[:2], *new_BG1D.stride()[:2]
    return None, bound(build().put, stream_BGSD, new_BG1D, position, B, G, D, *strides)


@operator("linear(Tensor x, Tensor weight) -> Tensor")
def linear(x: Tensor, weight_FK: Tensor) -> Prepared:
    """x (..., K) weight^T; (..., F). x is contiguous."""
    F, K = weight_FK.shape
    out = x.new_empty(*x.shape[:-1], F)
    return out, bound(build().linear, x, weight_FK, out, x.numel() // K, K, F, torch.get_num_threads())


@operator("swiglu(Tensor x, Tensor gate_up, Tensor down) -> Tensor")
def swiglu(x: Tensor, gate_up_GK: Tensor, down_KF: Tensor) -> Prepared:
    """(silu(x gate^T) * (x up^T)) down^T of x (..., K), gate and up one after the other (arXiv 2002.05202).

    x is contiguous.
    """
    K, F = down_KF.shape
    out = torch.empty_like(x)
    return out, bound(build().swiglu, x, gate_up_GK, down_KF, out, x.numel() // K, K, F, torch.get_num_threads())


@operator("gated(Tensor gate_up) -> Tensor")
def gated(gate_up: Tensor) -> Prepared:
    """silu(gate) * up of the halves of (..., 2 F), which is contiguous; (..., F)."""
    F = gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], F)
    return out, bound(build().gated_rows, gate_up, out, out.numel() // F, F, torch.get_num_threads())


@operator("gated_backward(Tensor grad, Tensor gate_up) -> Tensor")
def gated_backward(grad: Tensor, gate_up: Tensor) -> Prepared:
    """Of gate and up, (..., 2 F); both arguments are contiguous."""
    F = gate_up.shape[-1] // 2
    found = torch.empty_like(gate_up)
    return found, bound(
        build().gated_rows_backward, grad, gate_up, found, grad.numel() // F, F, torch.get_num_threads()
    )


learning_gated = learning(gated, lambda grad, gate_up: gated_backward(grad.contiguous(), gate_up))


@operator("cross_entropy(Tensor(a!) logits, Tensor targets) -> Tensor")
def cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> Prepared:
    """Nats (N); the logits become its gradients: softmax, less 1 at the target. IndexError for a target of no logit.

    Both are contiguous, targets int64.
    """
    nats_N = logits_NV.new_empty(len(logits_NV))
    return nats_N, bound(build().cross_entropy, logits_NV, targets_N, nats_N, *logits_NV.shape, torch.get_num_threads())


@operator("take(Tensor table, Tensor index) -> Tensor")
def take(table_VW: Tensor, index: Tensor) -> Prepared:
    """Rows of a table, (..., W); both arguments contiguous. IndexError for a number of no row."""
    out = table_VW.new_empty(*index.shape, table_VW.shape[1])
    return out, bound(build().take, table_VW, index, out, index.numel(), *table_VW.shape)


@operator("rope(Tensor position, Tensor frequencies) -> (Tensor, Tensor)")
def rope(position: Tensor, frequencies: Tensor) -> Prepared:
    """Cosine and sine (1, D/2) of one position times the frequencies."""
    table = frequencies.new_empty(1, len(frequencies)), frequencies.new_empty(1, len(frequencies))
    return table, bound(build().rope, position, frequencies, *table, len(frequencies))


@operator("rotate(Tensor x, Tensor cosine, Tensor sine) -> Tensor")
def rotate(x_BHTD: Tensor, cosine: Tensor, sine: Tensor) -> Prepared:
    """Rotary positions by tables that broadcast to (B, 1, T, D/2), whose rows have no gaps; (B, H, T, D)."""
    B, H, T, D = x_BHTD.shape
    out = x_BHTD.new_empty(B, H, T, D)
    rows = cosine.expand(B, 1, T, D // 2).stride()
    strides = *x_BHTD.stride()[:3], rows[0], rows[2]
    call = bound(build().rotate, x_BHTD, cosine, sine, out, B, H, T, D // 2, *strides, torch.get_num_threads())
    return out, call


def _turned_back(grad: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor | None, ...]:
    grad = grad if grad.stride(3) == 1 else grad.contiguous()
    return rotate(grad, cosine.contiguous(), (-sine).contiguous()), None, None


learning_rotate = learning(rotate, _turned_back, slice(1, None))  # x itself is not needed


@operator("fade(Tensor(a!) scores, Tensor q, Tensor k, Tensor log_decay) -> ()")
def fade(scores_NCC: Tensor, q_NCD: Tensor, k_NCD: Tensor, log_decay_NC: Tensor) -> Prepared:
    """Scores of earlier tokens of a chunk fade by summed log decays; a token's own is summed in fp64; others are 0.

    All are contiguous, N is any number of dimensions.
    """
    C, D = q_NCD.shape[-2:]
    sizes = log_decay_NC.numel() // C, C, D, torch.get_num_threads()
    return None, bound(build().fade, scores_NCC, q_NCD, k_NCD, log_decay_NC, *sizes)


@operator("rms_norm(Tensor x, Tensor? weight, float eps) -> Tensor")
def rms_norm(x_NW: Tensor, weight: Tensor | None, eps: float) -> Prepared:
    """x / sqrt(mean(x^2) + eps), times a weight, over the last dimension (RMSNorm, arXiv 1910.07467)."""
    out = x_NW.new_empty(x_NW.shape)
    sizes = *x_NW.shape, x_NW.stride(0)
    return out, bound(build().rms_norm, x_NW, weight, out, *sizes, eps, torch.get_num_threads())


@operator("rms_norm_backward(Tensor grad, Tensor x, Tensor? weight, float eps) -> (Tensor, Tensor)")
def rms_norm_backward(grad_NW: Tensor, x_NW: Tensor, weight: Tensor | None, eps: float) -> Prepared:
    """Of x (N, W), and parts of the weight's (16, W) to be summed; the gradient is contiguous."""
    found, parts = torch.empty_like(grad_NW), grad_NW.new_empty(16, grad_NW.shape[1])
    sizes = len(parts), *x_NW.shape, x_NW.stride(0)
    tensors = grad_NW, x_NW, weight, found, parts
    return (found, parts), bound(build().rms_norm_backward, *tensors, *sizes, eps, torch.get_num_threads())


def _norms_gradients(grad: Tensor, x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor | None, ...]:
    of_x, parts = rms_norm_backward(grad.contiguous(), x, weight, eps)
    return of_x, None if weight is None else parts.sum(0), None


learning_rms_norm = learning(rms_norm, _norms_gradients)


@operator("head_linear(Tensor x, Tensor weight) -> Tensor")
def head_linear(x_BH1K: Tensor, weight_HKF: Tensor) -> Prepared:
    """One token's heads, each times a matrix of its own; (B, H, 1, F)."""
    B, H, _, K = x_BH1K.shape
    F = weight_HKF.shape[2]
    out = x_BH1K.new_empty(B, H, 1, F)
    transposed = weight_HKF.stride(2) != 1
    steps = *x_BH1K.stride()[:2], weight_HKF.stride(0), weight_HKF.stride(2 if transposed else 1)
    sizes = B, H, K, F, *steps, transposed
    return out, bound(build().head_linear, x_BH1K, weight_HKF, out, *sizes, torch.get_num_threads())


@operator("join(Tensor a, Tensor b) -> Tensor")
def join(a_BH1D: Tensor, b_BH1E: Tensor) -> Prepared:
    """One token's vectors side by side, (B, H, 1, D + E)."""
    B, H, _, D = a_BH1D.shape
    out = a_BH1D.new_empty(B, H, 1, D + b_BH1E.shape[3])
    sizes = B, H, D, b_BH1E.shape[3], *a_BH1D.stride()[:2], *b_BH1E.stride()[:2]
    return out, bound(build().join, a_BH1D, b_BH1E, out, *sizes)


@operator("add(Tensor x, Tensor y) -> Tensor")
def add(x: Tensor, y: Tensor) -> Prepared:
    """Of the same shape, both contiguous."""
    out = torch.empty_like(x)
    return out, bound(build().add, x, y, out, x.numel())


@operator("retention(Tensor q, Tensor k, Tensor v, Tensor decay, Tensor(a!) state) -> Tensor")
def retention(q_BH1D: Tensor, k_BH1D: Tensor, v_BH1D: Tensor, decay_BH1: Tensor, state_BHDD: Tensor) -> Prepared:
    """One token of gated retention, which changes the state; (B, H, 1, D). Queries, keys and values have no gaps."""
    B, H, _, D = q_BH1D.shape
    out = q_BH1D.new_empty(B, H, 1, D)
    tensors = q_BH1D, k_BH1D, v_BH1D, decay_BH1, state_BHDD, out
    batches = [x.stride(0) for x in tensors[:3]]
    return out, bound(build().retention, *tensors, B, H, D, *batches, torch.get_num_threads())


@register_flop_formula(split_kv.overloadpacket)
def _attention_flops(q_shape, k_shape, v_shape, scale, position=None, table_shape=None, *, out_shape=None) -> int:
    B, H, T, D = q_shape
    blocks = 1 if table_shape is None else table_shape[1]
    return 2 * B * H * T * blocks * v_shape[2] * (D + v_shape[3])


@register_flop_formula(causal.overloadpacket)
def _causal_flops(q_shape, k_shape, v_shape, scale, window=None, *, out_shape=None) -> int:
    return 2 * math.prod(q_shape[:3]) * min(k_shape[2], window or k_shape[2]) * (k_shape[3] + v_shape[3])


@register_flop_formula(causal_backward.overloadpacket)
def _causal_backward_flops(grad_shape, q_shape, k_shape, v_shape, out, weight, scale, window=None, **kwargs) -> int:
    """Five products: scores and gradients of weights, of queries, of keys and of values."""
    pairs = math.prod(q_shape[:3]) * min(k_shape[2], window or k_shape[2])
    return 2 * pairs * (3 * k_shape[3] + 2 * v_shape[3])


@register_flop_formula(linear.overloadpacket)
def _linear_flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * math.prod(x_shape) * weight_shape[0]


@register_flop_formula(swiglu.overloadpacket)
def _swiglu_flops(x_shape, gate_up_shape, down_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * math.prod(x_shape) * (gate_up_shape[0] + down_shape[1])


@register_flop_formula(head_linear.overloadpacket)
def _head_linear_flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * math.prod(x_shape) * weight_shape[2]


@register_flop_formula(retention.overloadpacket)
def _retention_flops(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    return 4 * math.prod(q_shape) * q_shape[3]
