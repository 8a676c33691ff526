"""What is held equal between variants: each is brought to the first one's total parameters by one of its widths."""

import dataclasses

import torch
from torch.overrides import TorchFunctionMode

from archs import Decoder, build
from archs.decoder import Options

FREE = {"ffn": "ffn_width", "heads": "heads", "none": None}  # each rule and the option that it sets
RULES = tuple(FREE)
MATCH_TOLERANCE = 0.005


class _Uninitialised(TorchFunctionMode):
    """Leaves weights as they are: torch's random numbers for meta tensors take 4 seconds to import."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in ("normal_", "uniform_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def on_meta(arch: str, options: dict) -> Decoder:
    """The model without memory for its weights."""
    with torch.device("meta"), _Uninitialised():
        return build(arch, **options)


def matched(rule: str, arch: str, options: dict, params: int | None) -> Decoder:
    """The model of `arch` with the option that the rule sets chosen so that it has `params` parameters in total.

    None for `params`: the model that the others are matched to, as it is. ValueError if it cannot be.
    """
    if params is not None and rule == "ffn":
        options = options | {"ffn_width": matching_ffn_width(arch, options, params)}
    elif params is not None and rule == "heads":
        options = options | matching_heads(arch, options, params)
    return on_meta(arch, options)


def matching_ffn_width(arch: str, options: dict, params: int) -> int:
    """The FFN width that brings the total parameters to `params`: the roundest by which those beside the embeddings,
    which a large vocabulary would hide, are off by no more than a fifth of the tolerance, else the nearest.

    GLA (arXiv 2505.21487) and MQA (arXiv 1911.02150) match in this way. ValueError if the nearest width is not within
    the tolerance.
    """
    model = on_meta(arch, options | {"ffn_width": 1})
    embeddings = model.count_params() - model.count_params(embedding=False)
    fixed, per_unit = _line(lambda width: on_meta(arch, options | {"ffn_width": width}).count_params())
    exact = (params - fixed) / per_unit
    for step in (64, 32, 16, 8, 4, 2, 1):
        width = max(step, round(exact / step) * step)
        off = abs(fixed + width * per_unit - params)
        if off <= MATCH_TOLERANCE / 5 * (params - embeddings):
            return width
    nearest = off <= per_unit  # and not the narrowest of a model that has too many parameters beside the FFN
    off /= params
    if nearest and off <= MATCH_TOLERANCE:
        return width
    raise ValueError(
        f"match: ffn cannot bring the parameters within {MATCH_TOLERANCE:.1%} of the first variant's {params:,}: "
        f"the nearest, ffn_width={width}, is {off:.1%} off; use a larger model or match: none"
    )


def _line(count) -> tuple[int, int]:
    """(value at 0, slope) of a linear function of a whole number."""
    one, two = count(1), count(2)
    return 2 * one - two, two - one


def matching_heads(arch: str, options: dict, params: int) -> dict:
    """The number of query heads that brings the total parameters nearest to `params`, head and FFN sizes held.

    Where keys and values have heads in every layer, as in MHA, GQA and MQA, that holds n_q + n_kv (TPA, arXiv
    2501.06425).
    """
    base = {f.name: options[f.name] for f in dataclasses.fields(Options) if f.name in options}
    held = {name: getattr(Options(**base), name) for name in ("head_dim", "ffn_width")}

    def off(heads: int) -> float:
        try:
            return abs(on_meta(arch, options | held | {"heads": heads}).count_params() - params)
        except ValueError:  # a number of heads that this variant cannot have
            return float("inf")

    return held | {"heads": min(range(1, 4 * base["heads"] + 1), key=off)}
