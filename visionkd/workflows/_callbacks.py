"""Lightning callbacks of a training stage: checkpoints, metrics, progress, signals."""

from __future__ import annotations

import csv
import io
import math
import os
import shutil
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO

from visionkd.errors import DataError, InterruptedRunError, WorkError
from visionkd.files import replacing, write_bytes, write_text
from visionkd.methods._base import DistillationModule
from visionkd.types import Listener, Progress
from visionkd.workflows._rundir import RunDirectory

_PROGRESS_EVERY_S = 0.5


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints are complete or absent, and no pickle is loaded."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        buffer = io.BytesIO()  # a full disk is then a plain OSError, and the old checkpoint stays
        torch.save(checkpoint, buffer)
        write_bytes(path, buffer.getvalue())

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        try:
            return torch.load(path, map_location=map_location or "cpu", weights_only=True)
        except (RuntimeError, EOFError, ValueError, OSError) as error:
            raise WorkError(
                f"The checkpoint {path} cannot be read: {error}", hint="Start the run again with --overwrite."
            ) from error


class Checkpoints(Callback):
    """Writes ``last.ckpt`` from time to time and at each epoch's end, and ``best.ckpt`` beside it.

    A checkpoint is written only while all weights are finite, so ``last.ckpt`` is always one to go on from.
    """

    def __init__(self, run: RunDirectory, directory: Path, *, every_s: float, check_every: int) -> None:
        self.run = run
        self.directory = directory
        self.every_s = every_s
        self.check_every = check_every
        self.best = -math.inf
        self._is_best = False
        self.stop_signal: int | None = None
        self._last_s = time.monotonic()
        self._old_handlers: dict[int, Any] = {}

    @property
    def last_path(self) -> Path:
        return self.directory / "last.ckpt"

    @property
    def best_path(self) -> Path:
        return self.directory / "best.ckpt"

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "is_best": self._is_best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]
        if state_dict["is_best"] and self.run.writes:  # the killed run may not have come to it
            _link(self.last_path, self.best_path)

    def setup(self, trainer: Trainer, pl_module: DistillationModule, stage: str) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._old_handlers[number] = signal.signal(number, self._on_signal)
            except ValueError:  # not in the main thread: the caller handles signals
                return

    def teardown(self, trainer: Trainer, pl_module: DistillationModule, stage: str) -> None:
        while self._old_handlers:
            signal.signal(*self._old_handlers.popitem())

    def _on_signal(self, number: int, frame: Any) -> None:
        if self.stop_signal is not None:  # asked twice: stop at once, with the checkpoint written before
            raise KeyboardInterrupt
        self.stop_signal = number

    def on_train_batch_end(self, trainer: Trainer, pl_module: DistillationModule, *args: Any) -> None:
        done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        at_end = done >= trainer.num_training_batches
        if at_end or done % trainer.accumulate_grad_batches:
            return
        stop, due = self.stop_signal is not None, time.monotonic() - self._last_s >= self.every_s
        if trainer.world_size > 1:  # all ranks must agree; asking costs a message, so not at every step
            if done % self.check_every:
                return
            stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
            due = trainer.strategy.broadcast(due)
        if stop or due:
            self._is_best = False
            self._save(trainer, pl_module, (trainer.current_epoch, done))
        if stop:
            raise self._interrupted()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        score = pl_module.epoch_metrics.get(f"val/{pl_module.task.main_metric}", -math.inf)
        self._is_best = score > self.best
        self.best = max(self.best, score)
        self._save(trainer, pl_module, (trainer.current_epoch + 1, 0))
        if self._is_best and trainer.is_global_zero:
            _link(self.last_path, self.best_path)
        stop = self.stop_signal is not None
        if trainer.world_size > 1:
            stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
        if stop and trainer.current_epoch + 1 < (trainer.max_epochs or 0):
            raise self._interrupted()

    def _interrupted(self) -> InterruptedRunError:
        return InterruptedRunError(
            "Interrupted; a checkpoint was written.", hint=f"Continue with --resume --out {self.run.path}"
        )

    def _save(self, trainer: Trainer, pl_module: DistillationModule, position: tuple[int, int]) -> None:
        if not all(bool(torch.isfinite(p).all()) for p in pl_module.parameters()):
            raise not_finite("A weight", trainer, self.last_path)
        pl_module.position = position
        trainer.save_checkpoint(self.last_path)
        self._last_s = time.monotonic()


def _link(source: Path, target: Path) -> None:
    """Give a file a second name in place of what had it; the content is shared until ``source`` is replaced."""
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
        os.replace(temporary, target)
    except OSError:  # a file system without hard links
        with replacing(target) as copy:
            shutil.copyfile(source, copy)


def not_finite(what: str, trainer: Trainer, last: Path) -> WorkError:
    """The error of a training that diverged."""
    kept = f"The last good checkpoint is kept: {last}." if last.is_file() else "No checkpoint had been written yet."
    return WorkError(
        f"{what} became NaN or infinite in epoch {trainer.current_epoch + 1} at step {trainer.global_step}. {kept}",
        hint="Try a lower learning rate (--lr), -o training.clip_grad_norm=1.0, or --precision bf16 instead of 16.",
    )


