"""The Lightning module and data module under a plain Trainer, and runs that are interrupted and go on."""

import math
import signal
import time
from dataclasses import replace
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from helpers import each_variant
from lightning.pytorch.loggers import CSVLogger
from miniature import one_run, tiny_study, train, train_runs

from eval.evaluate import evaluate_runs, load_model
from eval.subject import EvalContext
from train.data import DataModule
from train.errors import Interrupted
from train.files import write_atomic
from train.module import LanguageModel
from train.plan import Plan, step_counts
from train.runner import make_module
from train.study import parse_study

QUIET = dict.fromkeys(("enable_checkpointing", "enable_model_summary", "enable_progress_bar"), False)
OPTIONS = {"vocab_size": 257, "width": 32, "layers": 2, "heads": 2, "context": 16}


def test_works_with_a_plain_trainer_and_learns(data, tmp_path):
    model = LanguageModel("gqa", OPTIONS | {"kv_heads": 1}, tokens=60 * 256, lr=1e-2, warmup_tokens=1000)
    batches = DataModule(data, context=16, batch_size=16, val_tokens=512)
    often = {"log_every_n_steps": 10, "val_check_interval": 30, "check_val_every_n_epoch": None}
    trainer = L.Trainer(max_steps=60, accelerator="cpu", logger=CSVLogger(tmp_path), **often, **QUIET)
    trainer.fit(model, batches)
    assert model.tokens_seen == 60 * 256
    (validated,) = trainer.validate(model, batches, verbose=False)
    assert validated["val/loss"] < 2 < math.log(257)
    assert validated["val/bpb"] == pytest.approx(validated["val/loss"] / math.log(2), rel=0.01)  # a byte is a token


def test_each_epoch_of_a_plain_trainer_goes_on_where_the_last_one_ended(data, monkeypatch):
    model, seen = LanguageModel("mha", OPTIONS, tokens=12 * 32), []
    monkeypatch.setattr(model, "on_train_batch_start", lambda batch, n: seen.append(batch[0]))
    trainer = L.Trainer(
        max_epochs=3, limit_train_batches=4, accelerator="cpu", limit_val_batches=0, logger=False, **QUIET
    )
    batches = DataModule(data, context=16, batch_size=2)
    trainer.fit(model, batches)
    assert len(seen) == 12
    for k, inputs in enumerate(seen):
        assert torch.equal(inputs, batches.training[k][0])


@each_variant
def test_compiled_parts_have_the_same_loss_and_gradients(arch, options):
    """What a GPU runs, up to the code that inductor makes of it; one graph a block, without breaks."""
    plain, compiled = (LanguageModel(arch, OPTIONS | options | {"heads": 4}, tokens=1) for _ in range(2))
    names = list(compiled.state_dict())
    torch.compiler.reset()
    compiled.compile_parts(backend="aot_eager", fullgraph=True)
    assert list(compiled.state_dict()) == names
    tokens = torch.randint(257, (2, 17))
    losses = [module.mean_nats(tokens[:, :-1], tokens[:, 1:]) for module in (plain, compiled)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for one, other in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@each_variant
def test_documents_are_trained_on_as_if_each_were_alone(arch, options):
    """In training, validation in pieces and traced by the compiler, one graph a block. Token 5 ends a document and
    belongs to it."""
    masked = {"document_end": 5, "pieces": 2}  # pieces: of the validation
    module, alone = (LanguageModel(arch, OPTIONS | options | {"heads": 4}, tokens=1, **how) for how in (masked, {}))
    tokens = torch.randint(6, 257, (3, 60))
    tokens[0, [0, 20, 21]] = tokens[1, [31, 59]] = 5
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    nats = [
        alone.sum_nats(*(x[b : b + 1, part] for x in (inputs, targets)))
        for b, ends in enumerate(([0, 1, 21, 22, 59], [0, 32, 59], [0, 59]))
        for part in map(slice, ends, ends[1:])
    ]
    expected = sum(nats) / targets.numel()
    torch.testing.assert_close(module.mean_nats(inputs, targets), expected)
    module._validated = []
    module.validation_step((inputs, targets, 1), 0)
    assert module._validated[0][0] / targets.numel() == pytest.approx(expected.item(), rel=1e-5)
    torch.compiler.reset()
    module.compile_parts(backend="eager", fullgraph=True)
    loss = module.mean_nats(inputs, targets)
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(x, m.parameters()) for x, m in ((loss, module), (expected, alone))]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("pieces", [2, 8])
def test_a_batch_in_pieces_has_the_same_loss_and_gradient(pieces, data):
    """More pieces than the batch has sequences, too."""
    steps = []
    for number in (1, pieces):
        model = LanguageModel("mha", OPTIONS, tokens=48, seed=0, pieces=number)
        trainer = L.Trainer(max_steps=1, accelerator="cpu", limit_val_batches=0, logger=False, **QUIET)
        trainer.fit(model, DataModule(data, context=16, batch_size=3))
        steps.append((model._loss, model._grad_norm))
    torch.testing.assert_close(*steps)


