"""The variants of a study, with complete options.

Lists in a variant become a family of variants, and sizes multiply them. A matching rule sets one width of each variant
so that its total parameters equal those of the first variant of its size.
"""

import hashlib
import importlib.util
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from archs import VARIANTS
from archs.decoder import Options
from train.errors import InputError
from train.imported import read_options, weights_hash
from train.meta import on_meta
from train.study import MODEL_KEYS, RECIPE, SIZE_KEYS, Study, check_label, combinations, variant_label

FREE = {"ffn": "ffn_width", "heads": "heads", "none": None}  # the option that each matching rule sets
MATCH_TOLERANCE = 0.005


@dataclass(frozen=True)
class Variant:
    """`build(arch, **options)` makes the model: the options are complete."""

    label: str
    family: str  # the study's label for it, without what its lists and the sizes add
    size: str  # empty where the study has no sizes
    baseline: str  # label of the first variant of its size, which it is matched to and compared with
    arch: str
    options: dict[str, Any]
    params: int
    tokens: int  # training budget
    recipe: dict[str, Any]  # the settings of train.study.RECIPE
    lr: float | None  # its own; None: that of the study
    source: str = ""  # hash of the file that defines it; empty for the architectures of archs/
    weights: dict[str, str] | None = None  # of a model of others, which is not trained: its folder and their hash

    @property
    def short(self) -> str:
        """The label without the size."""
        return self.label.removesuffix(f"-{self.size}") if self.size else self.label

    @property
    def work(self) -> int:
        """The work of one of its runs, in the unit of a study's progress."""
        return self.params * self.tokens

    def facts(self) -> dict:
        """The fields that a run's record has, with names of files in place of their paths: records are published."""
        left_out = {"tokens", "recipe", "lr", *(name for name in ("source", "weights") if not getattr(self, name))}
        facts = {name: value for name, value in vars(self).items() if name not in left_out}
        if self.weights:
            facts["weights"] = self.weights | {"folder": Path(self.weights["folder"]).name}
        return facts | {"arch": Path(self.arch).name}


@dataclass(frozen=True)
class Draft:
    """One variant in one size as the study writes it: its options are neither complete nor matched."""

    label: str
    family: str
    size: str
    arch: str
    model: dict[str, Any]  # the options that all variants of this size share
    options: dict[str, Any]  # its own options
    tokens: int
    recipe: dict[str, Any]
    lr: float | None
    weights: Path | None

    def resolve(self, rule: str, baseline: Variant | None) -> Variant:
        """The variant, matched by `rule` to the `baseline` of its size; None: it is that itself. ValueError if a model
        cannot have these options or cannot be matched."""
        options = self.model | self.options
        set_here = FREE[rule] in self.options
        if baseline and rule == "ffn" and not set_here:
            options["ffn_width"] = matching_ffn_width(self.arch, options, baseline.params)
        elif baseline and rule == "heads":
            if set_here:
                raise ValueError("match: heads sets heads; leave it out here, or use match: none")
            options |= matching_heads(self.arch, options, baseline.params)
        if self.weights and self.lr:
            raise ValueError("lr: a model with weights of its own is not trained; leave it out")
        if self.weights:
            check_weights(self.arch, options, *read_options(self.weights))
        model = on_meta(self.arch, options)
        if baseline and set_here and (off := abs(model.count_params() / baseline.params - 1)) > MATCH_TOLERANCE:
            wrong = f"ffn_width={options['ffn_width']}: parameters are {off:.1%} off those of the first variant"
            raise ValueError(f"{wrong}, match: ffn allows {MATCH_TOLERANCE:.1%}; leave it out, or use match: none")
        first = baseline.label if baseline else self.label
        facts = model.options.model_dump(), model.count_params(), self.tokens, self.recipe, self.lr
        weights = self.weights and {"folder": str(self.weights), "hash": weights_hash(self.weights)}
        names = self.label, self.family, self.size, first, self.arch
        return Variant(*names, *facts, source_hash(self.arch), weights)


def resolve_variants(study: Study, vocab_size: int, folder: Path = Path()) -> list[Variant]:
    """Every variant of every size. `folder` has the study's file. InputError names a variant that cannot be."""
    variants: dict[str, Variant] = {}
    first: dict[str, Variant] = {}  # by size
    for draft in drafts(study, vocab_size, folder):
        try:
            check_label(draft.label)
            variant = draft.resolve(study.match, first.get(draft.size))
        except ValueError as e:
            raise InputError(f"variants: {draft.label}: {str(e).removeprefix(f'{draft.arch}: ')}") from None
        if draft.label in variants:
            raise InputError(f"label {draft.label!r} stands twice in the study, when lists and sizes are written out")
        variants[draft.label] = variant
        first.setdefault(draft.size, variant)
    return list(variants.values())


def drafts(study: Study, vocab_size: int, folder: Path) -> Iterator[Draft]:
    """Every variant in every size, which may set its options, with every combination of the values in its lists. Other
    values than numbers (`swa`, `gret`) make families of their own."""
    for size, size_name in zip(study.sizes or [{}], size_names(study), strict=True):
        shared = {key: value for key, value in size.items() if key in MODEL_KEYS}
        model = {"vocab_size": vocab_size, **study.model, **shared}
        tokens = size.get("tokens", study.train.tokens)
        recipe = {key: size.get(key, getattr(study.train, key)) for key in RECIPE}
        for variant in study.variants:
            name, arch = variant_label(variant), find_arch(variant["arch"], folder)
            named = {key: value for key, value in variant.items() if key not in ("label", "arch", "weights")}
            weights, options = find_weights(variant.get("weights"), folder), named | size.get(name, {})
            lr = given_rate(options.pop("lr", None), name)
            for chosen in combinations(options, f"variants: {name}"):
                words = [(str(value).lower(), type(value) in (int, float)) for value in chosen.values()]
                label = "-".join([name, *(word for word, _ in words), *([size_name] if size_name else [])])
                family = "-".join([name, *(word for word, is_number in words if not is_number)])
                yield Draft(label, family, size_name, arch, model, options | chosen, tokens, recipe, lr, weights)


