"""Training of one language model as a LightningModule that works with any Trainer.

AdamW with decay on matrices alone, linear warm-up and a cosine to a tenth, clipped gradients: nanoGPT's conventions.
The blocks, the last norm and on a GPU the loss are compiled where the run is long enough to gain by it.
Everything logged stands at the number of tokens seen, in every logger the Trainer has, under names that are the same
for every variant.
"""

import functools
import math
import time
from collections.abc import Collection
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from archs import build
from archs.cpu.building import compiler, takes
from archs.cpu.layers import cross_entropy
from train.batches import IGNORED

COMPILED_FROM = {"cuda": 2e15, "cpu": 2e14}  # FLOPs of a run, by parameters: compiling takes up to a minute or two


class LanguageModel(L.LightningModule):
    """`arch` and `options` go to `archs.build`; the rest is the recipe.

    tokens: the budget, where the cosine ends. warmup_tokens: until the peak rate `lr`. clip: of the gradient's norm.
    pieces: in how many parts a batch goes through the model, each again for its gradient: the same result in less
    memory and a third more time.
    Logs train/loss (nats a token), train/lr, train/grad_norm, train/tokens_per_s and train/mfu every
    `log_every_n_steps` of the Trainer, and val/loss (nats a token) and val/bpb (bits a byte of text) after each
    validation.
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
        seed: int = 0,
        pieces: int = 1,
    ):
        super().__init__()
        self.save_hyperparameters(logger=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = build(arch, **options)
        self._matrices = {name for name, p in self.named_parameters() if p.dim() > 1}  # shards of them are flat
        self._token_nats, self._compiles = token_nats, False
        self.tokens_seen = 0
        self.train_seconds = 0.0  # validation, checkpoints and the step that compiles left out
        self.tokens_untimed = 0  # of that step
        self.checkpoint_seconds = 0.0

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return self.model(tokens_BT)

    # Optimisation

    def configure_optimizers(self) -> dict:
        # A fused step unscales 16-mixed gradients itself, after they were clipped.
        fused = not (self._trainer and self.trainer.precision == "16-mixed")
        optimizer = adamw(self, self.hparams.lr, self.hparams.weight_decay, fused, self._matrices)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: self.rate(self.tokens_seen))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def rate(self, tokens: int) -> float:
        """The learning rate after `tokens`, as a share of the peak."""
        h = self.hparams
        warmup = (tokens + 1) / (h.warmup_tokens + 1)
        done = min(1.0, max(0.0, tokens - h.warmup_tokens) / max(1, h.tokens - h.warmup_tokens))
        return min(1.0, warmup) * (0.55 + 0.45 * math.cos(math.pi * done))

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        limit, wrapped = gradient_clip_val or self.hparams.clip, self.trainer.strategy.model
        if hasattr(wrapped, "clip_grad_norm_"):  # FSDP: each device holds a part of the norm
            self._grad_norm = wrapped.clip_grad_norm_(limit)
        else:
            self._grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters(), limit)
        if str(self.trainer.precision) == "16-mixed":  # its scaler looks for what is not finite, and expects some
            return
        now = torch.stack((self._loss, self._grad_norm)).detach()
        self._worst = torch.where(self._broken, self._worst, now)
        self._broken = self._broken | ~now.isfinite().all()
        if self.device.type == "cpu":
            self._check()
        else:  # to look would be to wait: the fused optimizer does nothing from here on, and the next log looks
            getattr(optimizer, "optimizer", optimizer).found_inf = self._broken.float()

    def _check(self) -> None:
        """FloatingPointError once a loss or a gradient was not finite; nothing of that step was applied."""
        if self._broken.item():
            loss, norm = self._worst.tolist()
            raise FloatingPointError(
                f"the loss is {loss:.4g} and the gradient's norm {norm:.4g} after {self.tokens_seen:,} tokens; "
                "try a lower learning rate"
            )

    # Training

    def setup(self, stage: str) -> None:
        enough = COMPILED_FROM.get(self.trainer.strategy.root_device.type, math.inf)
        work = 6 * self.model.count_params() * self.hparams.tokens  # alike for variants of matched parameters
        if stage == "fit" and work > enough and compiler():
            torch.compiler.reset()  # what the models before this one left counts against a limit
            self.compile_parts()
            self._compiles = True

    def teardown(self, stage: str) -> None:
        """The parts are as they were: decode would compile them again for each length."""
        for part in (*self.model.blocks, self.model.norm):
            part._compiled_call_impl = None
        self._token_nats, self._compiles = token_nats, False

    def compile_parts(self, **how: Any) -> None:
        """Compiles each block, alike ones together, the last norm and the loss; `how` goes to torch.compile."""
        for part in (*self.model.blocks, self.model.norm):
            part.compile(dynamic=False, **how)
        self._token_nats = torch.compile(token_nats, dynamic=False, **how)

    def mean_nats(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """The loss: nats a target."""
        pieces = min(self.hparams.pieces, len(inputs_BT))
        if pieces <= 1:
            nats = self._sum_nats(inputs_BT, targets_BT)
        else:
            parts = zip(*(x.tensor_split(pieces) for x in (inputs_BT, targets_BT)), strict=True)
            nats = sum(checkpoint(self._sum_nats, *part, use_reentrant=False) for part in parts)
        return nats / (targets_BT != IGNORED).sum()

    def _sum_nats(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        if inputs_BT.device.type != "cpu":
            return self._token_nats(self.model(inputs_BT), targets_BT).sum()
        return SumNats.apply(self.model.last_hidden_state(inputs_BT), self.model.unembed.weight, targets_BT)

    @property
    def tokens_per_s(self) -> float:
        return _rate(self.tokens_seen - self.tokens_untimed, self.train_seconds)

    def on_train_start(self) -> None:
        self.mfu(0)  # measures the peak, which is no part of training
        self._since = time.perf_counter()
        self._logged = self.train_seconds, self.tokens_seen
        self._broken = torch.zeros((), dtype=torch.bool, device=self.device)
        self._worst = torch.zeros(2, device=self.device)  # loss and norm, of the first step that broke

    def on_train_batch_start(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        if self.model.options.dropout:  # a pure function of seed and place: nothing to restore when resuming
            torch.manual_seed(hash((self.hparams.seed, self.tokens_seen)) + self.trainer.global_rank)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        loss = self.mean_nats(inputs, targets)
        if self.trainer.world_size > 1:  # gradients are averaged over devices, which may have targets in unlike numbers
            counted = (targets != IGNORED).sum().float()
            loss = loss * (counted / self.trainer.strategy.reduce(counted.clone(), reduce_op="mean"))
        self.tokens_seen += targets.numel() * self.trainer.world_size
        self._loss = loss.detach()
        return loss

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer, optimizer_closure=None) -> None:
        """The Trainer's, then the log: a checkpoint made at the end of the batch comes after what the batch logged."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self._compiles:
            self.tokens_untimed += self.tokens_seen - self._logged[1]
            self._logged = self.train_seconds, self.tokens_seen
            self._compiles = False
            self.tick(counts=False, wait=True)
        else:
            self.tick()
        if (batch_idx + 1) % self.trainer.log_every_n_steps == 0:
            seconds, tokens = self.train_seconds - self._logged[0], self.tokens_seen - self._logged[1]
            self._logged = self.train_seconds, self.tokens_seen
            self._check()
            self._log(
                {
                    "train/loss": self.trainer.strategy.reduce(self._loss, reduce_op="mean").item(),
                    "train/lr": optimizer.param_groups[0]["lr"],
                    "train/grad_norm": self._grad_norm.item(),
                    "train/tokens_per_s": _rate(tokens, seconds),
                    "train/mfu": self.mfu(_rate(tokens, seconds)),
                }
            )

    def mfu(self, tokens_per_s: float) -> float:
        """Model FLOPs utilisation (PaLM, arXiv 2204.02311, appendix B), a share of the measured matrix product's rate.

        FLOPs are the model's own, the pairs that a token sees counted and not the masked ones.
        """
        dtypes = {"bf16": torch.bfloat16, "16": torch.float16}
        dtype = dtypes.get(str(self.trainer.precision).split("-")[0], torch.float32)
        peak = self.trainer.world_size * matmul_flops_per_s(self.trainer.strategy.root_device.type, dtype)
        return tokens_per_s * 3 * self.model.flops_per_token(self.model.options.context) / peak

    def on_train_end(self) -> None:
        self.tick(wait=True)
        self._check()

    def tick(self, counts: bool = True, wait: bool = False) -> None:
        """The time since the last tick was training, or was not."""
        if wait and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.train_seconds += counts * (now - self._since)
        self._since = now

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.trainer.training:
            self._check()  # no checkpoint of what is broken
        names = "tokens_seen", "tokens_untimed", "train_seconds", "checkpoint_seconds"
        checkpoint["seen"] = {name: getattr(self, name) for name in names}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for name, value in checkpoint["seen"].items():
            setattr(self, name, value)

    # Validation

    def on_validation_epoch_start(self) -> None:
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self.tick(wait=True)
        self._val = []  # nats, tokens, bytes of each batch

    def validation_step(self, batch: tuple[Tensor, Tensor, int], batch_idx: int) -> None:
        inputs, targets, n_bytes = batch
        pieces = min(self.hparams.pieces, len(inputs))
        parts = zip(inputs.tensor_split(pieces), targets.tensor_split(pieces), strict=True)
        nats = sum(token_nats(self.model(some), wanted).sum() for some, wanted in parts)
        self._val.append((nats.item(), (targets != IGNORED).sum().item(), n_bytes))

    def on_validation_epoch_end(self) -> None:
        nats, tokens, n_bytes = (sum(column) for column in zip(*self._val, strict=True))
        metrics = {"val/loss": nats / tokens, "val/bpb": bits_per_byte(nats, n_bytes)}
        fitting = self.trainer.state.fn == "fit"
        self.log_dict(metrics, logger=not fitting)  # for callbacks, and as the result of Trainer.validate
        if fitting and not self.trainer.sanity_checking:
            self._log(metrics)
            self.tick(counts=False)

    def _log(self, metrics: dict[str, float]) -> None:
        for logger in self.loggers:
            logger.log_metrics(metrics, step=self.tokens_seen)


