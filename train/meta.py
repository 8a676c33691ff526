"""Models that have shapes and no memory: what they would hold and take is known before any is made."""

import torch
from torch.overrides import TorchFunctionMode

from archs import Decoder, build


class _Uninitialised(TorchFunctionMode):
    """Skips random initialisation: torch's random numbers for meta tensors take 4 seconds to import."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in ("normal_", "uniform_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def on_meta(arch: str, options: dict) -> Decoder:
    """The model with shapes and no memory. ValueError names a wrong option."""
    with torch.device("meta"), _Uninitialised():
        return build(arch, **options)
