"""The architectures: decoder-only language models that differ in how attention keeps its keys and values.

    model = build("gqa", vocab_size=4096, width=256, layers=6, heads=8, context=2048, kv_heads=2)
    cache = model.new_cache(batch_size=8, max_tokens=4096, dtype=torch.bfloat16, device="cpu")
    last = model.prefill(tokens, cache)    # (B, T) -> (B, V)
    last = model.decode(last.argmax(-1), cache)

A new variant is one file here with a subclass of `Decoder`, and one line in VARIANTS.
"""

import dataclasses
import difflib
import importlib
import importlib.util
import sys
from pathlib import Path

from archs.cache import Cache
from archs.decoder import Decoder
from archs.grouped import GQA, MHA, MQA
from archs.mla import MLA
from archs.yoco import YOCO

__all__ = ["VARIANTS", "Cache", "Decoder", "build", "find_variant"]

VARIANTS: dict[str, type[Decoder]] = {
    "mha": MHA,
    "mqa": MQA,
    "gqa": GQA,
    "mla": MLA,
    "yoco": YOCO,
}


def find_variant(arch: str) -> type[Decoder]:
    """The class that `mha`, `package.module:Class` or `file.py:Class` names; ValueError says what is wrong."""
    where, _, name = arch.rpartition(":")
    if not where:
        if arch not in VARIANTS:
            raise ValueError(f"unknown architecture {arch!r}; there are {', '.join(VARIANTS)}")
        return VARIANTS[arch]
    try:
        if where.endswith(".py"):
            module = sys.modules.get(str(Path(where).resolve()))
            if module is None:
                spec = importlib.util.spec_from_file_location(Path(where).stem, where)
                module = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(module)
                sys.modules[str(Path(where).resolve())] = module
        else:
            module = importlib.import_module(where)
        return getattr(module, name)
    except (ImportError, OSError, AttributeError) as e:
        raise ValueError(f"{arch}: {e}") from None


def build(arch: str, **options) -> Decoder:
    """A freshly initialised model of the variant `arch`. ValueError names a wrong, unknown or missing option."""
    variant = find_variant(arch)
    fields = dataclasses.fields(variant.Options)
    allowed = [f.name for f in fields]
    if unknown := [name for name in options if name not in allowed]:
        close = difflib.get_close_matches(unknown[0], allowed, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"{arch} has no option {', '.join(map(repr, unknown))}; allowed: {', '.join(allowed)}{hint}")
    if missing := [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in options]:
        raise ValueError(f"{arch} needs the option {', '.join(map(repr, missing))}")
    try:
        return variant(variant.Options(**options))
    except ValueError as e:
        raise ValueError(f"{arch}: {e}") from None
