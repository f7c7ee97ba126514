"""Interleaved rounds: in each, every contender makes a few steps in turn.

The load of a machine drifts by more than what is to be seen here, so a ratio is taken within each round, between slices
that lie a moment apart, and the median over rounds is reported.

One contender is Lightning's Trainer, which wants to own the loop. It is let: all others run inside its data loader,
between two batches, in the same thread (another thread would have other memory arenas and another pool of workers).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

from torch import Tensor

from _bench.contenders import NAIVE, Contender
from _bench.setting import Material, Step
from visionkd.errors import WorkError
from visionkd.types import Listener
from visionkd.workflows._callbacks import Checkpoints, Metrics
from visionkd.workflows._rundir import RunDirectory, RunListener
from visionkd.workflows._training import _quiet_lightning, _trainer

SAME_LOSS = {"32": 1e-3, "bf16": 5e-2}


@dataclass(frozen=True)
class Result:
    """How long a contender's step takes.

    Attributes:
        contender: Whose.
        step_ms: Milliseconds for each round's steps, by the step.
        loss: Loss of the first step; None where it was not seen.
    """

    contender: Contender
    step_ms: tuple[float, ...]
    loss: float | None

    def ratio(self, other: Result) -> tuple[float, float, float]:
        """Median, lower and upper quartile of the ratio to another contender's step in the same round."""
        found = [mine / theirs for mine, theirs in zip(self.step_ms, other.step_ms, strict=True)]
        if len(found) == 1:
            return found[0], found[0], found[0]
        low, middle, high = quantiles(found, n=4, method="inclusive")
        return middle, low, high

    @property
    def median_ms(self) -> float:
        return median(self.step_ms)


def measure(
    material: Material,
    contenders: Sequence[Contender],
    *,
    rounds: int,
    steps: int,
    warmup: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[Result], list[Contender]]:
    """Time contenders in interleaved rounds.

    Args:
        material: Networks and batch.
        contenders: Those to time.
        rounds: Number of rounds.
        steps: Steps of each contender in a round.
        warmup: Untimed steps of each before the first round.
        progress: Called with rounds done and rounds in all.

    Returns:
        Results in the order of ``contenders``, and those that are not installed.

    Raises:
        WorkError: If two contenders do not compute the same loss.
    """
    steppers: dict[str, Step | None] = {}
    missing = []
    for contender in contenders:
        try:
            steppers[contender.name] = contender.make(material) if contender.make else None
        except ImportError:
            missing.append(contender)
    schedule = _Schedule(steppers, rounds=rounds, steps=steps, warmup=warmup, progress=progress)
    if None in steppers.values():
        _train(material, schedule)
    else:
        for _ in schedule:
            raise AssertionError("a step is due, and there is no Trainer to make it")
    results = [
        Result(contender, tuple(schedule.step_ms[contender.name]), schedule.losses.get(contender.name))
        for contender in contenders
        if contender.name in steppers
    ]
    _check_losses(results, tolerance=SAME_LOSS[material.setting.precision])
    return results, missing


class _Schedule:
    """Runs all contenders, and yields whenever it is the Trainer's turn to make a step."""

    def __init__(
        self,
        steppers: dict[str, Step | None],
        *,
        rounds: int,
        steps: int,
        warmup: int,
        progress: Callable[[int, int], None],
    ) -> None:
        self.steppers = steppers
        self.rounds, self.steps, self.warmup = rounds, steps, warmup
        self.progress = progress
        self.step_ms: dict[str, list[float]] = {name: [] for name in steppers}
        self.losses: dict[str, float] = {}

    def __len__(self) -> int:
        return self.warmup + self.rounds * self.steps

    def __iter__(self) -> Iterator[None]:
        for name, stepper in self.steppers.items():
            for number in range(self.warmup):
                if stepper is None:
                    yield
                else:
                    loss = stepper()
                    if number == 0:
                        self.losses[name] = float(loss.detach())
        names = list(self.steppers)
        for done in range(self.rounds):
            for name in names if done % 2 == 0 else reversed(names):
                stepper = self.steppers[name]
                start = time.perf_counter()
                for _ in range(self.steps):
                    if stepper is None:
                        yield
                    else:
                        stepper()
                # the Trainer asks for its next batch only when the step before is wholly done, callbacks included
                self.step_ms[name].append((time.perf_counter() - start) / self.steps * 1e3)
            self.progress(done + 1, self.rounds)


class _Loader:
    """The Trainer's data loader: its batches cost nothing."""

    def __init__(self, schedule: _Schedule, batch: dict[str, Tensor]) -> None:
        self.schedule, self.batch = schedule, batch

    def __len__(self) -> int:
        return len(self.schedule) + 1

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for _ in self.schedule:
            yield self.batch
        yield self.batch  # the Trainer asks for nothing after its last batch, so the last slice needs one more to end


def _train(material: Material, schedule: _Schedule) -> None:
    """Let visionkd's own Trainer, with all its callbacks and its logger, go through the schedule."""
    config = material.config()
    with tempfile.TemporaryDirectory(prefix="bench_training_") as folder, _quiet_lightning():
        run = RunDirectory(Path(folder), writes=True)
        training = config.training
        checkpoints = Checkpoints(
            run, run.checkpoints, every_s=training.checkpoint_every_s, check_every=training.log_every
        )
        metrics = Metrics(
            run,
            RunListener(run, Listener()),
            stage="distill",
            file="metrics.csv",
            log_every=training.log_every,
            max_unreadable=config.data.max_unreadable,
            num_train=material.pair.batch_size * len(schedule),
            last_checkpoint=checkpoints.last_path,
        )
        trainer = _trainer(config, run, epochs=1, callbacks=[metrics, checkpoints], stage="distill")
        loader = _Loader(schedule, material.batch())
        trainer.fit(material.module(config, steps=len(loader)), loader)


def _check_losses(results: Sequence[Result], *, tolerance: float) -> None:
    """Refuse to compare unequal work."""
    distilling = (result for result in results if result.contender.distils)
    losses = {result.contender.name: result.loss for result in distilling if result.loss is not None}
    reference = losses.get(NAIVE)
    if reference is None:
        return
    for name, loss in losses.items():
        if abs(loss - reference) > tolerance * abs(reference):
            raise WorkError(f"'{name}' computes another loss than '{NAIVE}': {loss:.6g}, not {reference:.6g}.")