def test_a_long_run_is_compiled_and_the_step_that_compiles_is_not_timed(data, monkeypatch):
    whole = LanguageModel.compile_parts
    monkeypatch.setattr("archs.ops.gains_by_compiling", lambda device, flops: True)
    monkeypatch.setattr(LanguageModel, "compile_parts", lambda self: whole(self, backend="eager"))
    model = LanguageModel("mha", OPTIONS, tokens=3 * 64)
    seconds = []
    monkeypatch.setattr(model, "on_train_batch_end", lambda *_: seconds.append(model.train_seconds))
    trainer = L.Trainer(max_steps=3, accelerator="cpu", limit_val_batches=0, logger=False, **QUIET)
    trainer.fit(model, DataModule(data, context=16, batch_size=4))
    assert (model.tokens_seen, model.tokens_untimed) == (3 * 64, 64)
    assert seconds[0] == 0 < seconds[1] < seconds[2]
    assert model.tokens_per_s == pytest.approx(128 / model.train_seconds)
    assert all(block._compiled_call_impl is None for block in model.model.blocks)  # decode would compile each length


def test_the_rate_warms_up_and_falls_to_a_tenth(data, tmp_path):
    model = LanguageModel("mha", OPTIONS, tokens=10_000, lr=1.0, warmup_tokens=1000)
    rates = [model.rate(tokens) for tokens in range(0, 10_001, 100)]
    assert rates[0] < 0.01
    assert max(rates) == rates[10] == pytest.approx(1.0)
    assert rates == sorted(rates[:11]) + sorted(rates[11:], reverse=True)
    assert rates[-1] == pytest.approx(0.1)
    short = make_module(*one_run(data, tmp_path, warmup_tokens=10**9), tokens=2000, pieces=1)
    assert max(map(short.rate, range(2001))) == 1.0  # a warm-up that is meant for longer runs is shortened


def test_a_wsd_schedule_is_constant_and_then_falls_to_zero():
    model = LanguageModel("mha", OPTIONS, tokens=11_000, lr=1.0, warmup_tokens=1000, schedule="wsd")
    assert [model.rate(tokens) for tokens in range(1000, 9001, 500)] == pytest.approx([1.0] * 17)
    falling = [model.rate(tokens) for tokens in range(9000, 11_001, 500)]
    assert falling == pytest.approx([1 - math.sqrt(done / 4) for done in range(5)])


def test_muon_moves_the_matrices_of_layers_and_adamw_the_rest():
    """Muon's update is an orthogonal matrix times 0.2 sqrt(the larger side), so that its elements have AdamW's size."""
    options = OPTIONS | {"kv_rank": 8, "rope_dim": 4}
    model = LanguageModel("mla", options, tokens=1, lr=1e-2, optimizer="muon", weight_decay=0)
    optimizer = model.configure_optimizers()["optimizer"]
    before = {name: p.detach().clone() for name, p in model.model.named_parameters()}
    tokens = torch.randint(257, (8, 17))
    model.mean_nats(tokens[:, :-1], tokens[:, 1:]).backward()
    for group in optimizer.param_groups:  # as a schedule sets it
        group["lr"] = 1e-3
    optimizer.step()
    for name, p in model.model.named_parameters():
        moved = (p.detach() - before[name]) / 1e-3
        if p.dim() == 2 and "embed" not in name:
            singular = torch.linalg.svdvals(moved / (0.2 * max(p.shape) ** 0.5))
            assert 0.9 < singular.max() < 1.4, name  # five steps of the iteration do not reach the smallest
        else:
            assert moved.abs().max() <= 1.001, name  # the first step of Adam is the sign of the gradient


def test_checkpoints_are_no_training_time(data, tmp_path, monkeypatch):
    plan, run = one_run(data, tmp_path, checkpoint_steps=1, tokens=128 * 8)
    monkeypatch.setattr("train.checkpoints.write_atomic", lambda *args: time.sleep(0.3) or write_atomic(*args))
    train(plan, run)
    trained = run.record()["train"]
    assert trained["checkpoint_seconds"] > 4 * 0.3
    assert trained["seconds"] < trained["checkpoint_seconds"] / 2


def test_decay_is_on_matrices_alone():
    groups = LanguageModel("mha", OPTIONS, tokens=1).configure_optimizers()["optimizer"].param_groups
    assert {p.dim() > 1 for p in groups[0]["params"]} == {True}
    assert {p.dim() > 1 for p in groups[1]["params"]} == {False}
    assert (groups[0]["weight_decay"], groups[1]["weight_decay"]) == (0.1, 0.0)


