"""How fast a variant decodes, and how near the machine's memory limit that is.

Prefill and decode are timed apart, caches allocated beforehand, after warm-up, with the device synchronised around each
measurement; medians with interquartile ranges. The roof is the read bandwidth of the same device in the same run.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from archs import Decoder

WARMUP_STEPS = 3
STEPS = 40
SECONDS_A_POINT = 1.0  # of prefills, and of decode steps; at least MIN_REPEATS of each
MIN_REPEATS = 5
MEMORY_BOUND = 0.5  # share of the roof from which on memory is said to set a step's time
ROOF_BYTES = 2**28  # more than the last-level cache of a GPU or of most CPUs


@dataclass(frozen=True)
class Timing:
    """Of one measurement repeated, in milliseconds."""

    median: float
    iqr: float


def timed(step: Callable[[], object], device: torch.device, repeats: int, warmup: int, before=lambda: None) -> Timing:
    """Times `step` up to `repeats` times, fewer when that takes long; `before` runs untimed before each."""
    times: list[float] = []
    began = time.perf_counter()
    for n in range(warmup + repeats):
        before()
        _synchronize(device)
        start = time.perf_counter()
        step()
        _synchronize(device)
        if n >= warmup:
            times.append((time.perf_counter() - start) * 1e3)
        if len(times) >= MIN_REPEATS and time.perf_counter() - began > SECONDS_A_POINT:
            break
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return Timing(median, high - low)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_roof(device: torch.device) -> float:
    """Bytes a second, in GB/s, at which the device reads a large array: the best of several reductions."""
    x = torch.ones(ROOF_BYTES // 4, device=device)
    reductions = (x.sum, x.amax, lambda: torch.dot(x, x))
    return x.nbytes / min(timed(f, device, 2 * MIN_REPEATS, 2).median for f in reductions) / 1e6


def measure_decode(model: Decoder, batches: list[int], contexts: list[int], roof_gb_s: float) -> Iterator[dict]:
    """The record's `decode`, a grid point at a time. A point that does not fit in memory is left out."""
    for batch in batches:
        for context in contexts:
            device, dtype = model.embed.weight.device, model.embed.weight.dtype
            if batch * model.kv_stored_bytes(context + WARMUP_STEPS + STEPS, dtype) > 0.8 * _free_bytes(device):
                continue
            try:
                yield _decode_point(model, batch, context, roof_gb_s)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()


@torch.inference_mode()
def _decode_point(model: Decoder, batch: int, context: int, roof_gb_s: float) -> dict:
    """`context` is the length of the prompt; the decode steps that are timed follow it.

    Bytes that a step must read: every weight that it multiplies with, once, and the batch's cache.
    """
    device, dtype = model.embed.weight.device, model.embed.weight.dtype
    cache = model.new_cache(batch, context + WARMUP_STEPS + STEPS)
    prompt = torch.randint(model.options.vocab_size, (batch, context), device=device)
    prefill = timed(partial(model.prefill, prompt, cache), device, MIN_REPEATS, 1, before=cache.reset)
    step = timed(partial(model.decode, prompt[:, 0], cache), device, STEPS, WARMUP_STEPS)
    seconds = step.median / 1e3
    weight_bytes = model.matmul_flops() // 2 * dtype.itemsize
    kv_bytes = batch * model.kv_read_bytes((context + cache.length) // 2, dtype)
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
        "backend": "torch sdpa",
        "device": device.type,
    }


@torch.inference_mode()
def measure_recompute(model: Decoder, context: int) -> dict:
    """Why the cache exists: milliseconds for the token after `context` others, with the cache and from scratch."""
    device = model.embed.weight.device
    prompt = torch.randint(model.options.vocab_size, (1, context), device=device)
    cache = model.new_cache(1, context + WARMUP_STEPS + STEPS)
    model.prefill(prompt, cache)
    cached = timed(partial(model.decode, prompt[:, 0], cache), device, STEPS, WARMUP_STEPS)
    recomputed = timed(partial(model.prefill, prompt, cache), device, MIN_REPEATS, 1, before=cache.reset)
    return {"batch": 1, "context": context, "cached_ms": cached.median, "recomputed_ms": recomputed.median}


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
