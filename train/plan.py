"""What a study asks for, and how much of it is done.

A `Plan` knows the study, the data and the directory; a `Snapshot` is one look at the records in that directory. A run
is done when a record with its key says that it was trained to the end. Everything that determines a run's weights is
hashed into its key, so a changed study retrains just the runs whose weights it changes.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from archs.techniques import TECHNIQUES, Technique, from_settings
from train.batches import TrainingData
from train.errors import InputError
from train.files import content_key, read_json, write_json
from train.machine import find_device, resolve_dtype, resolve_precision
from train.meta import on_meta
from train.store import PLAN
from train.study import RECIPE, Study, TrainConfig
from train.tokenizer import JSON, file_of, save_vocabulary, vocabulary
from train.tuning import MOST_ROUNDS, Tuned, choose, facts, next_rate, tried, tuning_seeds
from train.variants import Variant, resolve_variants

# Settings that do not determine a run's result. Devices share one batch.
NOT_IN_KEY = {"tuning_seeds", "tuning_share", "devices", "num_nodes", "strategy"}
NOT_IN_KEY |= {"checkpoint_seconds", "checkpoint_steps", "loggers"}
# Settings that came later: at their default they are left out, so that the keys of earlier runs stay as they were.
ADDED = {"document_mask": False, "optimizer": "adamw", "schedule": "cosine"}
ADDED |= {
    "qk_norm": False,
    "gate": False,
    "norm_eps": 1e-6,
    "tied_kv": False,
    "latent_scale": False,
    "latent_std": 0.02,
}  # of the options
# Keys of config.json that follow from others or only name the run.
DERIVED = {"key", "tuning", "baseline", "family", "size", "params", "match", "corpus"}


@dataclass(frozen=True)
class Run:
    """`kind`: `compared` runs are what the study is about, and they alone are evaluated; `tuning` runs try a learning
    rate; a `retrofit` trains its `parent` further for a `technique`."""

    kind: Literal["compared", "tuning", "retrofit"]
    variant: Variant
    seed: int
    lr: float
    settings: dict  # the part of its record that is known before anything is measured
    directory: Path
    name: str  # as `kvfrontier status` shows it
    parent: "Run | None" = None
    technique: Technique | None = None

    @property
    def is_imported(self) -> bool:
        """True if its weights are those of a model of others, which is not trained."""
        return bool(self.variant.weights) and not self.technique

    @property
    def key(self) -> str:
        """Hash of everything that determines the trained weights."""
        return self.settings["key"]

    def record(self) -> dict:
        """record.json as it is on the disk now; {} unless a run with this key has written it."""
        record = read_json(self.directory / "record.json")
        return record if record.get("key") == self.key else {}

    def is_finished(self, record: dict) -> bool:
        """True if the run has trained to its end, or has diverged in tuning: there, that is a result, not a failure."""
        return "train" in record or (self.kind == "tuning" and record.get("diverged", False))

    def failure(self, record: dict) -> str | None:
        """A line that says why the run failed; None if it did not."""
        failed = "failed" in record and not self.is_finished(record)
        return f"{self.name} failed: {record['failed']}" if failed else None


class Plan:
    """The runs of a study in `directory`. The stem of `study_file` names the study, whose paths are relative to its
    folder. `measures`: names of what is measured. InputError for impossible shapes or a corpus that is too small."""

    def __init__(self, study: Study, data: TrainingData, directory: Path, study_file=Path("study.yaml"), measures=()):
        self.study, self.data, self.directory = study, data, directory
        self.study_file, self.name = study_file, study_file.stem
        self.variants = resolve_variants(study, data.n_vocab, study_file.parent)
        data.check(study.model["context"])
        self.rates = study.train.lr if isinstance(study.train.lr, list) else None
        train = study.train.model_dump(exclude=NOT_IN_KEY.union(RECIPE))
        self._train_settings = _without_added(train) | {"precision": resolve_precision(study.train.precision)}
        evaluation = study.eval.model_dump() | {"level": None}  # of intervals: no measure depends on it
        self.evaluation = [evaluation, sorted(measures), resolve_dtype(study.eval.dtype), find_device().type]

    @property
    def document_end(self) -> int | None:
        """The token after which attention begins anew, where the study masks documents."""
        return self.data.end_of_text if self.study.train.document_mask else None

    def look(self) -> "Snapshot":
        """The plan's runs as the disk shows them now."""
        return Snapshot(self)

    def repeats(self) -> list[str]:
        """A line that says how often the corpus is read, if that is more than once."""
        have, most = self.data.facts["train_tokens"], max(variant.tokens for variant in self.variants)
        if not have or most <= have:
            return []
        return [f"training on {most:,} tokens goes {most / have:.1f} times over the corpus, which has {have:,}"]

    def save(self) -> None:
        """Writes plan.json, from which `kvfrontier status` and workers read the study. InputError if that fails."""
        look, runs = self.look(), []
        for run in look.known_runs:
            because = self.stale_because(run)
            entry = {
                "name": run.name,
                "directory": run.directory.relative_to(self.directory).as_posix(),
                "key": run.key,
                "eval_key": look.eval_key(run) if run.kind == "compared" else None,
                "steps": step_counts(run.variant.tokens, self.study.train)[0],
            }
            runs.append(entry | ({"stale": because} if because else {}))
        waiting = [{"name": f"{variant.label} seed {seed}"} for variant in look.untuned for seed in self.study.seeds]
        content = {
            "study": self.name,
            "study_file": str(self.study_file.resolve()),
            "settings": self.study.model_dump(),
            "tokens": str(self.data.folder) if self.data.folder else None,
            "runs": runs + waiting,
        }
        try:
            if file_of(self.study.tokenizer):  # for commands that have a run's directory alone
                save_vocabulary(self.data.tokenizer, self.directory)
            write_json(self.directory / PLAN, content)
        except OSError as e:
            raise InputError(f"cannot write to {self.directory}: {e.strerror}; choose another with --out") from None

    def compared_run(self, variant: Variant, seed: int, lr: float, tuning: dict | None) -> Run:
        """`tuning`: how the rate was found (tuning.facts); None if the study gives it."""
        place = Path("runs") / variant.label / f"seed-{seed}"
        return self._run("compared", variant, seed, lr, place, f"{variant.label} seed {seed}", tuning)

    def tuning_run(self, variant: Variant, lr: float, seed: int) -> Run:
        tokens = f"tokens {variant.tokens}" if self.study.train.tuning_share else ""
        name = f"{variant.label} lr {lr!r} seed {seed} {tokens}".strip()
        place = Path("tuning") / variant.label / name.removeprefix(f"{variant.label} ").replace(" ", "-")
        return self._run("tuning", variant, seed, lr, place, name)

    def shortened(self, variant: Variant) -> Variant:
        """The variant with the tokens of the runs that try its learning rates."""
        return dataclasses.replace(variant, tokens=int(variant.tokens * (self.study.train.tuning_share or 1)))

    @cached_property
    def smallest(self) -> dict[str, Variant]:
        """Label without size -> the variant with the least work that tries rates; {} where each size tries its own."""
        if self.study.train.tuning_share is None:
            return {}
        ordered = sorted(self.variants, key=lambda variant: variant.work, reverse=True)
        return {variant.short: variant for variant in ordered if not variant.lr}

    def _run(self, kind, variant: Variant, seed: int, lr: float, place: Path, name: str, tuning=None) -> Run:
        fingerprint, tokenizer = self.data.facts["fingerprint"], self.study.tokenizer.model_dump()
        if file_of(self.study.tokenizer):  # trained on text beyond a limit, too, which the fingerprint does not know
            tokenizer["vocabulary"] = vocabulary(self.data.tokenizer)
        hashed = {
            "arch": variant.arch,
            "options": _without_added(variant.options),
            "seed": seed,
            "corpus": fingerprint,
            "tokenizer": tokenizer,
            "train": self._run_settings(variant, lr),
        }
        if file_of(self.study.tokenizer) == JSON:  # the place of a file does not determine the weights
            hashed["tokenizer"] = tokenizer | {"name": JSON}
        if variant.source:
            hashed |= {"arch": variant.arch.rpartition(":")[2], "source": variant.source}
        if variant.weights:
            validates = {key: hashed["train"][key] for key in ("val_tokens", "precision")}
            hashed |= {"weights": variant.weights["hash"], "seed": 0, "train": validates}
        settings = variant.facts() | {
            "seed": seed,
            "match": self.study.match,
            "precision": self._train_settings["precision"],
            "corpus_fingerprint": fingerprint,
            "tokenizer": tokenizer,
            "tuning": tuning,
            "key": content_key(hashed),
        }
        return Run(kind, variant, seed, lr, settings, self.directory / place, name)

    def _run_settings(self, variant: Variant, lr: float) -> dict:
        return self._train_settings | _without_added(variant.recipe) | {"lr": lr, "tokens": variant.tokens}

    def retrofits(self, run: Run) -> list[Run]:
        """The runs that train `run` further, one for each technique that needs it and can act on the model."""
        return [self._retrofit(run, *named) for named in self._trained_techniques[run.variant.label]]

    def _retrofit(self, run: Run, name: str, technique: Technique) -> Run:
        suffix = f"{name}-{technique.budget:g}-tokens-{technique.train_tokens}-lr-{technique.lr!r}"
        variant = dataclasses.replace(run.variant, tokens=technique.train_tokens)
        settings = run.settings | {"tuning": None, "key": content_key([run.key, technique.model_dump()])}
        place = self.directory / "retrofits" / variant.label / f"seed-{run.seed}" / suffix, f"{run.name} {suffix}"
        return Run("retrofit", variant, run.seed, technique.lr, settings, *place, run, technique)

    @cached_property
    def _trained_techniques(self) -> dict[str, list[tuple[str, Technique]]]:
        """For each variant's label, (name, technique) of the techniques that train its models further."""
        prompt, entries = max(1, self.study.model["context"] // 2), self.study.eval.technique_settings()
        named = [(entry["technique"], from_settings(entry, prompt)[0]) for entry in entries]
        return {v.label: [(name, t) for name, t in named if t.trains and acts_on(t, v)] for v in self.variants}

    def config(self, run: Run) -> dict:
        """The content of a run's config.json: what determines its result, and its names."""
        config = run.settings | {"arch": run.variant.arch, "corpus": self.data.facts}
        config["train"] = self._run_settings(run.variant, run.lr)
        if run.technique:
            name = next(name for name, kind in TECHNIQUES.items() if kind is type(run.technique))
            about = {"technique": name, "of": run.parent.key, "is_full": run.technique.is_full}
            config["retrofit"] = run.technique.model_dump() | about
        return config

    def stale_because(self, run: Run) -> str:
        """What differs from the settings in the run's directory, as `train.lr was 0.001, is 0.002`; else empty."""
        old, new = read_json(run.directory / "config.json"), json.loads(json.dumps(self.config(run)))
        if old.get("key", run.key) == run.key:
            return ""
        before, after = (_flat({k: v for k, v in config.items() if k not in DERIVED}) for config in (old, new))
        changed = [name for name in {**before, **after} if before.get(name, _added(name)) != after.get(name)]
        lines = (f"{name} was {before.get(name)}, is {after.get(name)}" for name in changed)
        return "; ".join(lines) or "the format changed"


class Snapshot:
    """The runs of a plan at one moment; each record is read once. `runs` are to be compared, of all variants whose
    learning rate is known; `untuned` are the other variants; `tuning_runs` are done or can be done now."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self._records: dict[Path, dict] = {}
        self.runs: list[Run] = []
        self.tuning_runs: list[Run] = []
        self.untuned: list[Variant] = []
        self._without_rate: list[Variant] = []  # those of `untuned` for which no rate is left to try
        self._found: dict[tuple[str, int], tuple[Tuned, dict] | None] = {}  # by label and tokens
        for variant in plan.variants:
            given = variant.lr or (plan.study.train.lr if plan.rates is None else plan.rates[0])
            fixed = plan.rates is None or variant.lr or variant.weights
            lr, tuning = (given, None) if fixed else self._tune(variant)
            if lr is None:
                self.untuned.append(variant)
            else:
                self.runs += [plan.compared_run(variant, seed, lr, tuning) for seed in plan.study.seeds]

    def _tune(self, variant: Variant) -> tuple[float | None, dict | None]:
        """(learning rate, how it was found), as far as it is known, and adds the variant's tuning runs. Where these are
        shorter, the variant in the smallest size says how its best rate depends on the tokens; where there are none, it
        says the rate."""
        plan, small = self.plan, self.plan.smallest.get(variant.short)
        if small in (None, variant):
            found = self._search(variant)
            if small:  # for the other sizes
                self._search(plan.shortened(variant))
            return (found[0].lr, found[1]) if found else (None, None)
        if not plan.study.train.tuning_share:
            found = self._search(small)
            return (found[0].lr, found[1] | {"tuned_at": small.size}) if found else (None, None)
        found = [self._search(each) for each in (plan.shortened(variant), small, plan.shortened(small))]
        if None in found:
            return None, None
        (on_fewer, how), (small_on_all, _), (small_on_fewer, _) = found
        tuned = on_fewer.shifted(small_on_all, small_on_fewer)
        tokens = plan.shortened(variant).tokens
        return tuned.lr, how | vars(tuned) | {"tokens": tokens, "tuned_on": on_fewer.lr}

    def _search(self, variant: Variant) -> tuple[Tuned, dict] | None:
        """The rate of the variant for its number of tokens, and how it was found; None as long as runs are missing.

        Where the minimum is not known well, as many further seeds are tried.
        """
        if (variant.label, variant.tokens) in self._found:
            return self._found[variant.label, variant.tokens]
        known, seeds = {}, self.plan.study.train.tuning_seeds
        for rounds in range(1, MOST_ROUNDS + 1 if seeds > 1 else 2):  # one seed does not say how much losses scatter
            found, runs = self._search_with(variant, rounds * seeds)
            known |= {run.name: run for run in runs}
            if found is None or found[0].is_known:
                break
        self.tuning_runs += known.values()
        self._found[variant.label, variant.tokens] = found
        return found

    def _search_with(self, variant: Variant, count: int) -> tuple[tuple[Tuned, dict] | None, list[Run]]:
        """What the search with so many seeds has found, and its runs."""
        plan, seeds = self.plan, tuning_seeds(self.plan.study.seeds, count)
        losses = tried(plan.rates, lambda lr: self._tuning_losses([plan.tuning_run(variant, lr, s) for s in seeds]))
        further = next_rate(plan.rates, losses)
        rates = dict.fromkeys([*plan.rates, *losses, *([] if further is None else [further])])
        runs = [plan.tuning_run(variant, lr, seed) for lr in rates for seed in seeds]
        tuned = None if further is not None else choose(losses)
        if further is None and tuned is None:
            self._without_rate.append(variant)
        return (tuned, facts(tuned, losses)) if tuned else None, runs

    def _tuning_losses(self, runs: list[Run]) -> dict[int, float] | None:
        """The loss of each seed; None as long as one of the runs is missing."""
        losses = {run.seed: self._tuning_loss(run) for run in runs}
        return None if None in losses.values() else losses

    def _tuning_loss(self, run: Run) -> float | None:
        """Bits per byte at the end of training, infinite where it diverged; None where that is not known."""
        record = self.record(run)
        if "train" in record:
            return record["curve"][-1]["val_bpb"]
        return math.inf if record.get("diverged") else None

    def record(self, run: Run) -> dict:
        if run.directory not in self._records:
            self._records[run.directory] = run.record()
        return self._records[run.directory]

    def is_finished(self, run: Run) -> bool:
        return run.is_finished(self.record(run))

    @cached_property
    def retrofits(self) -> list[Run]:
        return [retrofit for run in self.runs for retrofit in self.plan.retrofits(run)]

    @property
    def known_runs(self) -> list[Run]:
        """All runs that have a name so far."""
        return [*self.tuning_runs, *self.runs, *self.retrofits]

    @cached_property
    def ready(self) -> list[Run]:
        """Unfinished runs that can start now: tuning, then the compared runs seed by seed, so that a stopped study has
        all variants at its finished seeds, then retrofits. A later snapshot may have more."""
        runs = sorted(self.runs, key=lambda run: self.plan.study.seeds.index(run.seed))
        retrofits = [r for run in runs if self.is_finished(run) for r in self.plan.retrofits(run)]
        return [run for run in [*self.tuning_runs, *runs, *retrofits] if not self.is_finished(run)]

    @cached_property
    def variants_to_train(self) -> list[Variant]:
        """The variant of each unfinished run; variants whose rate is not tuned yet count once per seed."""
        unfinished = [run.variant for run in self.known_runs if not self.is_finished(run)]
        return unfinished + [variant for variant in self.untuned for _ in self.plan.study.seeds]

    @property
    def failures(self) -> list[str]:
        """A line for each run that failed, and for each variant whose rates all diverged."""
        failed = [line for run in self.known_runs if (line := run.failure(self.record(run)))]
        no_rate = "no learning rate gave a finite loss; give lower ones in train.lr"
        return failed + [f"{variant.label}: {no_rate}" for variant in self._without_rate]

    def eval_key(self, run: Run) -> str:
        """Hash of everything that determines the measured part of the run's record, such as which retrofits failed."""
        failed = [retrofit.key for retrofit in self.plan.retrofits(run) if "failed" in self.record(retrofit)]
        return content_key([run.settings, *self.plan.evaluation, *([failed] if failed else [])])

    def is_evaluated(self, run: Run) -> bool:
        return self.record(run).get("eval_key") == self.eval_key(run)


def acts_on(technique: Technique, variant: Variant) -> bool:
    """True if the technique can act on the variant's models."""
    try:
        technique.validate_model(on_meta(variant.arch, variant.options))
    except ValueError:
        return False
    return True


def step_counts(tokens: int, config: TrainConfig) -> tuple[int, int]:
    """(optimizer steps, steps between validations): the budget is rounded down so that the last step is validated."""
    steps = tokens // config.batch_tokens
    val_every = max(min(2, steps), steps // config.val_points)  # 2: leaves a step for a checkpoint between validations
    return steps // val_every * val_every, val_every


def _added(path: str) -> Any:
    """The value that a setting of ADDED had before there was one."""
    return ADDED.get(path.rpartition(".")[2])


def _without_added(settings: dict) -> dict:
    """The settings without those of ADDED that have their defaults."""
    return {key: value for key, value in settings.items() if key not in ADDED or value != ADDED[key]}


def _flat(content: dict, prefix: str = "") -> dict[str, Any]:
    """{dotted path: value} of a nested mapping."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
