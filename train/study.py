"""Studies: a YAML file in, checked and typed settings out.

A study is a grid, variants by sizes by seeds, on one corpus and one tokenizer. What its settings mean in runs is worked
out in train/plan.py.
"""

import contextlib
import copy
import dataclasses
import difflib
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentParser, Namespace

from archs.decoder import Options
from archs.techniques import from_settings
from train.corpus import load_corpus
from train.errors import InputError
from train.mqar import RecallTask
from train.tokens import TokenSet, default_cache_dir, prepare

STUDIES = Path(__file__).resolve().parent.parent / "studies"
WHOLE = int, int | None, list[int], list[int] | None
MERGED = "model", "train", "eval"  # sections that a study overrides key by key; the others it replaces whole


@dataclass(frozen=True)
class CorpusConfig:
    name: str | None = None
    files: list[str] = dataclasses.field(default_factory=list)
    pairs: list[int] | None = None  # of mqar


@dataclass(frozen=True)
class TokenizerConfig:
    name: str
    vocab_size: int | None = None


@dataclass(frozen=True)
class TrainConfig:
    tokens: int
    batch_tokens: int
    lr: float | list[float]  # a list: tuned over, for each variant
    warmup_tokens: int
    weight_decay: float
    clip: float
    precision: Literal["auto", "bf16", "fp32"]
    val_tokens: int
    val_points: int
    devices: int  # a run's, on each of num_nodes machines; with strategy they go to Lightning's Trainer
    num_nodes: int
    strategy: str
    checkpoint_seconds: float  # between two checkpoints, at most
    checkpoint_steps: int | None = None  # likewise
    tuning_tokens: int | None = None  # of a run that tries a learning rate; None: as many as the runs that are compared


@dataclass(frozen=True)
class DecodeConfig:
    batch: list[int]
    context: list[int]
    seeds: list[int] | None = None  # which are timed; None: all


@dataclass(frozen=True)
class PagingConfig:
    """Sequences of different lengths, for the bytes that contiguous, doubling and paged caches of them hold."""

    lengths: Literal["documents", "uniform"] = "documents"  # of the corpus, or uniform up to max_tokens
    max_tokens: int = 8192  # of a sequence; longer documents are cut
    sequences: int = 64
    block_sizes: list[int] = dataclasses.field(default_factory=lambda: [16, 64])  # tokens in a block of a paged cache


@dataclass(frozen=True)
class EvalConfig:
    loss_tokens: int
    decode: DecodeConfig
    dtype: Literal["auto", "bf16", "fp32"]
    level: float
    technique_tokens: int  # of held-out text for each technique
    techniques: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # on the trained model's cache
    paging: PagingConfig | None = None  # None: not measured

    def technique_settings(self) -> list[dict[str, Any]]:
        """Each technique's, without lists; `full`, which the others are compared with, is always among them."""
        entries = [(entry, f"eval.techniques: {entry.get('technique')}") for entry in self.techniques]
        found = [entry | chosen for entry, where in entries for chosen in combinations(entry, where)]
        full = {"technique": "full"}
        return found if full in found or not found else [full, *found]


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
    sizes: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def settings(self) -> dict:
        return dataclasses.asdict(self)


# Reading


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers: 2e-3 is one. A key that is given twice is an error."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [name for index, name in enumerate(names) if name in names[:index]]:
            raise yaml.constructor.ConstructorError(
                problem=f"{twice[0]!r} is given twice", problem_mark=node.start_mark
            )
        return node


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
    except (yaml.YAMLError, ValueError, RecursionError) as e:
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
    except (yaml.YAMLError, ValueError, RecursionError) as e:
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
        if allowed[key].type in WHOLE:
            value = _whole(value)
        if value is not None:
            checked[key] = value
    required = (dataclasses.MISSING, dataclasses.MISSING)
    for name, f in allowed.items():
        if name not in checked and (f.default, f.default_factory) == required:
            raise InputError(f"{where}{name}: needs a value")
    return checked


