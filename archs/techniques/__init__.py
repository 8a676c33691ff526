"""Techniques that act on the cache of a trained model: which slots they keep, and what of attention they look at.

    cache = compressed_cache(model, technique("h2o", budget=0.5), batch_size=8, max_tokens=4096)
    model.prefill(prompt, cache)      # then model.decode(tokens, cache) as with any cache
    cache.nbytes                      # bytes of what is still held

To add one: a file with a subclass of `Technique`, and one line in `TECHNIQUES`.
"""

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from archs.cache import Allocator
from archs.decoder import Decoder
from archs.settings import SettingsError
from archs.techniques.dmc import DMC
from archs.techniques.eviction import H2O, VATP, L2Norm, SnapKV, StreamingLLM
from archs.techniques.fastgen import FastGen
from archs.techniques.quantised import Quantisation, QuantisedSlots
from archs.techniques.slots import CompressedCache, Slots
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
    try:
        return TECHNIQUES[name](**options)
    except SettingsError as e:
        raise ValueError(f"{name}: {e}") from None


def from_settings(settings: dict[str, Any], prompt: int) -> tuple[Technique, Quantisation | None]:
    """The technique and quantisation of `{technique: h2o, budget: 0.5, bits: 4}`, for prompts of this length.

    ValueError names what is wrong.
    """
    packing = {name: settings[name] for name in Quantisation.model_fields if name in settings}
    options = {name: value for name, value in settings.items() if name not in ("technique", *packing)}
    chosen = technique(settings.get("technique"), **options)
    chosen.validate_prompt(prompt)
    if packing and "bits" not in packing:
        raise ValueError(f"{next(iter(packing))} goes with bits: 8, 4 or 2")
    quantisation = Quantisation(**packing) if packing else None
    validate_quantisation(chosen, quantisation)
    return chosen, quantisation


def compressed_cache(
    model: Decoder,
    technique: Technique,
    batch_size: int,
    max_tokens: int,
    dtype: torch.dtype | None = None,
    quantisation: Quantisation | None = None,
    kind_V: torch.Tensor | None = None,
) -> CompressedCache:
    """An empty cache of `model` under a technique; `max_tokens` is what a sequence may grow to, and reserves nothing.
    With `quantisation` slots are packed. `kind_V`: which tokens of the vocabulary are special (1) or punctuation (2),
    uint8, for FastGen.

    What does not grow with the context (windows, recurrent states) stays as it is. ValueError where the technique or
    the quantisation cannot act on the model.
    """
    technique.validate_model(model)
    validate_quantisation(technique, quantisation)
    name, form = type(technique).__name__, getattr(model, "trained_for", None)
    needed = type(technique) if technique.trains and not technique.is_full else None
    if needed and form is not needed:
        raise ValueError(f"{name} works on models that were trained further for it: {name}(...).retrofit(model)")
    if form and form is not needed:
        use = f"use {form.__name__} with a budget below 1.0"
        raise ValueError(f"{name} cannot act on a model that was trained further for {form.__name__}; {use}")
    allocator = Allocator(batch_size, max_tokens, dtype or model.embed.weight.dtype, model.embed.weight.device)
    slots = partial(QuantisedSlots, quantisation) if quantisation else Slots
    full = partial(slots, technique, model.options, allocator)
    with torch.inference_mode(False):
        layers = model.new_layers(SimpleNamespace(full=full, ring=allocator.ring, state=allocator.state))
    return CompressedCache(technique, layers, batch_size, max_tokens, kind_V)


def validate_quantisation(technique: Technique, quantisation: Quantisation | None) -> None:
    if quantisation and not technique.quantisable:
        name = type(technique).__name__
        raise ValueError(f"{name} can't be quantised, as its slots change after they are written: leave out bits")
