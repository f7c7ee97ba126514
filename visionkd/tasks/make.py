"""The task of a run, from its data and its settings."""

from __future__ import annotations

from visionkd.config.schema import RunConfig
from visionkd.errors import Problem, RequestError
from visionkd.tasks.base import Task
from visionkd.tasks.classification import ClassificationTask
from visionkd.tasks.detection import DetectionTask
from visionkd.tasks.segmentation import SegmentationTask
from visionkd.types import DataSet

#: Settings of ``augment`` that belong to whole images, each with the value that leaves it out.
_WHOLE_IMAGES = {"randaugment_ops": 0, "random_erasing": 0.0, "mixup_alpha": 0.0, "cutmix_alpha": 0.0, "learned": None}


def task_of(data: DataSet, config: RunConfig) -> Task:
    """Return the task that ``data`` sets.

    Raises:
        RequestError: If settings of another task are on.
    """
    smoothing = config.training.label_smoothing
    if data.task == "classification":
        return ClassificationTask(num_classes=len(data.classes), label_smoothing=smoothing)
    labels = {"segmentation": "maps", "detection": "boxes"}[data.task]
    problems = [
        Problem(f"augment.{name}", f"{value} would not do to {labels} what it does to images", f"Leave it at {off}.")
        for name, off in _WHOLE_IMAGES.items()
        if (value := getattr(config.augment, name)) != off
    ]
    if data.task == "detection" and smoothing:
        hint = "Leave training.label_smoothing at 0."
        problems.append(Problem("training.label_smoothing", f"{smoothing:g} is none of a detector's settings", hint))
    if problems:
        raise RequestError(problems)
    if data.task == "detection":
        return DetectionTask(num_classes=len(data.classes), novel=[data.classes.index(name) for name in data.novel])
    settings = config.segmentation
    return SegmentationTask(
        num_classes=len(data.classes),
        aux_weight=settings.aux_weight,
        label_smoothing=smoothing,
        evaluation=settings.evaluation,
        slide_overlap=settings.slide_overlap,
    )
