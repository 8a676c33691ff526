"""What `kvfrontier bytes` prints, a table or JSON, and what its figure shows."""

import json
import re

from eval.kv_bytes.models import ModelCache, TrainedCache
from train.errors import InputError

UNSTATED = 8192  # the context for a config that states no longest one
UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4} | {
    unit: 1024**n for n, unit in enumerate(("ki", "mi", "gi", "ti"), 1)
}


def parse_memory(text: str) -> int:
    """80GiB, 24G or plain bytes. InputError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", text.strip().lower())
    if not match or not float(match[1]):
        raise InputError(f"--memory {text!r} must be a size such as 80GiB, 24GB or a number of bytes")
    return int(float(match[1]) * UNITS[match[2] or ""])


def report(
    caches: list[ModelCache | TrainedCache],
    context: int | None = None,
    batch: int = 1,
    memory: str | None = None,
    as_json: bool = False,
) -> str:
    room = parse_memory(memory) if memory else None
    rows = [row(cache, context, batch, room) for cache in caches]
    return json.dumps(rows, indent=1) if as_json else table(rows, caches, batch)


def row(cache: ModelCache | TrainedCache, context: int | None, batch: int, memory: int | None) -> dict:
    """The first two byte counts are those of one sequence, `stored_bytes` and `read_bytes` those of the batch."""
    tokens = context or cache.max_tokens or UNSTATED
    stored = cache.stored_bytes(tokens)
    facts = {
        "name": cache.name,
        "model_type": cache.model_type,
        "dtype": cache.dtype,
        "context": tokens,
        "batch": batch,
        "bytes_per_token": cache.bytes_per_token,
        "constant_bytes": cache.constant_bytes,
        "stored_bytes": batch * stored,
        "read_bytes": batch * cache.read_bytes(tokens),
    }
    return facts | ({"largest_batch": memory // stored} if memory and stored else {})


def table(rows: list[dict], caches: list[ModelCache | TrainedCache], batch: int) -> str:
    memory = any("largest_batch" in facts for facts in rows)
    head = ["model", "dtype", "per token", "constant", "context", "stored", "read a step"]
    head += ["largest batch"] * bool(memory) + ["layers"]
    lines = [head]
    for facts, cache in zip(rows, caches, strict=True):
        sizes = [size_text(facts[key]) for key in ("bytes_per_token", "constant_bytes")]
        cells = [facts["name"], facts["dtype"], *sizes, f"{facts['context']:,}"]
        cells += [size_text(facts[key]) for key in ("stored_bytes", "read_bytes")]
        lines.append([*cells, *([f"{facts.get('largest_batch', 0):,}"] if memory else []), cache.summary])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = {0, 1, len(head) - 1}
    text = [
        "  ".join(f"{cell:{'<' if n in left else '>'}{widths[n]}}" for n, cell in enumerate(cells)).rstrip()
        for cells in lines
    ]
    sequences = "one sequence" if batch == 1 else f"{batch} sequences (per token, constant: of one)"
    return "\n".join([*text, f"Cache of {sequences}; KiB = 1024 bytes."])


def size_text(count: float) -> str:
    """Readable bytes: 512 B, 1.5 KiB, 24 MiB."""
    power = next(n for n in range(6) if count < 1024 ** (n + 1) or n == 5)
    return f"{count / 1024**power:.4g} {('B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB')[power]}"


def curves(caches: list[ModelCache | TrainedCache]) -> list[dict]:
    """What the figure `cache_bytes` draws of each model: stored bytes at powers of two, each name once."""
    longest = max(2**17, *(min(cache.max_tokens or 0, 2**20) for cache in caches))
    contexts = [2**n for n in range(10, longest.bit_length())]
    records = []
    for n, cache in enumerate(caches):
        label = cache.name if all(other.name != cache.name for other in caches[:n]) else f"{cache.name} ({n + 1})"
        costs = {"bytes_per_token": cache.bytes_per_token, "constant_bytes": cache.constant_bytes}
        stored = {str(tokens): cache.stored_bytes(tokens) for tokens in contexts}
        records.append({"label": label, "kv": {"dtype": cache.dtype, **costs, "stored_bytes": stored}})
    return records
