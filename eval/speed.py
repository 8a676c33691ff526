"""How fast a variant decodes, and how near the machine's memory limit that is.

Prefill and decode are timed apart, caches allocated beforehand, after warm-up, a GPU's by its own clock; medians with
interquartile ranges. The roof is the read bandwidth of the same device in the same run.
"""

import gc
import math
import operator
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from archs import Cache, Decoder, ops
from train.errors import out_of_memory

if TYPE_CHECKING:
    from eval.subject import EvalContext

REPEATED = True  # in each round of the evaluation
DECODE_STEPS = 40  # room in the cache after the prompt; longer samples go through it again
SECONDS = 0.3  # at least, of prefills and of decode steps at each point
MEMORY_BOUND = 0.5  # share of the roof from which on memory is said to set a step's time
ROOF_BYTES = {"cpu": 2**28, "cuda": 2**31}  # far more than the last-level cache; on a GPU also than a launch's worth


def measure(subject: "EvalContext") -> dict:
    """decode: a point for each batch and context of the study's grid; decode_skipped: those that did not fit;
    recompute: the time of a token without a cache. Of what was timed in an earlier round too, the faster."""
    model, before = subject.model, subject.measured
    known = {(point["batch"], point["context"]): point for point in before.get("decode", [])}
    measured: dict = {"decode": [], "decode_skipped": []}
    grid = subject.config.decode
    if grid.seeds is not None and subject.seed not in grid.seeds:  # a shape's speed depends on no seed
        return measured
    for point in measure_decode(model, grid.batch, sorted(grid.context), subject.roof_gb_s):
        if "skipped" in point:
            measured["decode_skipped"].append(point)
            subject.show(f"batch {point['batch']} context {point['context']}: {point['skipped']}")
        else:
            rounds = point, known.get((point["batch"], point["context"]), point)
            steps, prefill = (min(rounds, key=operator.itemgetter(name)) for name in ("token_ms", "prefill_ms"))
            roof = max(each["roof_gb_s"] for each in rounds)
            fraction = steps["roof_fraction"] * steps["roof_gb_s"] / roof
            steps |= {"roof_gb_s": roof, "roof_fraction": fraction, "memory_bound": fraction >= MEMORY_BOUND}
            measured["decode"].append(steps | {name: prefill[name] for name in ("prefill_ms", "prefill_ms_iqr")})
            subject.show(f"batch {point['batch']} context {point['context']}: {point['tokens_per_s']:,.0f} tokens/s")
    if measured["decode"]:
        recompute = measure_recompute(model, max(point["context"] for point in measured["decode"]))
        known = before.get("recompute", recompute)
        times = {name: min(recompute[name], known[name]) for name in ("cached_ms", "recomputed_ms")}
        measured["recompute"] = recompute | times
    return measured


@dataclass(frozen=True)
class Timing:
    """Of one measurement repeated, in milliseconds."""

    median: float
    iqr: float


def timed(step: Callable[[], object], device: torch.device, repeats: int, warmup: int, before=lambda: None) -> Timing:
    """Times `step` at least `repeats` times and for SECONDS; `before` runs untimed before each.

    A GPU is not waited for between steps, or the wait would be part of them: its own clock tells them apart.
    """
    clock = _gpu_ms if device.type == "cuda" else _cpu_ms
    clock(step, before, warmup)
    times: list[float] = []
    while len(times) < repeats or sum(times) < SECONDS * 1e3:
        times += clock(step, before, repeats)
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return Timing(median, high - low)


def _cpu_ms(step: Callable[[], object], before: Callable[[], object], repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        before()
        start = time.perf_counter()
        step()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def _gpu_ms(step: Callable[[], object], before: Callable[[], object], repeats: int) -> list[float]:
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in marks:
        before()
        start.record()
        step()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in marks]


