"""What a study asks for: its variants, complete and matched, and their runs.

Lists in a variant become a family of variants, sizes multiply them, and each has a learning rate, given or tuned.
Whatever decides a run's weights is hashed into its key: a run is done when a record with its key is there, and a
changed study value retrains exactly the runs whose key it changes.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from archs import VARIANTS
from archs.grouped import Grouped
from archs.techniques import from_settings
from archs.techniques.dmc import DMC
from train.errors import InputError
from train.files import is_finished, read_json, read_record
from train.matching import FREE, RULES, matched, on_meta
from train.mqar import RecallTask
from train.study import Study, TrainConfig, check_label, combinations, variant_label
from train.tokens import TokenSet
from train.tuning import at_edge, best_rate, next_rate, tuning_seed

STRATEGIES = "auto", "ddp", "ddp_find_unused_parameters_true", "fsdp", "fsdp_cpu_offload"
MEASURES = Path(__file__).resolve().parent.parent / "eval"


@dataclass(frozen=True)
class Variant:
    """`build(arch, **options)` makes the model: the options are complete."""

    label: str
    family: str  # the study's label for it, without what its lists and the sizes add
    size: str  # empty where the study has no sizes
    baseline: str  # the label of the first variant of its size, which it is matched to and compared with
    arch: str
    options: dict[str, Any]
    params: int
    tokens: int  # training budget

    @property
    def work(self) -> int:
        """Of a run, in the unit of a study's progress."""
        return self.params * self.tokens


@dataclass(frozen=True)
class Run:
    """One variant with one seed and one learning rate."""

    variant: Variant
    seed: int
    lr: float
    precision: str
    match: str
    corpus_fingerprint: str
    tokenizer: dict
    tuning: dict | None  # {seed, at_edge, rates: [{lr, val_bpb}]}: how the rate was found; None where it was given
    key: str  # of what decides the trained weights
    eval_key: str  # of that and of what is measured
    directory: Path
    name: str
    tunes: bool = False  # a learning rate
    of: "Run | None" = None  # what it goes on from, so that its cache merges
    dmc: DMC | None = None  # as this says

    @property
    def compared(self) -> bool:
        """Whether it is one of those that the study is about, and is evaluated."""
        return not (self.tunes or self.dmc)

    def settings(self) -> dict:
        """What a record says of the run before anything is measured."""
        names = "seed", "match", "precision", "corpus_fingerprint", "tokenizer", "tuning", "key"
        facts = {name: value for name, value in vars(self.variant).items() if name != "tokens"}
        return facts | {name: getattr(self, name) for name in names}


