"""The largest batch whose caches fit into the device's memory together with the weights."""

from typing import TYPE_CHECKING

import torch

from archs import Decoder
from train.errors import out_of_memory
from train.machine import describe_machine

if TYPE_CHECKING:
    from eval.subject import EvalContext

STEP = 0.98  # what is left of a batch that a GPU could not allocate


def measure(subject: "EvalContext") -> dict:
    """capacity: {memory_bytes, largest_batch: {"<context>": n}}, by formula, for the contexts of the decode grid; on a
    GPU also `allocated_batch`, the largest one that could be allocated."""
    model, dtype = subject.model, subject.dtype
    device, contexts = model.embed.weight.device, sorted(subject.config.decode.context)
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = describe_machine()["machine"]["memory_bytes"]
    if memory is None:  # Windows does not say
        return {"capacity": {"memory_bytes": None, "largest_batch": {}}}
    batches = {context: largest_batch(model, context, dtype, memory) for context in contexts}
    capacity = {"memory_bytes": memory, "largest_batch": {str(context): n for context, n in batches.items()}}
    if device.type == "cuda":
        tried = {str(context): allocated_batch(model, context, dtype, n) for context, n in batches.items()}
        capacity["allocated_batch"] = tried
    subject.show(f"{batches[contexts[-1]]:,} sequences of {contexts[-1]:,} tokens fit into memory")
    return {"capacity": capacity}


def largest_batch(model: Decoder, context: int, dtype: torch.dtype, memory: int) -> int:
    """Sequences of `context` tokens whose caches fit into `memory` bytes beside the weights in `dtype`."""
    weights = model.count_params() * dtype.itemsize
    return max(0, memory - weights) // model.kv_stored_bytes(context, dtype)


def allocated_batch(model: Decoder, context: int, dtype: torch.dtype, batch: int) -> int:
    """The largest batch, from `batch` down in steps of 2 %, whose caches the device can allocate."""
    while batch:
        try:
            model.new_cache(batch, context, dtype)
            break
        except (RuntimeError, MemoryError) as e:
            if not out_of_memory(e):
                raise
        batch = int(STEP * batch)
    torch.cuda.empty_cache()
    return batch
