"""Costs and scores of candidates, in this process or in several, each candidate by itself.

Whatever goes wrong with a candidate is an answer, never an error: it cannot be built, it cannot be scored, or it takes
the whole process with it.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Literal

import numpy as np
import torch

from visionkd.benchmark.complexity import measure_complexity
from visionkd.config.schema import NetworkConfig
from visionkd.errors import VisionKDError
from visionkd.models.factory import create_network
from visionkd.models.network import Network
from visionkd.search import scores
from visionkd.search._passes import seeded
from visionkd.search.evolution import Answer

_DIED = "the process that examined it died; it may have needed more memory than there is"
_Kind = Literal["measure", "score"]


@dataclass(frozen=True)
class Job:
    """What every process needs to know.

    Attributes:
        score: Name of a score.
        teacher: Network to compare with; its weights are random.
        num_classes: Outputs of all networks.
        image: B x 3 x H x W, uint8.
        target: Class indices, B.
        seed: Of what is random in a score.
        teacher_seed: Of the teacher's weights.
        student_seed: Of the candidates' weights.
        init: How weights are drawn, one of :data:`visionkd.search.scores.INITS`.
        params_limit_m: MACs are not counted beyond this many million parameters.
    """

    score: str
    teacher: NetworkConfig
    num_classes: int
    image: np.ndarray
    target: np.ndarray
    seed: int
    teacher_seed: int
    student_seed: int
    init: str = "default"
    params_limit_m: float | None = None


class Examiner:
    """Examines candidates in this process; the teacher is built and run once.

    Raises:
        VisionKDError: If the teacher cannot be had or scored.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        teacher = build_untrained(job.teacher, job.teacher_seed) if scores.needs_teacher(job.score) else None
        self._scorer = scores.make_scorer(
            job.score,
            teacher=teacher,
            image=torch.from_numpy(job.image),
            target=torch.from_numpy(job.target),
            num_classes=job.num_classes,
            seed=job.seed,
            init=job.init,
        )

    def build(self, config: NetworkConfig) -> Network:
        """Return a candidate with random weights; nothing is fetched."""
        return build_untrained(config, self.job.student_seed, num_classes=self.job.num_classes)

    def measure(self, config: NetworkConfig) -> Answer:
        """Count parameters and multiply-accumulates."""
        return _told(lambda: self._costs(config))

    def score(self, config: NetworkConfig) -> Answer:
        """Score a candidate."""

        def work() -> Answer:
            result = self._scorer(self.build(config))
            return Answer(dict(result.parts), float(result.value))

        return _told(work)

    def _costs(self, config: NetworkConfig) -> Answer:
        limit = self.job.params_limit_m
        try:
            with torch.device("meta"):  # shapes alone: a network far too large costs nothing
                network = self.build(config)
        except (NotImplementedError, RuntimeError):
            network = self.build(config)
        params_m = sum(parameter.numel() for parameter in network.net.parameters()) / 1e6
        if limit is not None and params_m > limit:
            return Answer({"params_m": params_m})
        return Answer({"params_m": params_m, "macs_g": measure_complexity(network).macs_g})


class Examiners:
    """Examines lists of candidates, with ``workers`` processes where there are more than one."""

    def __init__(self, job: Job, *, workers: int = 1) -> None:
        self.job = job
        self.first = Examiner(job)  # a request that is wrong fails here, in words
        self._workers = workers
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Examiners:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def measure(self, configs: Sequence[NetworkConfig]) -> list[Answer]:
        return self._all("measure", configs)

    def score(self, configs: Sequence[NetworkConfig]) -> list[Answer]:
        return self._all("score", configs)

    def _all(self, kind: _Kind, configs: Sequence[NetworkConfig]) -> list[Answer]:
        if self._workers == 1:
            return [getattr(self.first, kind)(config) for config in configs]
        if self._pool is None:
            self._pool = self._new_pool(self._workers)
        tasks = [(kind, config.model_dump()) for config in configs]
        answers: list[Answer | None] = [None] * len(tasks)
        try:
            futures = [self._pool.submit(_examine, *task) for task in tasks]
            for number, future in enumerate(futures):
                answers[number] = future.result()
        except BrokenProcessPool:
            self._pool.shutdown(wait=False)
            self._pool = None
        # One of them killed its process, and all that waited with it: each of the rest gets a process of its own.
        return [answer or self._alone(task) for answer, task in zip(answers, tasks, strict=True)]

    def _alone(self, task: tuple[_Kind, dict[str, Any]]) -> Answer:
        with self._new_pool(1) as pool:
            try:
                return pool.submit(_examine, *task).result()
            except BrokenProcessPool:
                return Answer(reason=_DIED)

    def _new_pool(self, workers: int) -> ProcessPoolExecutor:
        # 'spawn': a fork of a process in which torch has started threads may hang
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(self.job,))


_EXAMINER: Examiner | None = None


def _start(job: Job) -> None:
    global _EXAMINER
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes, and the first one ends the others
    torch.set_num_threads(1)
    _EXAMINER = Examiner(job)


def _examine(kind: _Kind, config: dict[str, Any]) -> Answer:
    assert _EXAMINER is not None
    return getattr(_EXAMINER, kind)(NetworkConfig(**config))


def _told(work: Any) -> Answer:
    try:
        return work()
    except VisionKDError as error:
        return Answer(reason=error.message.splitlines()[0])
    except Exception as error:  # a constructor may object in any way
        said = str(error).strip().splitlines()
        return Answer(reason=f"{type(error).__name__}: {said[0]}" if said else type(error).__name__)


def build_untrained(config: NetworkConfig, seed: int, *, num_classes: int | None = None) -> Network:
    """Build a network whose random weights follow from ``seed`` alone; published ones are not fetched."""
    untrained = config.model_copy(update={"pretrained": False})
    with seeded(seed):
        return create_network(untrained, num_classes=num_classes, in_training=True)


def with_cost(answer: Answer, name: str, value: float) -> Answer:
    """Return an answer with one more cost."""
    return replace(answer, values={**answer.values, name: value})