class Plan:
    """The runs of a study in `directory`. InputError for a shape or a budget that cannot be.

    Which runs there are depends, where rates are tuned, on the records that tuning runs have left so far.
    """

    def __init__(self, study: Study, data: TokenSet | RecallTask, directory: Path):
        self.study, self.data, self.directory = study, data, directory
        self.variants = resolve_variants(study, data.n_vocab)
        tuned = {"train.tuning_tokens": study.train.tuning_tokens or study.train.batch_tokens}
        wanted = [s for s in study.eval.technique_settings() if s["technique"] == "dmc"]
        self.retrofitted = [from_settings(settings, 1)[0] for settings in wanted]
        shortest = {"train.tokens": min(variant.tokens for variant in self.variants)}
        if self.retrofitted:
            shortest["eval.techniques: dmc: train_tokens"] = min(dmc.train_tokens for dmc in self.retrofitted)
        _check_budget(study, data, tuned | shortest)
        self.rates = study.train.lr if isinstance(study.train.lr, list) else None
        self._tuning: dict[tuple[str, float], Run] = {}  # made once: with each run that ends all are asked for again

    def runs(self) -> list[Run]:
        """The runs to compare, seeds within variants, of all variants whose learning rate is known."""
        runs = [self.run(variant, seed) for variant in self.variants for seed in self.study.seeds]
        return [run for run in runs if run is not None]

    def tuning_runs(self) -> list[Run]:
        """The tuning runs that are done or next, rates within variants."""
        return [self._tuning_run(variant, rate) for variant in self.variants for rate in self._rates(variant)]

    def retrofits(self, run: Run) -> list[Run]:
        """What goes on from a run to be evaluated with it, for each DMC technique of the study."""
        if not issubclass(VARIANTS[run.variant.arch], Grouped):
            return []
        return [self._retrofit(run, dmc) for dmc in self.retrofitted]

    def known_runs(self) -> list[Run]:
        """All that can be named so far."""
        runs = self.runs()
        return [*self.tuning_runs(), *runs, *(retrofit for run in runs for retrofit in self.retrofits(run))]

    def ready(self) -> list[Run]:
        """What can be trained now and is not: rates first, then a whole seed after the other, so that a study that is
        stopped has complete pairs. More may follow as records appear."""
        seeds = [self.run(variant, seed) for seed in self.study.seeds for variant in self.variants]
        runs = [run for run in seeds if run is not None]
        retrofits = [retrofit for run in runs if is_finished(run) for retrofit in self.retrofits(run)]
        return [run for run in [*self.tuning_runs(), *runs, *retrofits] if not is_finished(run)]

    def left(self) -> list[Variant]:
        """The variant of each run that is still to train, as far as can be said before the rates are known."""
        rates = [self._short(v) for v in self.variants for rate in self.rates or () if rate not in self._losses(v)]
        runs = [(v, self.run(v, seed)) for v in self.variants for seed in self.study.seeds]
        further = [retrofit for _, run in runs if run is not None for retrofit in self.retrofits(run)]
        return [
            *rates,
            *(v for v, run in runs if run is None or not is_finished(run)),
            *(retrofit.variant for retrofit in further if not is_finished(retrofit)),
        ]

    def failures(self) -> list[str]:
        """A line for each run that failed, and for each variant without a learning rate."""
        failed = [line for run in self.known_runs() if (line := failure(run))]
        return failed + [
            f"{variant.label}: no learning rate gave a finite loss; give lower ones in train.lr"
            for variant in self.variants
            if self.rates and self._next_rate(variant) is None and self._tuned(variant) is None
        ]

    def run(self, variant: Variant, seed: int) -> Run | None:
        """None while the learning rate is not known."""
        where = self.directory / "runs" / variant.label / f"seed-{seed}"
        name = f"{variant.label} seed {seed}"
        if self.rates is None:
            return self._run(variant, seed, self.study.train.lr, None, where, name)
        lr = self._tuned(variant)
        if lr is None:
            return None
        losses = self._losses(variant)
        rates = [{"lr": lr, "val_bpb": loss if math.isfinite(loss) else None} for lr, loss in sorted(losses.items())]
        tuning = {"seed": tuning_seed(self.study.seeds), "at_edge": at_edge(losses), "rates": rates}
        if self.study.train.tuning_tokens:
            tuning["tokens"] = self.study.train.tuning_tokens
        return self._run(variant, seed, lr, tuning, where, name)

    # Tuning

    def _short(self, variant: Variant) -> Variant:
        """As it is trained to try a rate."""
        return dataclasses.replace(variant, tokens=self.study.train.tuning_tokens or variant.tokens)

    def _tuning_run(self, variant: Variant, rate: float) -> Run:
        if (variant.label, rate) in self._tuning:
            return self._tuning[variant.label, rate]
        where = self.directory / "tuning" / variant.label / f"lr-{rate!r}"
        name = f"{variant.label} lr {rate:g}"
        seed, short = tuning_seed(self.study.seeds), self._short(variant)
        self._tuning[variant.label, rate] = run = self._run(short, seed, rate, None, where, name, tunes=True)
        return run

    def _losses(self, variant: Variant) -> dict[float, float]:
        """Validation loss at the end of training for each rate that was tried; infinite where it diverged."""
        losses: dict[float, float] = {}
        for rate in self._candidates(variant, losses):
            record = read_record(self._tuning_run(variant, rate))
            if "train" in record:
                losses[rate] = record["curve"][-1]["val_bpb"]
            elif record.get("diverged"):
                losses[rate] = math.inf
        return losses

    def _candidates(self, variant: Variant, losses: dict[float, float]) -> Iterator[float]:
        """The given rates, then those that widen them as far as `losses`, which the caller fills meanwhile, goes."""
        yield from self.rates
        while (rate := next_rate(self.rates, losses)) is not None:
            yield rate
            if rate not in losses:
                return

    def _rates(self, variant: Variant) -> list[float]:
        if self.rates is None:
            return []
        losses = self._losses(variant)
        further = next_rate(self.rates, losses)
        return [*dict.fromkeys([*self.rates, *losses, *([] if further is None else [further])])]

    def _next_rate(self, variant: Variant) -> float | None:
        return None if self.rates is None else next_rate(self.rates, self._losses(variant))

    def _tuned(self, variant: Variant) -> float | None:
        return None if self._next_rate(variant) is not None else best_rate(self._losses(variant))

    def _retrofit(self, run: Run, dmc: DMC) -> Run:
        shape = f"dmc-{dmc.budget:g}-tokens-{dmc.train_tokens}-lr-{dmc.lr!r}"
        return dataclasses.replace(
            run,
            variant=dataclasses.replace(run.variant, tokens=dmc.train_tokens),
            lr=dmc.lr,
            tuning=None,
            key=content_key([run.key, dataclasses.asdict(dmc)]),
            directory=self.directory / "retrofits" / run.variant.label / f"seed-{run.seed}" / shape,
            name=f"{run.name} {shape}",
            of=run,
            dmc=dmc,
        )

    # Keys

    def _run(
        self,
        variant: Variant,
        seed: int,
        lr: float,
        tuning: dict | None,
        directory: Path,
        name: str,
        tunes: bool = False,
    ) -> Run:
        study, fingerprint = self.study, self.data.facts["fingerprint"]
        tokenizer = dataclasses.asdict(study.tokenizer)
        train = result_settings(study.train) | {"precision": self._precision, "lr": lr, "tokens": variant.tokens}
        decides = {
            "arch": variant.arch,
            "options": variant.options,
            "seed": seed,
            "corpus": fingerprint,
            "tokenizer": tokenizer,
            "train": train,
        }
        facts = {"match": study.match, "corpus_fingerprint": fingerprint, "tokenizer": tokenizer, "tuning": tuning}
        where = {"directory": directory, "name": name, "tunes": tunes}
        run = Run(variant, seed, lr, self._precision, **facts, key=content_key(decides), eval_key="", **where)
        evaluated = dataclasses.asdict(study.eval) | {"level": None}  # of intervals: nothing is measured with it
        measures = sorted(path.stem for path in MEASURES.glob("*.py"))  # a new one is new to every run
        eval_key = [run.settings(), evaluated, measures, self._dtype, find_device().type]
        if not tunes and (failed := [r.key for r in self.retrofits(run) if "failed" in read_record(r)]):
            eval_key.append(failed)  # evaluated without them, until they are trained
        return dataclasses.replace(run, eval_key=content_key(eval_key))

    @cached_property
    def _precision(self) -> str:
        return resolve_precision(self.study.train.precision)

    @cached_property
    def _dtype(self) -> str:
        return resolve_dtype(self.study.eval.dtype)