class Metrics(Callback):
    """Writes ``metrics.csv`` and ``status.json``, tells the listener, and watches for NaN and unreadable images."""

    def __init__(
        self,
        run: RunDirectory,
        listener: Listener,
        *,
        stage: str,
        file: str,
        log_every: int,
        max_unreadable: float,
        num_train: int,
        last_checkpoint: Path,
    ) -> None:
        self.run, self.listener, self.stage, self.log_every = run, listener, stage, log_every
        self.path = run.path / file
        self.max_unreadable, self.num_train = max_unreadable, num_train
        self.last_checkpoint = last_checkpoint
        self.unreadable: set[int] = set()
        self.rows = read_metrics(self.path)
        self._latest: dict[str, float] = {}
        self._images = 0
        self._epoch_images = 0
        self._mark_s = self._epoch_s = 0.0
        self._train_s_per_step = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"unreadable": sorted(self.unreadable)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.unreadable = set(state_dict["unreadable"])

    def on_train_start(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        # the file is written at each epoch's end: drop what the killed run had written after its last checkpoint
        self.rows = [row for row in self.rows if int(row["epoch"]) <= pl_module.resume_position[0]]

    def on_train_epoch_start(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        self._mark_s = self._epoch_s = time.perf_counter()
        self._images = self._epoch_images = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: DistillationModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        count = batch["image"].shape[0] * trainer.world_size
        self._images += count
        self._epoch_images += count
        self._watch_unreadable(pl_module)
        done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        at_end = done >= trainer.num_training_batches  # the epoch's own row follows
        if trainer.global_step % self.log_every == 0 and done % trainer.accumulate_grad_batches == 0 and not at_end:
            self._row(trainer, "train", self._take(trainer, pl_module), write=False)
        now = time.perf_counter()
        if now - self._mark_s >= _PROGRESS_EVERY_S:
            self.listener.progress(self._progress(trainer, done, self._images / (now - self._mark_s), now))
            self._images, self._mark_s = 0, now

    def on_validation_start(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        seconds = time.perf_counter() - self._epoch_s
        self._latest["train/images_per_s"] = self._epoch_images / max(seconds, 1e-9)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        train = self._take(trainer, pl_module)
        train["train/images_per_s"] = self._latest.get("train/images_per_s", 0.0)
        self._row(trainer, "train", train, write=False)
        self._row(trainer, "val", pl_module.epoch_metrics)
        self._latest.update(pl_module.epoch_metrics)
        epoch = trainer.current_epoch + 1
        self.run.update(epoch=epoch, step=trainer.global_step, metrics=_finite(self._latest))
        progress = self._progress(
            trainer, int(trainer.num_training_batches), train["train/images_per_s"], time.perf_counter()
        )
        self.listener.epoch_end(progress)

    def _take(self, trainer: Trainer, pl_module: DistillationModule) -> dict[str, float]:
        found = pl_module.take_train_metrics()
        if not math.isfinite(found.get("train/loss", 0.0)):
            raise not_finite("The loss", trainer, self.last_checkpoint)
        found["train/lr"] = trainer.optimizers[0].param_groups[0]["lr"]
        self._latest.update(found)
        return found

    def _row(self, trainer: Trainer, split: str, values: Mapping[str, float], *, write: bool = True) -> None:
        named = {name.removeprefix(f"{split}/"): f"{value:.6g}" for name, value in values.items()}
        self.rows.append(
            {"epoch": str(trainer.current_epoch + 1), "step": str(trainer.global_step), "split": split, **named}
        )
        if trainer.logger is not None:
            trainer.logger.log_metrics(dict(values), step=trainer.global_step)
        if write and self.run.writes:
            write_text(self.path, format_metrics(self.rows))

    def _progress(self, trainer: Trainer, done: int, images_per_s: float, now: float) -> Progress:
        steps, epochs = int(trainer.num_training_batches), int(trainer.max_epochs or 0)
        left = (steps - done) + (epochs - trainer.current_epoch - 1) * steps
        images_per_step = self._epoch_images / max(1, done)
        eta_s = left * images_per_step / images_per_s if images_per_s > 0 and self._epoch_images else None
        return Progress(
            self.stage, done, steps, trainer.current_epoch + 1, epochs, images_per_s, eta_s, dict(self._latest)
        )

    def _watch_unreadable(self, pl_module: DistillationModule) -> None:
        if pl_module.unreadable is None:
            return
        found = {int(index) for index in pl_module.unreadable.tolist() if index >= 0} - self.unreadable
        if not found:
            return
        self.unreadable |= found
        self.listener.message(f"Unreadable training images skipped so far: {len(self.unreadable)}", level="warning")
        self.run.update(unreadable_images=len(self.unreadable))
        if len(self.unreadable) > max(1.0, self.max_unreadable * self.num_train):
            raise DataError(
                f"{len(self.unreadable)} of {self.num_train} training images cannot be read, more than"
                f" data.max_unreadable={self.max_unreadable:g} allows.",
                hint="List them with 'visionkd data check DATA', or raise the limit with -o data.max_unreadable=SHARE.",
            )


def read_metrics(path: Path) -> list[dict[str, str]]:
    """Return the rows of a ``metrics.csv``; none where there is no such file."""
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return [{name: value for name, value in row.items() if value != ""} for row in csv.DictReader(file)]


def format_metrics(rows: list[dict[str, str]]) -> str:
    """Return rows as CSV, with a column for every name that occurs."""
    text = io.StringIO()
    writer = csv.DictWriter(
        text, list(dict.fromkeys(name for row in rows for name in row)), restval="", lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
