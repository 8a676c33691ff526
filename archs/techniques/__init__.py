"""Techniques that act on the cache of a trained model: which slots they keep, and what of attention they look at.

    cache = compressed_cache(model, H2O(budget=0.5), batch_size=8, max_tokens=4096)
    model.prefill(prompt, cache)      # then model.decode(tokens, cache) as ever
    cache.nbytes                      # of what is still held

To add one: a file with a subclass of `Technique`, and one line in `TECHNIQUES`.
"""

import dataclasses
from typing import Any

import torch

from archs.cache import FullCache, with_tensors
from archs.decoder import Decoder, check_sizes
from archs.techniques.dmc import DMC, MergedSlots, MergingAttention
from archs.techniques.fastgen import FastGen
from archs.techniques.heavy import H2O, VATP
from archs.techniques.norm import L2Norm
from archs.techniques.quantised import Quantisation, QuantisedSlots
from archs.techniques.slots import CompressedCache, Slots
from archs.techniques.snapkv import SnapKV
from archs.techniques.streaming import StreamingLLM
from archs.techniques.technique import Full, Technique

TECHNIQUES: dict[str, type[Technique]] = {
    "full": Full,
    "streaming-llm": StreamingLLM,
    "h2o": H2O,
    "vatp": VATP,
    "snapkv": SnapKV,
    "l2-norm": L2Norm,
    "fastgen": FastGen,
    "dmc": DMC,
}


def technique(name: str, /, **options) -> Technique:
    """One of TECHNIQUES by its name. ValueError names what is wrong and what is allowed."""
    if not isinstance(name, str) or name not in TECHNIQUES:
        raise ValueError(f"unknown technique {name!r}; allowed are {', '.join(TECHNIQUES)}")
    allowed = [option.name for option in dataclasses.fields(TECHNIQUES[name])]
    if unknown := [key for key in options if key not in allowed]:
        raise ValueError(f"{name}: unknown option {unknown[0]!r}; allowed are {', '.join(allowed)}")
    return TECHNIQUES[name](**options)


def from_settings(settings: dict[str, Any], prompt: int) -> tuple[Technique, Quantisation | None]:
    """What `{technique: h2o, budget: 0.5, bits: 4}` stands for, with prompts of so many tokens. ValueError names what
    is wrong."""
    options = dict(settings)
    if odd := [key for key in options if not isinstance(key, str)]:
        raise ValueError(f"{odd[0]!r} is no option; give names")
    packed = {f.name: options.pop(f.name) for f in dataclasses.fields(Quantisation) if f.name in options}
    made = technique(options.pop("technique", None), **options)
    made.fits(prompt)
    if packed and "bits" not in packed:
        raise ValueError(f"{next(iter(packed))} goes with bits: 8, 4 or 2")
    if packed and isinstance(made, DMC):
        raise ValueError("dmc can't be quantised, as what is merged into changes with each token: leave out bits")
    return made, Quantisation(**packed) if packed else None


def compressed_cache(
    model: Decoder,
    technique: Technique,
    batch_size: int,
    max_tokens: int,
    dtype: torch.dtype | None = None,
    quantisation: Quantisation | None = None,
    kind_V: torch.Tensor | None = None,
) -> CompressedCache:
    """An empty cache of `model` under a technique; `max_tokens` is what a sequence may grow to, and holds nothing back.
    With `quantisation` what is kept is packed. `kind_V`: which tokens of the vocabulary are special (1) or punctuation
    (2), uint8, for FastGen.

    What does not grow with the context (windows, recurrent states) stays as it is. ValueError where the technique has
    to see the attention of every prompt token and the model does not compute it.
    """
    technique.suits(model.options.layers)
    if technique.observes and model.early_exit:
        raise ValueError(
            f"{type(technique).__name__} looks at the attention of every prompt token, and {type(model).__name__} "
            "computes the last one's alone (early exit); techniques that look at none work there"
        )
    merges = isinstance(model.blocks[0].attention, MergingAttention)
    if merges != (isinstance(technique, DMC) and technique.merges):
        raise ValueError("DMC works on models that were trained to merge, which no other technique does")
    if merges and quantisation:
        raise ValueError("a cache that merges can't be quantised: what is merged into changes with each token")
    weight, o = model.embed.weight, model.options
    check_sizes(batch_size, max_tokens)
    with torch.inference_mode(False):
        parts = model.new_parts(batch_size, max_tokens, dtype or weight.dtype, "meta")
        for n, part in enumerate(parts):
            if isinstance(part, FullCache):
                what = technique, n, part, (o.rotary_dim, o.rope_base), weight.device
                kind = MergedSlots if merges else Slots
                parts[n] = QuantisedSlots(quantisation, *what) if quantisation else kind(*what)
            else:
                parts[n] = with_tensors(part, lambda t: torch.zeros_like(t, device=weight.device))
    return CompressedCache(technique, parts, batch_size, max_tokens, kind_V)
