"""Training of one language model as a LightningModule that works with any Trainer.

AdamW with decay on matrices alone, linear warm-up and a cosine to a tenth, clipped gradients: nanoGPT's conventions;
`optimizer` and `schedule` choose others of train/optimizers.py. Blocks, the last norm and, on a GPU, the loss are
compiled if the run is long enough to gain by it. The x axis of every logger is the number of tokens seen, and tags are
the same for every variant.
"""

import math
import time
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from archs import build, ops
from archs.techniques import Technique
from train.batches import IGNORED, documents
from train.machine import matmul_flops_per_s
from train.optimizers import OPTIMIZERS, SCHEDULES

LOGITS_AT_ONCE = 2**30  # on a GPU; of more, parts of a batch are unembedded again for their gradient


class WithLoss(torch.autograd.Function):
    """The value of the first loss, the gradients of both."""

    @staticmethod
    def forward(ctx, loss: Tensor, other: Tensor) -> Tensor:
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad


class LanguageModel(L.LightningModule):
    """`arch` and `options` go to `archs.build`; the rest is the recipe.

    tokens: the training budget, where the schedule ends. warmup_tokens: tokens until the peak rate `lr`. clip: limit of
    the gradient's norm. pieces: the number of parts of a batch that go through the model one after the other, in less
    memory; their gradients add up. document_end: the id of the token that ends a document; with it a token attends only
    to its own document, in validation too. Logs train/* every `log_every_n_steps` of the Trainer,
    and val/loss (nats per token) and val/bpb (bits per byte of text) after each validation.
    """

    def __init__(
        self,
        arch: str,
        options: dict[str, Any],
        *,
        tokens: int,
        lr: float = 1e-3,
        warmup_tokens: int = 0,
        weight_decay: float = 0.1,
        clip: float = 1.0,
        optimizer: str = "adamw",
        schedule: str = "cosine",
        seed: int = 0,
        pieces: int = 1,
        document_end: int | None = None,
    ):
        super().__init__()
        self.save_hyperparameters(logger=False, ignore="technique")  # of a subclass; checkpoints hold plain values
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = build(arch, **options)
        self._sum_nats, self._compiles = ops.unembed_cross_entropy, False
        self.tokens_seen = 0
        self.train_seconds = 0.0  # without validation, checkpoints and the step that compiles
        self.tokens_untimed = 0  # tokens of the step that compiles
        self.checkpoint_seconds = 0.0
        self.backend = ""  # attention's kernels in training

    def configure_optimizers(self) -> dict:
        optimizer = OPTIMIZERS[self.hparams.optimizer](self.model, self.hparams.lr, self.hparams.weight_decay)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: self.rate(self.tokens_seen))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def rate(self, tokens: int) -> float:
        """The learning rate after `tokens`, as a share of the peak."""
        h = self.hparams
        warmup = (tokens + 1) / (h.warmup_tokens + 1)
        done = min(1.0, max(0.0, tokens - h.warmup_tokens) / max(1, h.tokens - h.warmup_tokens))
        return min(1.0, warmup) * SCHEDULES[self.hparams.schedule](done)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        limit = gradient_clip_val or self.hparams.clip
        self._grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters(), limit)
        now = torch.stack((self._loss, self._grad_norm)).detach()
        self._last_values = torch.where(self._diverged, self._last_values, now)
        self._diverged = self._diverged | ~now.isfinite().all()
        if self.device.type == "cpu" or self.hparams.optimizer != "adamw":
            self._raise_if_diverged()
        else:  # reading the flag would wait for the GPU: fused AdamW skips all steps from here on, the next log reads
            getattr(optimizer, "optimizer", optimizer).found_inf = self._diverged.float()

    def _raise_if_diverged(self) -> None:
        """FloatingPointError if a loss or a gradient was not finite; that step has changed no weight."""
        if self._diverged.item():
            loss, norm = self._last_values.tolist()
            values = f"the loss is {loss:.4g} and the gradient's norm {norm:.4g}"
            raise FloatingPointError(f"{values} after {self.tokens_seen:,} tokens; try a lower learning rate")

    def setup(self, stage: str) -> None:
        flops = 6 * self.model.count_params() * self.hparams.tokens  # the same for variants of matched parameters
        if stage == "fit" and ops.gains_by_compiling(self.trainer.strategy.root_device, flops):
            torch.compiler.reset()  # graphs of earlier models count against a limit
            torch._dynamo.config.recompile_limit = 64  # two kinds of blocks, pieces of two sizes, training, validation
            self.compile_parts()
            self._compiles = True

    def teardown(self, stage: str) -> None:
        """Undoes the compilation: decode would compile the parts again for each length."""
        for part in (*self.model.blocks, self.model.norm):
            part._compiled_call_impl = None
        self._sum_nats, self._compiles = ops.unembed_cross_entropy, False

    def compile_parts(self, **how: Any) -> None:
        """Compiles each block (equal ones share code), the last norm and the loss; `how` goes to torch.compile."""
        for part in (*self.model.blocks, self.model.norm):
            part.compile(dynamic=False, **how)
        self._sum_nats = ops.compiled(ops.unembed_cross_entropy, **how)

    def mean_nats(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """The loss: nats per target."""
        return self.sum_nats(inputs_BT, targets_BT) / (targets_BT != IGNORED).sum()

    def sum_nats(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        nats, own = self._sum_token_nats(inputs_BT, targets_BT), None
        if self.training and torch.is_grad_enabled():
            own = self.model.own_loss()
        return nats if own is None else WithLoss.apply(nats, own)

    def _sum_token_nats(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        hidden_BTW = self.model.last_hidden_state(inputs_BT, documents(inputs_BT, self.hparams.document_end))
        weight_VW = self.model.unembed.weight
        rows = max(1, LOGITS_AT_ONCE // (len(weight_VW) * inputs_BT.shape[1]))
        if len(inputs_BT) <= rows or inputs_BT.is_cpu:  # there the loss's kernel makes few logits at once
            return self._sum_nats(hidden_BTW, weight_VW, targets_BT)
        parts = zip(hidden_BTW.split(rows), targets_BT.split(rows), strict=True)
        return sum(checkpoint(self._sum_nats, x, weight_VW, y, use_reentrant=False) for x, y in parts)

    def piece_loss(self, inputs_BT: Tensor, targets_BT: Tensor, counted: Tensor, share: float) -> Tensor:
        """What a piece of a batch adds to its loss; the batch has `counted` targets and the piece this share of it."""
        return self.sum_nats(inputs_BT, targets_BT) / counted

    def pieces(self, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
        return list(zip(*(x.tensor_split(min(self.hparams.pieces, len(x))) for x in tensors), strict=True))

    @property
    def loss(self) -> float:
        """Of the last batch."""
        return self._loss.item()

    @property
    def timed(self) -> tuple[float, int]:
        """(seconds, tokens) of training, without the step that compiles."""
        return self.train_seconds, self.tokens_seen - self.tokens_untimed

    @property
    def tokens_per_s(self) -> float:
        return _rate(*self.timed)

    def on_train_start(self) -> None:
        self.mfu(0)  # measures the peak rate now, outside the time of training
        self.backend = self.try_kernels()
        self._since = time.perf_counter()
        self._logged = self.timed
        self._diverged = torch.zeros((), dtype=torch.bool, device=self.device)
        self._last_values = torch.zeros(2, device=self.device)  # loss and gradient norm, up to the step that diverged

    def try_kernels(self) -> str:
        """Runs a sequence through the model and back, not compiled, where each kernel is compared with its formula.
        Returns the names of attention's kernels."""
        o = self.model.options
        tokens_1T = torch.arange(o.context, device=self.device)[None] % o.vocab_size

        def step() -> None:
            with self.trainer.precision_plugin.forward_context():
                loss = self.mean_nats(tokens_1T, tokens_1T)
            torch.autograd.grad(loss, list(self.parameters()), allow_unused=True)

        with torch.compiler.set_stance("force_eager"):
            return ops.attention_kernels(step)

    def on_train_batch_start(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        if self.model.options.dropout:
            self.reseed()

    def reseed(self) -> None:
        """Makes random numbers a function of the seed and the place, so that resuming needs no generator's state."""
        torch.manual_seed(hash((self.hparams.seed, self.tokens_seen)) + self.trainer.global_rank)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of the batch's first piece; `backward` goes on to the others."""
        inputs, targets = batch
        counted = (targets != IGNORED).sum().float()
        if self.trainer.world_size > 1:  # gradients are averaged over devices, whose numbers of targets may differ
            counted = self.trainer.strategy.reduce(counted, reduce_op="mean")
        self.model.begin_step(self.tokens_seen)
        self.tokens_seen += targets.numel() * self.trainer.world_size
        first, *self._later = ((*piece, counted, len(piece[0]) / len(inputs)) for piece in self.pieces(inputs, targets))
        loss = self.piece_loss(*first)
        self._loss = loss.detach()
        return loss

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        loss.backward()
        while self._later:
            with self.trainer.precision_plugin.forward_context():
                loss = self.piece_loss(*self._later.pop(0))
            loss.backward()
            self._loss = self._loss + loss.detach()

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer, optimizer_closure=None) -> None:
        """The Trainer's step, then the log, so that a checkpoint at the end of a batch comes after the batch's log."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        compiled, self._compiles = self._compiles, False
        self.tick(counts=not compiled, wait=compiled)
        self.tokens_untimed += compiled * (self.timed[1] - self._logged[1])
        if (batch_idx + 1) % self.trainer.log_every_n_steps == 0:
            seconds, tokens = (now - before for now, before in zip(self.timed, self._logged, strict=True))
            self._logged = self.timed
            self._raise_if_diverged()
            self._log(
                {
                    "train/loss": self.trainer.strategy.reduce(self._loss, reduce_op="mean").item(),
                    "train/lr": optimizer.param_groups[0]["lr"],
                    "train/grad_norm": self._grad_norm.item(),
                    "train/tokens_per_s": _rate(seconds, tokens),
                    "train/mfu": self.mfu(_rate(seconds, tokens)),
                }
            )

    def mfu(self, tokens_per_s: float) -> float:
        """Model FLOPs utilisation (PaLM, arXiv 2204.02311, appendix B): a share of the measured rate of a large matrix
        product. Pairs of tokens that attention masks out do not count as FLOPs."""
        dtype = torch.bfloat16 if str(self.trainer.precision).startswith("bf16") else torch.float32
        peak = self.trainer.world_size * matmul_flops_per_s(self.trainer.strategy.root_device.type, dtype)
        return tokens_per_s * 3 * self.model.flops_per_token(self.model.options.context) / peak

    def on_train_end(self) -> None:
        self.tick(wait=True)
        self._raise_if_diverged()

    def tick(self, counts: bool = True, wait: bool = False) -> None:
        """Ends an interval, once the GPU is done if asked to `wait`, and adds it to `train_seconds` if it `counts`."""
        if wait and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.train_seconds += counts * (now - self._since)
        self._since = now

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.trainer.training:
            self._raise_if_diverged()  # diverged weights are never saved
        names = "tokens_seen", "tokens_untimed", "train_seconds", "checkpoint_seconds", "backend"
        checkpoint["seen"] = {name: getattr(self, name) for name in names}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for name, value in checkpoint["seen"].items():
            setattr(self, name, value)

    def on_validation_epoch_start(self) -> None:
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self.tick(wait=True)
        self._validated = []  # (nats, tokens, bytes) of each batch

    def validation_step(self, batch: tuple[Tensor, Tensor, int], batch_idx: int) -> None:
        inputs, targets, n_bytes = batch
        nats = sum(self.sum_nats(*piece) for piece in self.pieces(inputs, targets))
        self._validated.append((nats.item(), (targets != IGNORED).sum().item(), n_bytes))

    def on_validation_epoch_end(self) -> None:
        nats, tokens, n_bytes = (sum(column) for column in zip(*self._validated, strict=True))
        metrics = {"val/loss": nats / tokens, "val/bpb": bits_per_byte(nats, n_bytes)}
        fitting = self.trainer.state.fn == "fit"
        self.log_dict(metrics, logger=not fitting)  # for callbacks and for the result of Trainer.validate
        if fitting and not self.trainer.sanity_checking:
            self._log(metrics)
            self.tick(counts=False)

    def _log(self, metrics: dict[str, float]) -> None:
        for logger in self.loggers:
            logger.log_metrics(metrics, step=self.tokens_seen)


class Retrofit(LanguageModel):
    """Training of a finished model, whose weights are to be loaded, for a technique that changes how its cache works.
    The technique's penalty is added to the loss."""

    def __init__(self, technique: Technique, arch: str, options: dict[str, Any], **recipe: Any):
        super().__init__(arch, options, **recipe)
        self.technique = technique
        self.model = technique.retrofit(self.model)

    def setup(self, stage: str) -> None:
        """A retrofit is too short to gain by compilation."""

    def on_train_batch_start(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.reseed()
        self._done = self.tokens_seen / self.hparams.tokens
        self.technique.before_step(self.model, self._done)

    def piece_loss(self, inputs_BT: Tensor, targets_BT: Tensor, counted: Tensor, share: float) -> Tensor:
        nats = super().piece_loss(inputs_BT, targets_BT, counted, share)
        return nats + share * self.technique.penalty(self.model, self._done)


def _rate(seconds: float, tokens: int) -> float:
    """Tokens per second; 0 while nothing is timed, as the first step compiled."""
    return tokens / seconds if seconds else 0.0


def token_nats(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Cross-entropy of each target in nats, (B, T), computed in fp32; 0 where the target is IGNORED."""
    logits = logits_BTV.float().flatten(0, 1)
    nats = F.cross_entropy(logits, targets_BT.flatten(), reduction="none", ignore_index=IGNORED)
    return nats.view(targets_BT.shape)


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """`nats` summed over a text, as bits per byte of it: a loss that can be compared across tokenizers."""
    return nats / math.log(2) / max(1, n_bytes)