def _whole(value: Any) -> Any:
    """1e6 as 1_000_000, also in lists; what is no whole number stays as it is."""
    if isinstance(value, list):
        return [_whole(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _check(study: Study) -> None:
    known = [f.name for f in dataclasses.fields(Options) if f.name != "vocab_size"]
    if unknown := [key for key in study.model if key not in known]:
        raise InputError(f"model: unknown key {unknown[0]!r}; allowed: {', '.join(known)}")
    of_size = ["tokens", *(name for name in known if name != "context")]
    for size in study.sizes:
        if unknown := [key for key in size if key not in of_size]:
            raise InputError(f"sizes: unknown key {unknown[0]!r}; allowed: {', '.join(of_size)}")
        if type(size.get("tokens", 1)) is not int:
            raise InputError(f"sizes: tokens={size['tokens']!r}: must be a whole number, such as 20_000_000")
    if not study.variants:
        raise InputError("variants: at least one is needed, such as {label: mha, arch: mha}")
    for number, variant in enumerate(study.variants):
        if not isinstance(variant.get("arch"), str):
            raise InputError(f"variants: entry {number} needs an arch, such as {{label: mha, arch: mha}}: {variant}")
        label = variant.get("label")
        if isinstance(label, bool) or not isinstance(label, str | int | float | None):
            raise InputError(f"variants: entry {number}: label {label!r} is not text; put it in quotation marks")
        check_label(variant_label(variant))
        if odd := [key for key in variant if not isinstance(key, str)]:
            raise InputError(f"variants: {variant_label(variant)}: {odd[0]!r} is no option; give names")
        for option, key in (("vocab_size", "tokenizer.vocab_size"), ("context", "model.context")):
            if option in variant:
                raise InputError(f"variants: {option} is the same for all of them; set {key}")
    at_least_0 = {"warmup_tokens": study.train.warmup_tokens, "weight_decay": study.train.weight_decay}
    decode = {"batch": study.eval.decode.batch, "context": study.eval.decode.context}
    above_0 = vars(study.train) | vars(study.eval) | decode | vars(study.tokenizer)
    if paging := study.eval.paging:
        above_0 |= vars(paging)
        if not paging.block_sizes:
            raise InputError("eval.paging.block_sizes: at least one is needed")
        if paging.lengths == "documents" and study.corpus.name == "mqar":
            raise InputError("eval.paging.lengths=documents: corpus mqar has no documents; choose uniform")
    if unknown := set(study.eval.decode.seeds or []) - set(study.seeds):
        raise InputError(f"eval.decode.seeds={sorted(unknown)[0]}: must be among the study's seeds {study.seeds}")
    if too_large := [seed for seed in study.seeds if seed >= 2**32]:
        raise InputError(f"seeds={too_large[0]}: must be below 2**32")
    for name, value in [*at_least_0.items(), *(("seeds", seed) for seed in study.seeds)]:
        if not 0 <= value < math.inf:
            raise InputError(f"{name}={value}: must be at least 0")
    for name in above_0.keys() - at_least_0.keys():
        for value in above_0[name] if isinstance(above_0[name], list) else [above_0[name]]:
            if isinstance(value, int | float) and not 0 < value < math.inf:
                raise InputError(f"{name}={value}: must be above 0{' and finite' if value == math.inf else ''}")
    if (study.tokenizer.vocab_size or 0) >= 2**31:
        raise InputError(f"tokenizer.vocab_size={study.tokenizer.vocab_size}: must be below 2**31")
    if study.eval.level >= 1:
        raise InputError(f"eval.level={study.eval.level}: must be below 1, such as 0.95")
    context = study.model["context"]
    if type(context) is not int or context < 1:
        raise InputError(f"model.context={context!r}: must be a whole number of at least 1")
    techniques = study.eval.technique_settings()
    if twice := [settings for settings in techniques if techniques.count(settings) > 1]:
        raise InputError(f"eval.techniques: {twice[0]} stands twice in the study")
    for settings in techniques:
        try:
            from_settings(settings, max(1, context // 2))
        except ValueError as e:
            raise InputError(f"eval.techniques: {e}") from None
    for name, values in (
        ("label", [variant_label(v) for v in study.variants]),
        ("seed", study.seeds),
        ("train.lr", study.train.lr if isinstance(study.train.lr, list) else [study.train.lr]),
        ("eval.decode.batch", study.eval.decode.batch),
        ("eval.decode.context", study.eval.decode.context),
    ):
        if not values:
            raise InputError(f"{name}: at least one is needed")
        if twice := [v for v in values if values.count(v) > 1]:
            raise InputError(f"{name} {twice[0]!r} stands twice in the study")


def combinations(entry: dict[str, Any], where: str) -> Iterator[dict[str, Any]]:
    """The values of an entry's lists, {key: value}, in every combination; {} where it has no lists."""
    lists = {key: value for key, value in entry.items() if isinstance(value, list)}
    if empty := [key for key, values in lists.items() if not values]:
        raise InputError(f"{where}: {empty[0]} is an empty list; give it one value or more")
    for values in itertools.product(*lists.values()):
        yield dict(zip(lists, values, strict=True))


def variant_label(variant: dict) -> str:
    given = variant.get("label")
    return str(variant["arch"] if given is None else given)


def check_label(label: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9 ._+=-]{0,63}", label):
        raise InputError(
            f"variants: the label {label!r} names a folder: use up to 64 letters, digits, spaces and ._+=-, beginning "
            "with a letter or digit"
        )


def _names(config: type) -> str:
    return ", ".join(f.name for f in dataclasses.fields(config))


IN_WORDS = {  # a key's type, as jsonargparse names it
    "float": "a number, such as 0.1",
    "int": "a whole number, such as 100",
    "str": "text",
    "list": "a list, in [brackets]",
    "list[int]": "a list of whole numbers, such as [0, 1]",
    "float, list[float]": "a number or a list of numbers, such as 3e-3 or [1e-3, 3e-3]",
}
OF_ONE = re.compile(r"Expected an? (.*?)\. Got value: (.*)")
OF_SEVERAL = re.compile(
    r"Does not validate against any of the Union subtypes Subtypes: \[(.*?)(?:, NoneType)?\] Errors: .* value: (.*)"
)


def _one_line(text: str) -> str:
    text = re.sub(r"<class '([\w.]+)'>", r"\1", text)
    text = text.replace("a typing.Literal", "one of ").replace("Parser key ", "")
    text = re.sub(r"\s+", " ", text).strip()
    for pattern in (OF_ONE, OF_SEVERAL):
        if (found := pattern.search(text)) and found[1] in IN_WORDS:
            return f"{text[: found.start()]}must be {IN_WORDS[found[1]]}, not {found[2]}"
    return text


def load_data(study: Study, study_file: Path, cache_dir: Path | None = None) -> TokenSet | RecallTask:
    """The study's corpus in tokens; file patterns are looked for beside the study file, then in the current folder."""
    corpus, tokenizer = study.corpus, study.tokenizer
    if corpus.name == "mqar":
        if tokenizer.name != "ids" or not tokenizer.vocab_size or not corpus.pairs or corpus.files:
            raise InputError(
                "corpus mqar is generated, as token ids: it needs pairs, such as [4, 16], no files, and "
                "tokenizer: {name: ids, vocab_size: 256}"
            )
        return RecallTask(corpus.pairs, tokenizer.vocab_size)
    if corpus.pairs is not None:
        raise InputError("corpus.pairs goes with corpus.name=mqar alone")
    folders = study_file.resolve().parent, Path.cwd()
    text = load_corpus(corpus.name, corpus.files, folders)
    return prepare(text, tokenizer.name, tokenizer.vocab_size, cache_dir or default_cache_dir())
