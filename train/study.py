"""Studies: a YAML file in, the runs to train out.

A study is a grid, variants by seeds, on one corpus and one tokenizer. Whatever decides a run's result is resolved here,
matched widths included, and hashed into the run's key: a run is done when a record with its key is there, and a changed
study value retrains exactly the runs whose key it changes.
"""

import contextlib
import copy
import dataclasses
import difflib
import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from jsonargparse import ArgumentParser, Namespace
from torch.overrides import TorchFunctionMode

from archs import Decoder, build
from archs.decoder import Options
from train.corpus import load_corpus
from train.errors import InputError
from train.tokens import TokenSet, default_cache_dir, prepare

STUDIES = Path(__file__).resolve().parent.parent / "studies"
MATCH_TOLERANCE = 0.005
MERGED = "model", "train", "eval"  # sections that a study overrides key by key; the others it replaces whole


@dataclass(frozen=True)
class CorpusConfig:
    name: str | None = None
    files: list[str] = dataclasses.field(default_factory=list)


@dataclass(frozen=True)
class TokenizerConfig:
    name: str
    vocab_size: int | None = None


@dataclass(frozen=True)
class TrainConfig:
    tokens: int
    batch_tokens: int
    lr: float
    warmup_tokens: int
    weight_decay: float
    clip: float
    precision: Literal["auto", "bf16", "fp32"]
    val_tokens: int
    val_points: int


@dataclass(frozen=True)
class DecodeConfig:
    batch: list[int]
    context: list[int]


@dataclass(frozen=True)
class EvalConfig:
    loss_tokens: int
    decode: DecodeConfig
    dtype: Literal["auto", "bf16", "fp32"]


@dataclass(frozen=True)
class Study:
    corpus: CorpusConfig
    tokenizer: TokenizerConfig
    model: dict[str, Any]
    match: Literal["ffn", "heads", "none"]
    variants: list[dict[str, Any]]
    seeds: list[int]
    train: TrainConfig
    eval: EvalConfig

    def settings(self) -> dict:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Run:
    """One variant with one seed. `options` are complete: `build(arch, **options)` makes the model."""

    label: str
    arch: str
    options: dict[str, Any]
    seed: int
    params: int
    match: str
    precision: str
    corpus_fingerprint: str
    key: str  # of what decides the trained weights
    eval_key: str  # of that and of what is measured
    directory: Path

    def settings(self) -> dict:
        """What a record says of the run before anything is measured."""
        return {name: value for name, value in vars(self).items() if name not in ("eval_key", "directory")}


# Reading


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers: 2e-3 is one."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d[\d_]*(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def find_study(name: str) -> Path:
    """The path of a study given by its path or by its name in studies/."""
    for path in (Path(name), STUDIES / f"{name}.yaml"):
        with contextlib.suppress(OSError):  # a name that is too long
            if path.is_file():
                return path
    shipped = ", ".join(sorted(p.stem for p in STUDIES.glob("*.yaml")))
    raise InputError(f"no study {name!r}: give the path of a YAML file or one of {shipped}")


def read_yaml(path: Path) -> dict:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, ValueError) as e:
        raise InputError(f"{path} is not a YAML file: {_one_line(str(e))}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} must be a mapping with some of the keys {_names(Study)}")
    return content


def parse_study(given: dict, overrides: Sequence[str] = ()) -> Study:
    """A study from a mapping, with `key=value` overrides (dotted keys, variants by label or index). InputError names a
    key or value that is wrong."""
    base = read_yaml(STUDIES / "quick.yaml")
    merged = copy.deepcopy(base | given)
    for section in MERGED:
        merged[section] = _merge(base[section], merged[section], section)
    for override in overrides:
        _override(merged, override)
    merged = _check_keys(merged, Study)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Study)
    try:
        study = Study(**vars(parser.instantiate(parser.parse_object(Namespace(**merged)))))
    except Exception as e:  # jsonargparse raises its own error types, with the key in the text
        raise InputError(_one_line(str(e))) from None
    _check(study)
    return study


def _merge(base: dict, given: Any, where: str) -> dict:
    if not isinstance(given, dict):
        raise InputError(f"{where}: must be a mapping of keys to values, not {given!r}")
    mappings = [key for key in base.keys() & given.keys() if isinstance(base[key], dict)]
    return base | given | {key: _merge(base[key], given[key], f"{where}.{key}") for key in mappings}


