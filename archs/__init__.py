"""The architectures: decoder-only language models that differ in how attention keeps its keys and values.

    model = build("gqa", vocab_size=4096, width=256, layers=6, heads=8, context=2048, kv_heads=2)
    cache = model.new_cache(batch_size=8, max_tokens=4096, dtype=torch.bfloat16, device="cpu")
    last = model.prefill(tokens, cache)    # (B, T) -> (B, V)
    last = model.decode(last.argmax(-1), cache)

A new variant is one file here with a subclass of `Decoder`, and one line in VARIANTS; or a file anywhere, named as
`build("my_file.py:MyVariant", ...)`.
"""

import contextlib
import functools
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from archs.cache import Cache
from archs.cross_layer import CrossLayer
from archs.decoder import Decoder
from archs.delta import GatedDeltaNet
from archs.dsa import DSA
from archs.gla import GLA
from archs.grouped import GQA, MHA, MQA
from archs.gta import GTA
from archs.mla import MLA
from archs.settings import SettingsError
from archs.tpa import TPA
from archs.translution import Translution
from archs.windowed import Windowed
from archs.yoco import YOCO

__all__ = ["VARIANTS", "Cache", "Decoder", "build", "find_variant"]

VARIANTS: dict[str, type[Decoder]] = {
    "mha": MHA,
    "mqa": MQA,
    "gqa": GQA,
    "mla": MLA,
    "yoco": YOCO,
    "windowed": Windowed,
    "cla": CrossLayer,
    "gta": GTA,
    "gla": GLA,
    "tpa": TPA,
    "dsa": DSA,
    "translution": Translution,
    "delta": GatedDeltaNet,
}


def find_variant(arch: str) -> type[Decoder]:
    """A variant by its name in VARIANTS, as "package.module:Class" or "file.py:Class". ValueError if there is none."""
    if arch in VARIANTS:
        return VARIANTS[arch]
    place, colon, name = arch.rpartition(":")
    if not colon:
        raise ValueError(f"unknown architecture {arch!r}; there are {', '.join(VARIANTS)}, or give file.py:Class")
    try:
        path = Path(place).resolve()
        module = _load(path, path.stat().st_mtime_ns) if path.suffix == ".py" else importlib.import_module(place)
    except Exception as e:  # whatever a user's file does wrong
        raise ValueError(f"architecture {arch!r}: cannot load {place}: {type(e).__name__}: {e}") from None
    variant = getattr(module, name, None)
    if not (isinstance(variant, type) and issubclass(variant, Decoder)):
        raise ValueError(f"architecture {arch!r}: {place} has no subclass of archs.Decoder named {name!r}")
    return variant


@functools.cache
def _load(path: Path, modified: int) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    with _short_names():
        spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _short_names() -> Iterator[None]:
    """In a wheel, where this package is `kvfrontier.archs`: it is found as `archs`, as in a checkout."""
    parent = __name__.rpartition(".")[0]
    if not parent:
        yield
        return
    finder, before = sys.modules[parent].OtherName("", f"{parent}."), {*sys.modules}
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules.keys() - before if finder.find_spec(name)]:
            del sys.modules[name]


def build(arch: str, **options) -> Decoder:
    """A freshly initialised model of the variant `arch`. ValueError names a wrong, unknown or missing option."""
    variant = find_variant(arch)
    try:
        return variant(variant.Options(**options))
    except SettingsError as e:
        raise ValueError(f"{arch}: {e}") from None
