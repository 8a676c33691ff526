"""Studies: a YAML file in, checked and typed settings out.

A study is a grid, variants by sizes by seeds, on one corpus and one tokenizer. train/variants.py works out its variants
and train/plan.py its runs. studies/quick.yaml explains each key.
"""

import copy
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SerializeAsAny,
    ValidationInfo,
    field_validator,
    model_validator,
)

from archs.decoder import Options
from archs.settings import SettingsError, did_you_mean
from archs.techniques import from_settings
from train import sources
from train.batches import TrainingData
from train.errors import InputError
from train.files import read_json
from train.sections import Amount, Count, Counts, Positive, Section, Seed, TokenizerConfig, distinct, whole
from train.store import STUDIES
from train.tokens import MANIFEST, open_tokens

MERGED = "model", "train", "eval"  # sections that a study overrides key by key; it replaces the others as a whole
MODEL_KEYS = [name for name in Options.model_fields if name != "vocab_size"]
RECIPE = "warmup_tokens", "optimizer", "schedule"
NUMBERS = {"tokens", "warmup_tokens"}
SIZE_KEYS = ["tokens", *RECIPE, *(name for name in MODEL_KEYS if name != "context")]
EXAMPLE = "{label: mha, arch: mha}"


class TrainConfig(Section):
    tokens: Count
    batch_tokens: Count
    lr: Positive | list[Positive]  # a list: tuned over, for each variant
    warmup_tokens: Amount
    weight_decay: Annotated[float, Field(ge=0)]
    clip: Positive
    precision: Literal["auto", "bf16", "fp32"]
    val_tokens: Count
    val_points: Count
    devices: Count  # of one run, on each of num_nodes machines; with strategy they go to Lightning's Trainer
    num_nodes: Count
    strategy: Literal["auto", "ddp", "ddp_find_unused_parameters_true"]
    loggers: list[str] = Field(
        ["tensorboard"]
    )  # also csv, wandb, or package.module:Class; metrics.jsonl is always written
    checkpoint_seconds: Positive  # between two checkpoints, at most
    checkpoint_steps: Count | None = None  # likewise
    document_mask: bool = False  # a token attends to its own document alone
    optimizer: Literal["adamw", "muon"] = "adamw"  # this, the next and warmup_tokens may differ between sizes
    schedule: Literal["cosine", "wsd"] = "cosine"
    tuning_seeds: Count = 2  # with which each learning rate of a list is tried
    tuning_share: Annotated[float, Field(ge=0, lt=1)] | None = None  # of the tokens, in the runs that try a rate

    @field_validator("lr")
    @classmethod
    def no_rate_twice(cls, lr: float | list[float]) -> float | list[float]:
        return distinct(lr) if isinstance(lr, list) else lr


class DecodeConfig(Section):
    batch: Counts
    context: Counts
    seeds: list[Seed] | None = None  # seeds whose runs are timed; None: all


class PagingConfig(Section):
    """Sequences of different lengths, for the bytes that contiguous, doubling and paged caches of them hold."""

    lengths: Literal["documents", "uniform"] = "documents"  # of the corpus, or uniform up to max_tokens
    max_tokens: Count = 8192  # of a sequence; longer documents are cut
    sequences: Count = 64
    block_sizes: Counts = Field([16, 64])  # tokens in a block of a paged cache


class EvalConfig(Section):
    loss_tokens: Count
    decode: DecodeConfig
    dtype: Literal["auto", "bf16", "fp32"]
    level: Annotated[float, Field(gt=0, lt=1)]
    technique_tokens: Count  # of held-out text for each technique
    techniques: list[dict[str, Any]] = Field([])  # on the trained model's cache
    paging: PagingConfig | None = None  # None: not measured

    def technique_settings(self) -> list[dict[str, Any]]:
        """The settings of each technique, lists written out. `full`, with which others are compared, is among them."""
        entries = [(entry, f"eval.techniques: {entry.get('technique')}") for entry in self.techniques]
        settings = [entry | chosen for entry, where in entries for chosen in combinations(entry, where)]
        full = {"technique": "full"}
        return settings if full in settings or not settings else [full, *settings]