def size_names(study: Study) -> list[str]:
    """Width x layers, and where sizes share these, whatever else they differ in; [""] for a study without sizes."""
    if not study.sizes:
        return [""]
    sizes = [{"tokens": study.train.tokens, **study.model, **size} for size in study.sizes]
    names = [f"{size['width']}x{size['layers']}" for size in sizes]
    if len(set(names)) < len(names):
        others = [key for key in SIZE_KEYS if key not in ("width", "layers") and any(key in s for s in study.sizes)]
        differing = [key for key in others if len({str(size.get(key)) for size in sizes}) > 1]
        ways = [[in_a_word(key, size[key]) for key in differing if key in size] for size in sizes]
        names = ["-".join([name, *way]) for name, way in zip(names, ways, strict=True)]
    return names


def in_a_word(key: str, value: Any) -> str:
    """`ffn_width512`, `muon`, `gate` or `no-gate`."""
    if isinstance(value, bool):
        return key if value else f"no-{key}"
    return value if isinstance(value, str) else f"{key}{value}"


def find_arch(arch: str, folder: Path) -> str:
    """`my_file.py:MyVariant` with the path of its file, in `folder` or in the current one; any other name as it is."""
    file, _, name = arch.rpartition(":")
    places = [path for path in (folder / file, Path(file)) if file.endswith(".py") and path.is_file()]
    return f"{places[0].resolve()}:{name}" if places else arch


def check_weights(arch: str, options: dict, their_arch: str, theirs: dict) -> None:
    """ValueError unless a variant computes what the model does whose weights it gets."""
    if arch != their_arch:
        raise ValueError(f"its weights are those of arch: {their_arch}, not {arch}")
    ours, theirs = (on_meta(arch, each).options.model_dump() for each in (options, theirs))
    for name, value in theirs.items():
        if name not in ("context", "dropout") and ours[name] != value:
            raise ValueError(f"{name}={ours[name]!r}: its weights are those of a model with {name}: {value!r}")


def given_rate(lr: Any, label: str) -> float | None:
    """A variant's own learning rate, None without one. InputError if it cannot be one."""
    if lr is not None and not (type(lr) in (int, float) and 0 < lr < math.inf):
        raise InputError(
            f"variants: {label}: lr={lr!r}: must be a number above 0; several to choose from go in train.lr"
        )
    return lr and float(lr)


def find_weights(name: Any, folder: Path) -> Path | None:
    """The directory of a model of others, in `folder` or in the current one; None without a name."""
    if name is None:
        return None
    places = [path for path in (folder / str(name), Path(str(name))) if path.is_dir()]
    if not places:
        raise InputError(f"variants: weights: there is no directory {name}")
    return places[0].resolve()


def source_hash(arch: str) -> str:
    """Hash of the source file of a variant that is named as `file.py:Class` or `package.module:Class`; else empty."""
    if arch in VARIANTS:
        return ""
    where = arch.rpartition(":")[0]
    file = where if where.endswith(".py") else importlib.util.find_spec(where).origin
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]


def matching_ffn_width(arch: str, options: dict, params: int) -> int:
    """The FFN width that brings the total parameters to `params`, as GLA (arXiv 2505.21487) and MQA (arXiv 1911.02150)
    match: the roundest that is off by at most a fifth of the tolerance, in parameters without embeddings (a large
    vocabulary would hide a difference), or two fifths for a multiple of 8, which a GPU multiplies faster; else the
    nearest. ValueError if that is not within the tolerance."""
    model = on_meta(arch, options | {"ffn_width": 1})
    embeddings = model.count_params() - model.count_params(embedding=False)
    one, two = (on_meta(arch, options | {"ffn_width": width}).count_params() for width in (1, 2))
    fixed, per_unit = 2 * one - two, two - one  # parameters are a linear function of the width
    exact = (params - fixed) / per_unit
    for step in (64, 32, 16, 8, 4, 2, 1):
        width = max(step, round(exact / step) * step)
        off = abs(fixed + width * per_unit - params)
        if off <= MATCH_TOLERANCE * (2 if step == 8 else 1) / 5 * (params - embeddings):
            return width
    nearest = off <= per_unit  # false if even width 1 has too many parameters
    off /= params
    if nearest and off <= MATCH_TOLERANCE:
        return width
    goal = f"within {MATCH_TOLERANCE:.1%} of the first variant's {params:,}"
    nearest = f"the nearest, ffn_width={width}, is {off:.1%} off"
    raise ValueError(f"match: ffn cannot bring the parameters {goal}: {nearest}; use a larger model or match: none")


def matching_heads(arch: str, options: dict, params: int) -> dict:
    """{heads, head_dim, ffn_width}: the number of query heads that brings the total parameters nearest to `params`. In
    MHA, GQA and MQA this keeps n_q + n_kv constant (TPA, arXiv 2501.06425)."""
    base = Options(**{name: options[name] for name in Options.model_fields if name in options})
    sizes = {"head_dim": base.head_dim, "ffn_width": base.ffn_width}

    def off(heads: int) -> float:
        try:
            return abs(on_meta(arch, options | sizes | {"heads": heads}).count_params() - params)
        except ValueError:  # this variant cannot have that number of heads
            return float("inf")

    return sizes | {"heads": min(range(1, 4 * base.heads + 1), key=off)}
