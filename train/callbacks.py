"""What accompanies a run's training: checkpoints and signals, the study's progress display, samples of text."""

import signal
import threading
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO

from train.checkpoints import checkpoint_path, write_checkpoint
from train.errors import Interrupted
from train.module import LanguageModel
from train.progress import StudyProgress
from train.tokenizer import Encoding

SECONDS_OF_ONE_SIGNAL = 2  # `timeout` and others signal a process and its group: the same signal comes twice
SAMPLE_TOKENS = 64
STEPS_BETWEEN_DECISIONS = 10  # several devices follow the first one, and wait for each other to do so


def save_checkpoint(trainer: L.Trainer, directory: Path) -> None:
    """Writes the logs to the disk, then a checkpoint: a run that continues from it does not log the same again."""
    module = trainer.lightning_module
    if trainer.training:
        module.tick(wait=True)
    started = time.perf_counter()
    for logger in trainer.loggers:
        logger.save()
    trainer.save_checkpoint(checkpoint_path(directory, trainer.global_step))
    module.checkpoint_seconds += time.perf_counter() - started
    if trainer.training:
        module.tick(counts=False)


class DurableCheckpoints(TorchCheckpointIO):
    """Writes a Trainer's checkpoints (train/checkpoints.py)."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        write_checkpoint(checkpoint, Path(path))


class CheckpointAndStop(L.Callback):
    """Writes a checkpoint every `seconds` or `steps`, and at SIGINT or SIGTERM, then raising Interrupted; a second
    signal stops at once. A validated step gets no checkpoint: a run that continues there would lack the validation. So
    a signal during a validation costs the steps since the last checkpoint."""

    def __init__(self, directory: Path, val_every: int, seconds: float, steps: int | None):
        self.directory, self.val_every, self.seconds, self.steps = directory, val_every, seconds, steps
        self.signum: int | None = None
        self.stepped = False
        self.handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, module: LanguageModel) -> None:
        self.saved, self.saved_step = time.monotonic(), trainer.global_step
        if threading.current_thread() is threading.main_thread():
            self.handlers = {s: signal.signal(s, self._stop) for s in (signal.SIGINT, signal.SIGTERM)}

    def _stop(self, signum: int, frame: Any) -> None:
        again = self.signum and time.monotonic() - self.signalled > SECONDS_OF_ONE_SIGNAL
        if again or not self.stepped:  # without a step there is nothing to save; the first may compile for a minute
            raise Interrupted(signum)
        if not self.signum:
            self.signum, self.signalled = signum, time.monotonic()

    def on_train_batch_end(self, trainer: L.Trainer, module: LanguageModel, outputs, batch, batch_idx: int) -> None:
        self.stepped = True
        if (batch_idx + 1) % self.val_every == 0:
            return
        due = time.monotonic() - self.saved > self.seconds
        due |= bool(self.steps) and trainer.global_step - self.saved_step >= self.steps
        signum = self.signum
        if trainer.world_size > 1:
            if (batch_idx + 1) % self.val_every % STEPS_BETWEEN_DECISIONS != 1:
                return
            signum, due = trainer.strategy.broadcast((signum, due))
        if signum or due:
            save_checkpoint(trainer, self.directory)
            self.saved, self.saved_step = time.monotonic(), trainer.global_step
        if signum:
            raise Interrupted(signum)

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if self.signum and trainer.world_size == 1:  # several devices stop together, after the next step
            raise Interrupted(self.signum)

    def on_train_end(self, trainer: L.Trainer, module: LanguageModel) -> None:
        """Restores the signal handlers here: Lightning restores its own before it calls `teardown`."""
        for signum, handler in self.handlers.items():
            signal.signal(signum, handler)
        self.handlers = {}

    def on_exception(self, trainer: L.Trainer, module: LanguageModel, exception: BaseException) -> None:
        self.on_train_end(trainer, module)


class ShowProgress(L.Callback):
    """Shows each step in the study's display. `work`: the work of one step."""

    def __init__(self, progress: StudyProgress, name: str, steps: int, work: float):
        self.progress, self.name, self.steps, self.work = progress, name, steps, work
        self.loss = self.speed = ""

    def on_train_start(self, trainer: L.Trainer, module: LanguageModel) -> None:
        self.progress.skip(trainer.global_step * self.work)

    def on_train_batch_end(self, trainer: L.Trainer, module: LanguageModel, outputs, batch, batch_idx: int) -> None:
        if (batch_idx + 1) % trainer.log_every_n_steps == 0:
            self.loss = f"loss {module.loss:.3f}"
            self.speed = f"{module.tokens_per_s:,.0f} tokens/s"
        detail = f"step {batch_idx + 1}/{self.steps}  {self.loss}  {self.speed}"
        self.progress.show(self.name, detail, self.work)


class LogSamples(L.Callback):
    """Writes text that the model makes at each validation to TensorBoard, always from the same random numbers. Its time
    counts as validation's."""

    def __init__(self, tokenizer: Encoding):
        self.tokenizer = tokenizer

    def on_validation_epoch_end(self, trainer: L.Trainer, module: LanguageModel) -> None:
        boards = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        if trainer.sanity_checking or not boards:
            return
        with torch.compiler.set_stance("force_eager"), torch.inference_mode(False):  # each length would be compiled
            begins = torch.tensor([[self.tokenizer.eot_token]], device=module.device)
            made = module.model.generate(begins, min(SAMPLE_TOKENS, module.model.options.context))
        text = self.tokenizer.decode(made[0, 1:].cpu().tolist())
        for board in boards:
            board.experiment.add_text(
                "sample", "".join(f"    {line}\n" for line in text.splitlines()), module.tokens_seen
            )
