"""What the workflows do differently for each task, behind one name: a module of this folder for each of them.

``work_of("segmentation")`` is :mod:`visionkd.workflows._segmentation`. A module has what :class:`Work` lists; it is
imported without torch, which only what takes a network needs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

from visionkd.errors import Problem, RequestError
from visionkd.types import Listener, Source, TaskName

if TYPE_CHECKING:
    from visionkd.config.schema import RunConfig
    from visionkd.models.network import Network
    from visionkd.runtime.session import Session

TASKS: tuple[TaskName, ...] = ("classification", "segmentation", "detection")


class Answers(Protocol):
    """What one model said about a split.

    Attributes:
        indices: Position of each sample in its source, N; unreadable images are missing.
        skipped: Names of the images that could not be read.
    """

    indices: np.ndarray
    skipped: tuple[str, ...]

    def metrics(self) -> dict[str, float]:
        """Return the measures of the task, by name."""

    def per_class(self) -> np.ndarray:
        """Return the main measure of each class in percent; NaN for a class that does not occur."""


class Evaluations(Protocol):
    """Answers of several networks about the same samples, by role: ``student``, ``teacher0``, ``baseline``.

    Attributes:
        indices: Position of each sample in the validation split, N.
        names: Sample names, N.
    """

    indices: np.ndarray
    names: tuple[str, ...]

    def metrics(self, role: str) -> dict[str, float]:
        """Return the measures of one network."""

    def joined(self, teachers: Sequence[str], positions: np.ndarray | None) -> Evaluations:
        """Return the same with one role ``teacher`` for several, and as positions of the whole split."""

    def save(self, path: Path) -> None:
        """Write ``evaluation.npz``, atomically."""


class Work(Protocol):
    """A task, as seen by the workflows."""

    #: Name of the measure that counts, the same as it stands in sentences, and its name for a single class.
    MAIN: str
    TITLE: str
    PER_CLASS: str
    #: Images of a training step where nothing is said; None takes the configuration's own default.
    BATCH_SIZE: int | None
    #: Measures that a package states, and those that stand in a comparison.
    PACKAGED: tuple[str, ...]
    COMPARED: tuple[str, ...]

    def some(self, source: Source, count: int, *, seed: int) -> np.ndarray:
        """Return the positions of ``count`` samples of a source that speak for all of it."""

    def answer(
        self,
        network: Network,
        source: Source,
        *,
        config: RunConfig,
        device: Any,
        batch_size: int,
        workers: int,
        listener: Listener,
        columns: Sequence[int] | None = None,
    ) -> Answers:
        """Run a network over all of a source; ``columns`` are its outputs in the order of the data's classes."""

    def answer_file(
        self,
        session: Session,
        source: Source,
        *,
        config: RunConfig,
        batch_size: int,
        listener: Listener,
        columns: Sequence[int] | None = None,
    ) -> Answers:
        """Run a model file over all of a source, without torch."""

    def together(
        self,
        networks: Sequence[tuple[str, Network]],
        source: Source,
        *,
        run_one: Callable[[str, Network], Any],
        config: RunConfig,
        device: Any,
    ) -> Evaluations:
        """Run several networks over one split and keep the samples that all of them could read."""

    def load(self, path: Path) -> Evaluations:
        """Read what :meth:`Evaluations.save` wrote."""

    def report_parts(self, evaluations: Any, *, baseline: Any, classes: Sequence[str]) -> Mapping[str, Any]:
        """Return what a report shows of the answers, as fields of ``ReportData``."""


def work_of(task: TaskName) -> Work:
    """Return what the workflows need for a task.

    Raises:
        RequestError: If this version has no workflows for it.
    """
    if task not in TASKS:
        raise RequestError(Problem("--task", f"'{task}' is unknown", f"Use {' or '.join(TASKS)}"))
    return cast(Work, importlib.import_module(f"visionkd.workflows._{task}"))


def check_task(model: str, model_task: TaskName, data_task: TaskName, *, key: str) -> None:
    """Refuse a network that answers something else than the data asks.

    Args:
        model: What was asked for.
        model_task: Task of the network.
        data_task: Task of the data.
        key: Option behind the network, such as ``--model``.

    Raises:
        RequestError: If the two differ.
    """
    if model_task == data_task:
        return
    said = {
        "classification": "names one class for an image",
        "segmentation": "names the class of every pixel",
        "detection": "finds boxes",
    }
    asked = {
        "classification": "one class for an image",
        "segmentation": "a class for every pixel",
        "detection": "boxes",
    }
    hint = {
        "segmentation": "Take a segmentation network, HEAD_BACKBONE: for example deeplabv3plus_mobilenetv3_large_100,"
        " fpn_resnet18, or torchvision's deeplabv3_mobilenet_v3_large.",
        "detection": "Take a detector, DETECTOR_BACKBONE: for example fcos_mobilenetv3_large_100, fasterrcnn_resnet18,"
        " or torchvision's ssdlite320_mobilenet_v3_large.",
        "classification": "Take a network that labels images, for example resnet50, or give other data with --data.",
    }
    problem = f"'{model}' {said[model_task]}, and the data has {asked[data_task]}"
    raise RequestError(Problem(key, problem), hint=hint.get(data_task))