def adamw(
    model: torch.nn.Module, lr: float, weight_decay: float, fused: bool = True, names: Collection[str] | None = None
) -> torch.optim.AdamW:
    """With decay on matrices alone: the parameters of these names, or those that look like one."""
    parts: tuple[list, list] = [], []
    for name, p in model.named_parameters():
        parts[p.dim() <= 1 if names is None else name not in names].append(p)
    matrices, vectors = parts
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=fused)


def _rate(tokens: int, seconds: float) -> float:
    return tokens / seconds if seconds else 0.0  # nothing timed yet, as the first step compiled


@functools.cache
def matmul_flops_per_s(device_type: str, dtype: torch.dtype) -> float:
    """The rate of a large matrix product, best of several: the arithmetic roof, measured as the memory's is."""
    n, times = {"cuda": 8192}.get(device_type, 1024), []
    generator = torch.Generator(device_type)  # leaves the global one alone
    a, b = (torch.randn(n, n, device=device_type, generator=generator).to(dtype) for _ in range(2))
    while len(times) < 10 and sum(times) < 1:  # a CPU without bf16 takes seconds for one
        start = time.perf_counter()
        a @ b
        if device_type != "cpu":
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times)


def token_nats(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Cross-entropy in nats (B, T) of each target, computed in fp32; 0 where it is IGNORED."""
    logits = logits_BTV.float().flatten(0, 1)
    nats = F.cross_entropy(logits, targets_BT.flatten(), reduction="none", ignore_index=IGNORED)
    return nats.view(targets_BT.shape)


class SumNats(torch.autograd.Function):
    """The sum of `token_nats` of x (B, T, W) times a weight (V, W): the gradients are made with the loss, some rows at
    a time, so that there are never logits of them all (as in Liger Kernel, arXiv 2410.10989, section 3.2).
    """

    ROWS = 512  # products of fewer are slower, by a sixth with a vocabulary of 50,000; of more, hardly faster

    @staticmethod
    def forward(ctx, x_BTW: Tensor, weight_VW: Tensor, targets_BT: Tensor) -> Tensor:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight_VW.dtype
        x_NW, weight = x_BTW.detach().flatten(0, 1), weight_VW.detach().to(dtype)
        targets_N, sum_nats = targets_BT.flatten(), torch.zeros((), dtype=torch.float32)
        x_grad, weight_grad = torch.zeros_like(x_NW), torch.zeros_like(weight_VW, dtype=torch.float32)
        with torch.autocast("cpu", enabled=False):
            for rows in (targets_N != IGNORED).nonzero()[:, 0].split(SumNats.ROWS):
                some, wanted = x_NW[rows].to(dtype), targets_N[rows].long()
                logits = (some @ weight.T).float()
                if takes(logits):
                    sum_nats += cross_entropy(logits, wanted).sum()
                else:
                    logits = logits.log_softmax(1)
                    sum_nats -= logits.gather(1, wanted[:, None]).sum()
                    logits.exp_()[torch.arange(len(rows)), wanted] -= 1
                change = logits.to(dtype)
                x_grad[rows] = (change @ weight).to(x_grad.dtype)
                weight_grad += change.T @ some
        ctx.save_for_backward(x_grad.view_as(x_BTW), weight_grad.to(weight_VW.dtype))
        return sum_nats

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x_grad, weight_grad = ctx.saved_tensors
        return x_grad * grad, weight_grad * grad, None


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """Summed nats of text over its bytes, in bits: what can be compared across tokenizers."""
    return nats / math.log(2) / max(1, n_bytes)
