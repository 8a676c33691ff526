"""Cache bytes of one sequence: measured from the storages of caches that were really filled, and by formula.

The two must be equal. A difference means that a variant keeps more (or less) than its paper says, and is an error.
"""

from collections.abc import Iterable

import torch

from archs import Decoder
from eval.subject import EvalContext

FILLED = 4096  # tokens at most: caches longer than that, for windows longer than that, are allocated and filled so far
CONTEXTS = [2**n for n in range(10, 21)]  # 1K to 1M tokens


class BytesDiffer(RuntimeError):
    """What a cache holds is not what the formula says."""


def measure(subject: EvalContext) -> dict:
    """kv: see measure_memory, for a cache of the dtype that is decoded with."""
    kv = measure_memory(subject.model, subject.dtype, subject.config.decode.context)
    subject.show(f"{kv['bytes_per_token']:,} cache bytes a token")
    return {"kv": kv}


def measure_memory(model: Decoder, dtype: torch.dtype, contexts: Iterable[int] = ()) -> dict:
    """The record's `kv`: plain bytes of one sequence. Stored and read bytes also at each of `contexts` (tokens)."""
    short = _length_with_full_windows(model, dtype)
    held = {tokens: _filled_bytes(model, tokens, dtype) for tokens in (short, 2 * short)}
    per_token, remainder = divmod(held[2 * short] - held[short], short)
    measured = {"bytes_per_token": per_token, "constant_bytes": held[short] - short * per_token}
    formula = {"bytes_per_token": model.kv_bytes_per_token(dtype), "constant_bytes": model.kv_constant_bytes(dtype)}
    stored = {tokens: model.kv_stored_bytes(tokens, dtype) for tokens in held}
    if measured != formula or remainder or held != stored:
        raise BytesDiffer(f"the cache holds {measured}, at lengths {held}; the formulas say {formula}, {stored}")
    contexts = sorted({*CONTEXTS, *contexts})
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "bytes_per_token": measured["bytes_per_token"],
        "formula_bytes_per_token": formula["bytes_per_token"],
        "constant_bytes": measured["constant_bytes"],
        "formula_constant_bytes": formula["constant_bytes"],
        "stored_bytes": {str(n): model.kv_stored_bytes(n, dtype) for n in contexts},
        "read_bytes": {str(n): model.kv_read_bytes(n, dtype) for n in contexts},
    }


def _length_with_full_windows(model: Decoder, dtype: torch.dtype) -> int:
    """A number of tokens from which on, by the formulas, a sequence grows by the same for each further one."""
    per_token, constant = model.kv_bytes_per_token(dtype), model.kv_constant_bytes(dtype)
    for tokens in (2**n for n in range(7, 32)):
        if model.kv_stored_bytes(tokens, dtype) == tokens * per_token + constant:
            return tokens
    raise BytesDiffer(f"by the formulas a sequence of {tokens} tokens does not hold {per_token} each and {constant}")


@torch.inference_mode()
def _filled_bytes(model: Decoder, tokens: int, dtype: torch.dtype) -> int:
    device = model.embed.weight.device
    cache = model.new_cache(1, tokens, dtype, device)
    model.prefill(torch.zeros(1, min(tokens, FILLED), dtype=torch.int64, device=device), cache)
    return cache.nbytes
