"""What two results files of one study must share however its runs were trained: all of it but times."""

import json
import sys
from pathlib import Path

TIMES = {
    "created",
    "tokens_per_s",
    "mfu",
    "seconds",
    "checkpoint_seconds",
    "prefill_ms",
    "prefill_ms_iqr",
    "token_ms",
    "token_ms_iqr",
    "kv_read_gb_s",
    "roof_gb_s",
    "roof_fraction",
    "memory_bound",
    "recompute",
}


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in TIMES}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def differences(a, b, at: str = "") -> list[str]:
    """The paths at which two results differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [line for key in {**a, **b} for line in differences(a.get(key), b.get(key), f"{at}.{key}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [line for n, pair in enumerate(zip(a, b, strict=True)) for line in differences(*pair, f"{at}[{n}]")]
    return [] if a == b else [f"{at}: {a!r} is not {b!r}"]


def differ(one: Path, other: Path) -> list[str]:
    return differences(*(without_times(json.loads(path.read_text())) for path in (one, other)))


if __name__ == "__main__":
    found = differ(*map(Path, sys.argv[1:3]))
    print("\n".join(found[:20]) or "the same, times apart")
    sys.exit(bool(found))