def measure_roof(device: torch.device) -> float:
    """Bytes a second, in GB/s, at which the device reads a large array: the best of several ways."""
    x = ops.zeros((ROOF_BYTES[device.type] // 4,), torch.float32, device)
    if x.is_cuda:
        x.normal_()  # zeros take less power, so a GPU reads them faster
    return x.nbytes / min(timed(read, device, 10, 2).median for read in reads(x).values()) / 1e6


def reads(x: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Ways to read all of a large array."""
    ways = {"sum": x.sum, "max": x.amax, "dot": lambda: torch.dot(x, x)}
    return ways | {"prefetched": lambda: ops.read_all(x)}


def measure_decode(model: Decoder, batches: list[int], contexts: list[int], roof_gb_s: float) -> Iterator[dict]:
    """The record's `decode`, a grid point at a time; one that does not fit has `skipped`, the reason, and no times."""
    device, dtype = model.embed.weight.device, model.embed.weight.dtype
    for batch in batches:
        for context in contexts:
            cache_bytes = batch * model.kv_stored_bytes(context + DECODE_STEPS, dtype)
            free = _free_bytes(device)
            if cache_bytes > 0.8 * free:
                gc.collect()  # slow, so only where it may help
                free = _free_bytes(device)
            if cache_bytes > 0.8 * free:
                reason = f"the cache needs {cache_bytes / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free"
                yield {"batch": batch, "context": context, "skipped": reason}
                continue
            try:
                yield _decode_point(model, batch, context, roof_gb_s)
                continue
            except (RuntimeError, MemoryError, OSError) as e:
                if not out_of_memory(e):
                    raise
                reason = (str(e) or "out of memory").splitlines()[0]
            yield {"batch": batch, "context": context, "skipped": reason}


@torch.inference_mode()
def _decode_point(model: Decoder, batch: int, context: int, roof_gb_s: float) -> dict:
    """`context` is the length of the prompt; the decode steps that are timed follow it.

    Bytes that a step must read: every weight that it multiplies with, once, and the batch's cache.
    """
    device, dtype = model.embed.weight.device, model.embed.weight.dtype
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    cache = model.new_cache(batch, context + DECODE_STEPS)
    prompt = torch.randint(model.options.vocab_size, (batch, context), device=device)
    prefill = timed(partial(model.prefill, prompt, cache), device, 2, 1, before=cache.reset)
    step = _timed_steps(model, prompt[:, 0], cache, context)
    seconds = step.median / 1e3
    weight_bytes = model.weights_read(context + DECODE_STEPS // 2) * dtype.itemsize
    kv_bytes = batch * model.kv_read_bytes(context + DECODE_STEPS // 2, dtype)
    roof_fraction = (weight_bytes + kv_bytes) / seconds / 1e9 / roof_gb_s
    return {
        "batch": batch,
        "context": context,
        "prefill_ms": prefill.median,
        "prefill_ms_iqr": prefill.iqr,
        "token_ms": step.median,
        "token_ms_iqr": step.iqr,
        "tokens_per_s": batch / seconds,
        "kv_read_gb_s": kv_bytes / seconds / 1e9,
        "roof_gb_s": roof_gb_s,
        "roof_fraction": roof_fraction,
        "memory_bound": roof_fraction >= MEMORY_BOUND,
        "backend": attention_backend(model, prompt[:, 0], cache),
        "device": device.type,
    } | ({"peak_bytes": torch.cuda.max_memory_allocated()} if device.type == "cuda" else {})


def _timed_steps(model: Decoder, tokens_B: torch.Tensor, cache: Cache, context: int) -> Timing:
    """Decode steps from `context` on; when the cache is full they begin again there, over what it held."""

    def rewind() -> None:
        if cache.length == cache.max_tokens:
            cache.length = context

    return timed(partial(model.decode, tokens_B, cache), tokens_B.device, DECODE_STEPS, 3, before=rewind)


@torch.inference_mode()
def measure_recompute(model: Decoder, context: int) -> dict:
    """Why the cache exists: milliseconds for the token after `context` others, with the cache and from scratch."""
    device = model.embed.weight.device
    prompt = torch.randint(model.options.vocab_size, (1, context), device=device)
    cache = model.new_cache(1, context + DECODE_STEPS)
    model.prefill(prompt, cache)
    cached = _timed_steps(model, prompt[:, 0], cache, context)
    recomputed = timed(partial(model.prefill, prompt, cache), device, 2, 1, before=cache.reset)
    return {"batch": 1, "context": context, "cached_ms": cached.median, "recomputed_ms": recomputed.median}


def attention_backend(model: Decoder, tokens_B: torch.Tensor, cache: Cache) -> str:
    """The kernel of a decode step's attention: PyTorch's, such as `sdpa flash` (`math`: none is fused), or this
    project's, or the variant's own operators."""
    if model.attends_itself:
        return ", ".join(filter(None, ["operators of the variant", cache.step and cache.step.how]))
    if cache.step:
        return cache.step.backend
    cache.length -= 1
    return ops.attention_kernels(lambda: model.decode(tokens_B, cache))


def _free_bytes(device: torch.device) -> float:
    """Memory that can be had; infinite where the system does not say."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return math.inf