def step_counts(tokens: int, config: TrainConfig) -> tuple[int, int]:
    """(optimizer steps, steps between validations): the budget rounded down so that the last step is validated."""
    steps = tokens // config.batch_tokens
    val_every = max(min(2, steps), steps // config.val_points)  # 2: a checkpoint can come between
    return steps // val_every * val_every, val_every


def failure(run: Run) -> str | None:
    """A line on a run that failed; a rate that is too high is no failure of tuning."""
    record = read_record(run)
    return f"{run.name} failed: {record['failed']}" if "failed" in record and not is_finished(run) else None


def content_key(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def result_settings(config: TrainConfig) -> dict[str, Any]:
    """Without how a rate is found, when checkpoints are written, and the devices, which share one batch."""
    apart = "tuning_tokens", "devices", "num_nodes", "strategy", "checkpoint_seconds", "checkpoint_steps"
    return {key: value for key, value in vars(config).items() if key not in apart}


def settings(run: Run, config: TrainConfig, data: TokenSet | RecallTask) -> dict:
    """config.json: what decides the run's result, and names it."""
    train = result_settings(config) | {"lr": run.lr, "tokens": run.variant.tokens}
    retrofit = {"retrofit": dataclasses.asdict(run.dmc) | {"of": run.of.key}} if run.dmc else {}
    return run.settings() | {"train": train, "corpus": data.facts} | retrofit


def stale_because(run: Run, config: TrainConfig, data: TokenSet | RecallTask) -> str:
    """What of the run's settings is not as in its directory, as `train.lr was 0.001, is 0.002`; empty if all is."""
    was, now = read_json(run.directory / "config.json"), json.loads(json.dumps(settings(run, config, data)))
    if not was or was.get("key") == run.key:
        return ""
    apart = {"key", "tuning", "baseline", "family", "size", "params", "match"}  # follow from the rest, or only name it
    before, after = (_flat({k: v for k, v in content.items() if k not in apart}) for content in (was, now))
    changed = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    return "; ".join(f"{name} was {before.get(name)}, is {after.get(name)}" for name in changed) or "the format changed"


def _flat(content: dict, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


# Variants


def resolve_variants(study: Study, vocab_size: int) -> list[Variant]:
    """Every variant of every size, with complete options, matched to the first of its size by the study's rule."""
    resolved = []
    for label, variant in _resolve(study, vocab_size):
        check_label(label)
        if isinstance(variant, ValueError):
            arch = str(variant).partition(":")[0]  # build names it
            raise InputError(f"variants: {'' if arch == label else f'{label}: '}{variant}")
        if label in [other.label for other in resolved]:
            raise InputError(f"label {label!r} stands twice in the study, when lists and sizes are written out")
        resolved.append(variant)
    return resolved


def _resolve(study: Study, vocab_size: int) -> Iterator[tuple[str, Variant | ValueError]]:
    """(label, variant), or why it cannot be, for every variant of every size."""
    for size, name in zip(study.sizes or [{}], size_names(study), strict=True):
        model = {"vocab_size": vocab_size, **study.model, **{k: v for k, v in size.items() if k != "tokens"}}
        tokens = size.get("tokens", study.train.tokens)
        baseline: Variant | None = None
        for family, arch, label, own in expand(study):
            label = f"{label}-{name}" if name else label
            try:
                if baseline and FREE[study.match] in own:
                    free = FREE[study.match]
                    raise ValueError(f"match: {study.match} sets {free}; leave it out here, or use match: none")
                built = matched(study.match, arch, model | own, baseline and baseline.params)
            except ValueError as e:
                yield label, e
                continue
            options = dataclasses.asdict(built.options)
            of = baseline.label if baseline else label
            variant = Variant(label, family, name, of, arch, options, built.count_params(), tokens)
            baseline = baseline or variant
            yield label, variant


def size_names(study: Study) -> list[str]:
    """Width x layers, and where that is not enough what else they differ in; empty for a study without sizes."""
    if not study.sizes:
        return [""]
    sizes = [{"tokens": study.train.tokens, **study.model, **size} for size in study.sizes]
    names = [f"{size['width']}x{size['layers']}" for size in sizes]
    if len(set(names)) < len(names):
        others = dict.fromkeys(key for size in study.sizes for key in size if key not in ("width", "layers"))
        differing = [key for key in others if len({str(size.get(key)) for size in sizes}) > 1]
        names = ["-".join([n, *(f"{key}{s.get(key)}" for key in differing)]) for s, n in zip(sizes, names, strict=True)]
    return names


def matching_tables(study: Study, vocab_size: int) -> dict[str, list[dict]]:
    """What each matching rule would make of the study's variants, and what that costs in FLOPs a training token."""
    tables = {}
    for rule in RULES:
        rows = []
        for label, variant in _resolve(dataclasses.replace(study, match=rule), vocab_size):
            if isinstance(variant, ValueError):
                rows.append({"label": label, "error": str(variant)})
                continue
            model, context = on_meta(variant.arch, variant.options), variant.options["context"]
            widths = {name: variant.options[name] for name in ("ffn_width", "heads")}
            flops = {
                "train_flops_per_token": 3 * model.flops_per_token(context),
                "score_flops_per_token": 3 * model.score_flops(context),
            }
            rows.append({"label": label, "size": variant.size} | widths | {"params": variant.params} | flops)
        tables[rule] = rows
    return tables


def expand(study: Study) -> Iterator[tuple[str, str, str, dict]]:
    """(family, arch, label, own options) of each variant, with every combination of the values in its lists.

    Numbers make a family, a curve over bytes; other values (`swa`, `gret`) make families of their own.
    """
    for variant in study.variants:
        name = variant_label(variant)
        own = {key: value for key, value in variant.items() if key not in ("label", "arch")}
        for chosen in combinations(own, f"variants: {name}"):
            label = "-".join([name, *(str(value).lower() for value in chosen.values())])
            kinds = [str(value).lower() for value in chosen.values() if type(value) not in (int, float)]
            yield "-".join([name, *kinds]), variant["arch"], label, own | chosen


def _check_budget(study: Study, data: TokenSet | RecallTask, budgets: dict[str, int]) -> None:
    context, batch = study.model["context"], study.train.batch_tokens
    if batch % context:
        raise InputError(f"train.batch_tokens={batch} must be a multiple of model.context={context}")
    for name, tokens in budgets.items():
        if tokens < batch:
            raise InputError(f"{name}={tokens} is less than one batch of train.batch_tokens={batch}")
    _check_devices(study.train, batch // context)
    data.check(context)


def _check_devices(train: TrainConfig, sequences: int) -> None:
    if sequences % (train.devices * train.num_nodes):
        raise InputError(
            f"train.devices={train.devices} and train.num_nodes={train.num_nodes} must divide the batch's {sequences} "
            "sequences (train.batch_tokens / model.context)"
        )
    if train.strategy not in STRATEGIES:
        raise InputError(f"train.strategy={train.strategy!r}: must be one of {', '.join(STRATEGIES)}, Lightning's")
    if train.strategy.startswith("fsdp") and find_device().type != "cuda":
        raise InputError(f"train.strategy={train.strategy}: needs GPUs; ddp works without")


# What this machine does


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