def test_the_seed_fixes_the_weights_and_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    first, again, other = (LanguageModel("mha", OPTIONS, tokens=1, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.model.embed.weight, again.model.embed.weight)
    assert not torch.equal(first.model.embed.weight, other.model.embed.weight)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(("tokens", "points"), [(3072, 4), (3071, 4), (128, 10), (128 * 25, 10), (128 * 19, 10)])
def test_the_last_step_is_validated_and_the_budget_kept(tokens, points):
    steps, every = step_counts(tokens, tiny_study(val_points=points).train)
    assert steps % every == 0
    assert tokens * 0.5 < steps * 128 <= tokens


def test_a_run_that_was_killed_before_its_record_was_written_gets_one(data, tmp_path):
    plan, run = one_run(data, tmp_path)
    train_runs(plan)
    record = run.record()
    assert [row["tokens"] for row in record["curve"]] == [128 * n for n in (6, 12, 18, 24)]
    (run.directory / "record.json").unlink()
    assert train_runs(plan) == []
    assert run.record()["curve"] == record["curve"]
    assert run.record()["train_tokens"] == record["train_tokens"]


def test_a_signal_at_the_last_step_stops_the_study_after_the_run(data, tmp_path, monkeypatch):
    plan = Plan(tiny_study(), data, tmp_path)
    runs = plan.look().runs
    original = LanguageModel.on_validation_epoch_end

    def on_validation_epoch_end(self):
        original(self)
        if self.tokens_seen == 128 * 24:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(LanguageModel, "on_validation_epoch_end", on_validation_epoch_end)
    with pytest.raises(Interrupted):
        train_runs(plan)
    assert ["train" in run.record() for run in runs] == [True, False]


def test_batches_go_round_the_devices_in_turn(data):
    batches = DataModule(data, context=16, batch_size=2)
    one = [inputs for (inputs, _), _ in zip(batches.train_dataloader(), range(6), strict=False)]
    cpu = SimpleNamespace(root_device=torch.device("cpu"))
    trainer = SimpleNamespace(global_step=1, accumulate_grad_batches=1, world_size=2, strategy=cpu)
    batches.trainer = trainer
    for rank in (0, 1):
        trainer.global_rank = rank
        own = [inputs for (inputs, _), _ in zip(batches.train_dataloader(), range(2), strict=False)]
        assert all(torch.equal(a, b) for a, b in zip(own, one[2 + rank :: 2], strict=True))


def test_every_variant_of_a_seed_sees_the_same_batches(data, tmp_path, monkeypatch):
    seen = {}
    original = LanguageModel.training_step

    def training_step(self, batch, batch_idx):
        seen.setdefault(self.hparams.arch, []).append(batch[0].clone())
        return original(self, batch, batch_idx)

    monkeypatch.setattr(LanguageModel, "training_step", training_step)
    train_runs(Plan(tiny_study(), data, tmp_path))
    assert len(seen["mha"]) == 24
    assert all(torch.equal(a, b) for a, b in zip(seen["mha"], seen["mqa"], strict=True))


def test_a_study_can_mask_documents(data, tmp_path):
    """It is another run; one that does not ask for it keeps its key and says nothing of it."""
    (plan, run), (plain_plan, plain) = (one_run(data, tmp_path / name, document_mask=name == "m") for name in "mp")
    modules = [make_module(p, r, 128, 1) for p, r in ((plan, run), (plain_plan, plain))]
    assert [module.hparams.document_end for module in modules] == [data.end_of_text, None]
    assert run.key != plain.key
    assert plan.config(run)["train"]["document_mask"] is True
    assert "document_mask" not in plain_plan.config(plain)["train"]
    train(plan, run)
    context = EvalContext(load_model(run), data, plan.study.eval, torch.float32, 1.0, print)
    masked, unmasked = (replace(context, document_end=p.document_end).predictions.nats_NT for p in (plan, plain_plan))
    assert not torch.equal(masked, unmasked)
    assert math.isfinite(masked.sum())


class Closed:
    """A split that nothing may read."""

    def __len__(self):
        return 10**6

    def __getitem__(self, places):
        raise AssertionError("a closed split was read")


def test_rates_are_chosen_and_models_trained_without_a_look_at_test(data, tmp_path):
    """The text that comparisons read is opened by evaluation alone, which in turn reads no other."""
    study = parse_study(tiny_study(lr=[1e-3, 2e-3], tuning_seeds=1).model_dump() | {"variants": [{"arch": "mha"}]})
    training = Plan(study, replace(data, test=Closed()), tmp_path)
    assert train_runs(training) == []
    tuning = [run.record() for run in training.look().tuning_runs]
    assert len(tuning) >= 4
    assert all(record["curve"] for record in tuning)
    evaluation = Plan(study, replace(data, train=Closed(), tune=Closed()), tmp_path)
    assert evaluate_runs(evaluation) == []
    assert all(run.record()["loss"]["val_bpb"] > 0 for run in evaluation.look().runs)


def test_bf16_trains_too(data, tmp_path):
    plan, run = one_run(data, tmp_path, precision="bf16")
    train(plan, run)
    assert run.record()["precision"] == "bf16"