class Study(Section):
    corpus: Annotated[SerializeAsAny[sources.Source], BeforeValidator(sources.parse)]
    tokenizer: TokenizerConfig
    model: dict[str, Any]
    match: Literal["ffn", "heads", "none"]
    variants: list[dict[str, Any]]
    seeds: Annotated[list[Seed], AfterValidator(distinct)]
    train: TrainConfig
    eval: EvalConfig
    sizes: list[dict[str, Any]] = Field([])

    @field_validator("model")
    @classmethod
    def model_has_known_keys(cls, model: dict) -> dict:
        refuse_unknown(model, MODEL_KEYS)
        context = model.get("context")
        cls.check(type(context) is int and context >= 1, f"context={context!r}: must be a whole number of at least 1")
        return model

    @field_validator("sizes")
    @classmethod
    def sizes_have_known_keys(cls, sizes: list[dict], info: ValidationInfo) -> list[dict]:
        labels = [variant_label(variant) for variant in info.data.get("variants", [])]
        sizes = [{key: whole(value) if key in NUMBERS else value for key, value in size.items()} for size in sizes]
        for size in sizes:
            refuse_unknown([key for key in size if key not in labels], SIZE_KEYS)
            for label in size.keys() & set(labels):
                cls.check(isinstance(size[label], dict), f"{label}={size[label]!r}: must be a mapping of its options")
            for key in size.keys() & NUMBERS:
                is_whole = type(size[key]) is int and size[key] >= 0
                cls.check(is_whole, f"{key}={size[key]!r}: must be a whole number of at least 0")
            for key in size.keys() & set(RECIPE) - NUMBERS:
                allowed = get_args(TrainConfig.model_fields[key].annotation)
                cls.check(size[key] in allowed, f"{key}={size[key]!r}: must be one of {', '.join(allowed)}")
        return sizes

    @field_validator("variants")
    @classmethod
    def variants_have_an_arch_and_a_label(cls, variants: list[dict]) -> list[dict]:
        cls.check(bool(variants), f"at least one is needed, such as {EXAMPLE}")
        for number, variant in enumerate(variants):
            arch, label = variant.get("arch"), variant.get("label")
            cls.check(isinstance(arch, str), f"entry {number} needs an arch, such as {EXAMPLE}: {variant}")
            text = type(label) in (str, int, float, type(None))
            cls.check(text, f"entry {number}: label {label!r} is not text; put it in quotation marks")
            check_label(variant_label(variant))
            for option, key in (("vocab_size", "tokenizer.vocab_size"), ("context", "model.context")):
                cls.check(option not in variant, f"{option} is the same for all of them; set {key}")
        archs: dict[str, str] = {}
        for variant in variants:
            label, arch = variant_label(variant), variant["arch"]
            one = archs.setdefault(label, arch)
            cls.check(one == arch, f"{label!r} is the label of {one} and of {arch}; a family has one architecture")
        lists = [[str(value) for value in variant.values() if isinstance(value, list)] for variant in variants]
        distinct([" ".join([variant_label(each), *values]) for each, values in zip(variants, lists, strict=True)])
        return variants

    @model_validator(mode="after")
    def what_is_measured_exists(self) -> "Study":
        unknown = next((seed for seed in self.eval.decode.seeds or [] if seed not in self.seeds), None)
        self.check(unknown is None, f"eval.decode.seeds={unknown}: must be among the study's seeds {self.seeds}")
        by_length = self.eval.paging and self.eval.paging.lengths == "documents"
        by_document = [("eval.paging.lengths=documents", by_length, "choose uniform")]
        by_document += [("train.document_mask=true", self.train.document_mask, "leave it out")]
        for name, chosen, use in by_document:
            self.check(self.corpus.has_documents or not chosen, f"{name}: this corpus has no documents; {use}")
        return self

    @model_validator(mode="after")
    def batches_and_budgets_fit(self) -> "Study":
        train, context, batch = self.train, self.model["context"], self.train.batch_tokens
        self.check(batch % context == 0, f"train.batch_tokens={batch} must be a multiple of model.context={context}")
        sequences = f"the batch's {batch // context} sequences (train.batch_tokens / model.context)"
        names = f"train.devices={train.devices} and train.num_nodes={train.num_nodes}"
        self.check(batch // context % (train.devices * train.num_nodes) == 0, f"{names} must divide {sequences}")
        budgets = [("sizes: tokens", size.get("tokens", train.tokens)) for size in self.sizes]
        budgets = budgets or [("train.tokens", train.tokens)]
        if (share := train.tuning_share) is not None:
            name = f"train.tuning_share={share:g}"
            several = "the smallest of several sizes measures what shorter runs change; give sizes, or leave it out"
            self.check(len(self.sizes) > 1, f"{name}: {several}")
            budgets += [(f"{name}: tokens", int(share * min(tokens for _, tokens in budgets)))] if share else []
        for name, tokens in budgets:
            self.check(tokens >= batch, f"{name}={tokens} is less than one batch of train.batch_tokens={batch}")
        return self

    @model_validator(mode="after")
    def techniques_are_possible(self) -> "Study":
        batch, entries = self.train.batch_tokens, self.eval.technique_settings()
        for settings in entries:
            self.check(entries.count(settings) == 1, f"eval.techniques: {settings} stands twice in the study")
            try:
                technique, _ = from_settings(settings, max(1, self.model["context"] // 2))
                if technique.trains and not technique.is_full and self.train.document_mask:
                    raise ValueError(f"{settings['technique']} cannot be trained with train.document_mask")
                if technique.trains and (tokens := technique.train_tokens) < batch:
                    raise ValueError(f"train_tokens={tokens} is less than one batch of train.batch_tokens={batch}")
            except ValueError as e:
                raise ValueError(f"eval.techniques: {e}") from None
        return self


def refuse_unknown(given: Iterable[str], allowed: Sequence[str]) -> None:
    """SettingsError for the first key that is not allowed."""
    if unknown := [key for key in given if key not in allowed]:
        hint = did_you_mean(unknown[0], allowed)
        raise SettingsError(unknown[0], lambda path: f"unknown key {path!r}; allowed: {', '.join(allowed)}{hint}")


def combinations(entry: dict[str, Any], where: str) -> Iterator[dict[str, Any]]:
    """Every combination of the values in an entry's lists, as {key: value} of these keys; {} once without lists.
    InputError, which begins with `where`, for an empty list."""
    lists = {key: value for key, value in entry.items() if isinstance(value, list)}
    if empty := [key for key, values in lists.items() if not values]:
        raise InputError(f"{where}: {empty[0]} is an empty list; give it one value or more")
    for values in itertools.product(*lists.values()):
        yield dict(zip(lists, values, strict=True))


def variant_label(variant: dict) -> str:
    """The label of a variant, by default its architecture; of `my_file.py:MyVariant` that is the class."""
    label = variant.get("label")
    return variant["arch"].rpartition(":")[2] if label is None else str(label)


def check_label(label: str) -> None:
    """ValueError if a label cannot be the name of a folder."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9 ._+=-]{0,63}", label):
        use = "up to 64 letters, digits, spaces and ._+=-, beginning with a letter or digit"
        raise ValueError(f"the label {label!r} names a folder: use {use}")


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers: 2e-3 is one. A key that is given twice, or is not text, is an error."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node, names = super().compose_mapping_node(anchor), set()
        for key, _ in node.value:
            text = key.tag.endswith((":str", ":merge"))
            if not text or key.value in names:
                problem = "is given twice" if text else "is no key; put it in quotation marks"
                raise yaml.constructor.ConstructorError(problem=f"{key.value} {problem}", problem_mark=key.start_mark)
            names.add(key.value)
        return node


EXPONENT = re.compile(r"[-+]?\d[\d_]*(\.\d*)?[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+0123456789"))


def read_yaml(path: Path, what: str = f"a mapping with some of the keys {', '.join(Study.model_fields)}") -> dict:
    """The mapping in a study's file, or in another one that has `what`. InputError if there is none."""
    content = _load(path.read_bytes(), f"{path} is not a YAML file")
    if not isinstance(content, dict):
        raise InputError(f"{path} must be {what}")
    return content


def _load(text: str | bytes, failure: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        raise InputError(f"{failure}: {' '.join(str(e).split())}") from None


def parse_study(given: dict, overrides: Sequence[str] = ()) -> Study:
    """A study from a mapping and `key=value` overrides (dotted keys, variants by label or index); studies/quick.yaml
    has what both leave out. InputError names a wrong key or value."""
    base = read_yaml(STUDIES / "quick.yaml")
    merged = copy.deepcopy(base | given)
    merged |= {section: _merge(base[section], merged[section], section) for section in MERGED}
    for override in overrides:
        _override(merged, override)
    if isinstance(merged["corpus"], dict) and (name := merged["corpus"].get("tokenizer")):
        left_out = "tokenizer" not in given and merged["tokenizer"] == base["tokenizer"]
        chosen = {"name": name} if left_out else merged["tokenizer"]
        if not isinstance(chosen, dict) or chosen.get("name") != name:
            raise InputError(f"tokenizer: the corpus is in tokens of {name!r} already; leave the section out")
        merged["tokenizer"] = {"name": name}
    try:
        return Study(**merged)
    except ValueError as e:
        raise InputError(str(e)) from None


def _merge(base: dict, given: Any, where: str) -> dict:
    """The mapping `base` with the values of `given` in place of its own, at every depth."""
    if not isinstance(given, dict):
        raise InputError(f"{where}: must be a mapping of keys to values, not {given!r}")
    mappings = [key for key in base.keys() & given.keys() if isinstance(base[key], dict)]
    return base | given | {key: _merge(base[key], given[key], f"{where}.{key}") for key in mappings}


def _override(settings: dict, override: str) -> None:
    """Sets one value in `settings`, as `train.tokens=100_000` says. InputError if there is no such place."""
    key, equals, value = override.partition("=")
    if not equals:
        raise InputError(f"--set {override}: must be key=value, such as train.tokens=100_000")
    parsed = _load(value, f"--set {override}")
    *parents, last = key.split(".")
    at: Any = settings
    for name in parents:
        if isinstance(at, list):  # of variants, by label or index
            names = [str(v.get("label", v.get("arch"))) if isinstance(v, dict) else "" for v in at]
            if names.count(name) > 1:
                raise InputError(
                    f"--set {override}: several are called {name!r}; use an index, such as {names.index(name)}"
                )
            at = dict(zip([*map(str, range(len(at))), *names], [*at, *at], strict=True)).get(name)
        elif isinstance(at, dict):
            at = at.setdefault(name, {})
    if not isinstance(at, dict):
        raise InputError(f"--set {override}: the study has no {key!r}")
    at[last] = parsed


def load_data(study: Study, study_file: Path, output: Path, folder: str | None = None) -> TrainingData:
    """The study's corpus in tokens, or its generated task. Files are looked for in the folder of `study_file`, then in
    the current one, not in `output`. If all tokens are in `folder`, they are opened without a look at any text.
    InputError says what to change."""
    about = read_json(Path(folder) / MANIFEST) if folder else {}
    same = all(about.get(section) == getattr(study, section).model_dump() for section in ("corpus", "tokenizer"))
    if same and (tokens := open_tokens(Path(folder))):
        return tokens
    return study.corpus.load(study.tokenizer, sources.Place([study_file.resolve().parent, Path.cwd()], output))