def _override(settings: dict, override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals:
        raise InputError(f"--set {override}: must be key=value, such as train.tokens=100_000")
    try:
        parsed = yaml.load(value, _Loader)
    except (yaml.YAMLError, ValueError) as e:
        raise InputError(f"--set {override}: {_one_line(str(e))}") from None
    *parents, last = key.split(".")
    at: Any = settings
    for name in parents:
        if isinstance(at, list):
            labels = [str(v.get("label", v.get("arch"))) if isinstance(v, dict) else None for v in at]
            place = labels.index(name) if name in labels else int(name) if name.isdecimal() else len(at)
            at = at[place] if place < len(at) else None
        elif isinstance(at, dict):
            at = at.setdefault(name, {})
    if not isinstance(at, dict):
        raise InputError(f"--set {override}: the study has no {key!r}")
    at[last] = parsed


def _check_keys(given: dict, config: type, where: str = "") -> dict:
    """The mapping without keys that have no value; InputError for a key that `config` does not have."""
    allowed = {f.name: f for f in dataclasses.fields(config)}
    checked = {}
    for key, value in given.items():
        if key not in allowed:
            close = difflib.get_close_matches(str(key), allowed, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise InputError(f"unknown key {where + str(key)!r}; {hint}allowed: {', '.join(allowed)}")
        if dataclasses.is_dataclass(allowed[key].type):
            if not isinstance(value, dict):
                keys = _names(allowed[key].type)
                raise InputError(f"{where}{key}: must be a mapping with the keys {keys}, not {value!r}")
            value = _check_keys(value, allowed[key].type, f"{where}{key}.")
        if value is not None:
            checked[key] = value
    required = (dataclasses.MISSING, dataclasses.MISSING)
    for name, f in allowed.items():
        if name not in checked and (f.default, f.default_factory) == required:
            raise InputError(f"{where}{name}: needs a value")
    return checked


def _check(study: Study) -> None:
    known = [f.name for f in dataclasses.fields(Options) if f.name != "vocab_size"]
    if unknown := [key for key in study.model if key not in known]:
        raise InputError(f"model: unknown key {unknown[0]!r}; allowed: {', '.join(known)}")
    if not study.variants:
        raise InputError("variants: at least one is needed, such as {label: mha, arch: mha}")
    for number, variant in enumerate(study.variants):
        if not isinstance(variant.get("arch"), str) or isinstance(variant.get("label"), bool):
            raise InputError(f"variants: entry {number} needs an arch, such as {{label: mha, arch: mha}}")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9 ._+=-]{0,63}", variant_label(variant)):
            raise InputError(
                f"variants: the label {variant_label(variant)!r} names a folder: use up to 64 letters, digits, spaces "
                "and ._+=-, beginning with a letter or digit"
            )
        for option, key in (("vocab_size", "tokenizer.vocab_size"), ("context", "model.context")):
            if option in variant:
                raise InputError(f"variants: {option} is the same for all of them; set {key}")
    at_least_0 = {"warmup_tokens": study.train.warmup_tokens, "weight_decay": study.train.weight_decay}
    above_0 = vars(study.train) | vars(study.eval) | vars(study.eval.decode) | vars(study.tokenizer)
    if too_large := [seed for seed in study.seeds if seed >= 2**32]:
        raise InputError(f"seeds={too_large[0]}: must be below 2**32")
    for name, value in [*at_least_0.items(), *(("seeds", seed) for seed in study.seeds)]:
        if not 0 <= value < math.inf:
            raise InputError(f"{name}={value}: must be at least 0")
    for name in above_0.keys() - at_least_0.keys():
        for value in above_0[name] if isinstance(above_0[name], list) else [above_0[name]]:
            if isinstance(value, int | float) and not 0 < value < math.inf:
                raise InputError(f"{name}={value}: must be above 0")
    for name, values in (
        ("label", [variant_label(v) for v in study.variants]),
        ("seed", study.seeds),
        ("eval.decode.batch", study.eval.decode.batch),
        ("eval.decode.context", study.eval.decode.context),
    ):
        if not values:
            raise InputError(f"{name}: at least one is needed")
        if twice := [v for v in values if values.count(v) > 1]:
            raise InputError(f"{name} {twice[0]!r} stands twice in the study")


def variant_label(variant: dict) -> str:
    given = variant.get("label")
    return str(variant["arch"] if given is None else given)


def _names(config: type) -> str:
    return ", ".join(f.name for f in dataclasses.fields(config))


def _one_line(text: str) -> str:
    text = re.sub(r"<class '([\w.]+)'>", r"\1", text).replace("typing.Literal", "one of ").replace("Parser key ", "")
    return re.sub(r"\s+", " ", text).strip()


# Resolving


def load_data(study: Study, study_file: Path, cache_dir: Path | None = None) -> TokenSet:
    """The study's corpus in tokens; file patterns are looked for beside the study file, then in the current folder."""
    cache_dir = cache_dir or default_cache_dir()
    folders = study_file.resolve().parent, Path.cwd()
    corpus = load_corpus(study.corpus.name, study.corpus.files, folders)
    return prepare(corpus, study.tokenizer.name, study.tokenizer.vocab_size, cache_dir)


def plan(study: Study, data: TokenSet, directory: Path) -> list[Run]:
    """Every run of the study, seeds within variants. InputError for a shape or a budget that cannot be."""
    variants = resolve_variants(study, data.n_vocab)
    _check_budget(study, data)
    precision = resolve_precision(study.train.precision)
    dtype = resolve_dtype(study.eval.dtype)
    runs = []
    for variant, (options, params) in zip(study.variants, variants, strict=True):
        for seed in study.seeds:
            decides = {
                "arch": variant["arch"],
                "options": options,
                "seed": seed,
                "corpus": data.facts["fingerprint"],
                "tokenizer": dataclasses.asdict(study.tokenizer),
                "train": dataclasses.asdict(study.train) | {"precision": precision},
            }
            name = variant_label(variant)
            folder = directory / "runs" / name / f"seed-{seed}"
            key = content_key(decides)
            eval_key = content_key([key, study.match, dataclasses.asdict(study.eval), dtype, find_device().type])
            arch = variant["arch"]
            facts = {"match": study.match, "precision": precision, "corpus_fingerprint": data.facts["fingerprint"]}
            runs.append(Run(name, arch, options, seed, params, **facts, key=key, eval_key=eval_key, directory=folder))
    return runs


def content_key(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def find_device() -> torch.device:
    """What trains and measures: the first GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolve_precision(precision: str) -> str:
    """`auto` is bf16 where the machine multiplies it fast: GPUs from Ampere on, CPUs with AMX tiles; else fp32."""
    if precision != "auto":
        return precision
    if find_device().type == "cuda":
        return "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp32"
    return "bf16" if getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)() else "fp32"


def resolve_dtype(dtype: str) -> str:
    """Of weights and cache while decoding: `auto` is bf16 on a GPU and fp32 on a CPU."""
    return {"cuda": "bf16", "cpu": "fp32"}[find_device().type] if dtype == "auto" else dtype


def _check_budget(study: Study, data: TokenSet) -> None:
    context, train = study.model["context"], study.train
    if train.batch_tokens % context:
        raise InputError(f"train.batch_tokens={train.batch_tokens} must be a multiple of model.context={context}")
    if train.tokens < train.batch_tokens:
        raise InputError(
            f"train.tokens={train.tokens} is less than one batch of train.batch_tokens={train.batch_tokens}"
        )
    for split, tokens in (("training", len(data.train)), ("validation", len(data.val))):
        if tokens <= context:
            raise InputError(
                f"the corpus has {tokens} {split} tokens, too few for one sequence of model.context={context} "
                "and the token after it: give more text or a shorter context"
            )


def resolve_variants(study: Study, vocab_size: int) -> list[tuple[dict, int]]:
    """Complete build options and total parameters of each variant, matched to the first by the study's rule."""
    resolved: list[tuple[dict, int]] = []
    for variant in study.variants:
        own = {key: value for key, value in variant.items() if key not in ("label", "arch")}
        options = {"vocab_size": vocab_size, **study.model, **own}
        try:
            if resolved and study.match == "ffn":
                if "ffn_width" in own:
                    raise ValueError("match: ffn sets ffn_width; leave it out here, or use match: none")
                options["ffn_width"] = matching_ffn_width(variant["arch"], options, resolved[0][1])
            elif resolved and study.match == "heads":
                if "heads" in own:
                    raise ValueError("match: heads sets heads; leave it out here, or use match: none")
                options |= matching_heads(variant["arch"], options, resolved[0][1])
            model = on_meta(variant["arch"], options)
        except ValueError as e:
            where = "" if variant_label(variant) == variant["arch"] else f"{variant_label(variant)}: "
            raise InputError(f"variants: {where}{e}") from None
        resolved.append((dataclasses.asdict(model.options), model.count_params()))
    return resolved


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


def matching_ffn_width(arch: str, options: dict, params: int) -> int:
    """The FFN width that brings the total parameters to `params`: the roundest within a fifth of the tolerance.

    GLA (arXiv 2505.21487) and MQA (arXiv 1911.02150) match in this way. ValueError if the nearest width is not within
    the tolerance.
    """
    fixed, per_unit = _line(lambda width: on_meta(arch, options | {"ffn_width": width}).count_params())
    exact = (params - fixed) / per_unit
    for step in (64, 32, 16, 8, 4, 2, 1):
        width = max(step, round(exact / step) * step)
        off = abs(fixed + width * per_unit - params) / params
        if off <= (MATCH_TOLERANCE / 5 if step > 1 else MATCH_TOLERANCE):
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
