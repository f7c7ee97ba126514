"""The task of a run, from its data and its settings."""

from __future__ import annotations

from visionkd.config.schema import RunConfig
from visionkd.tasks.base import Task
from visionkd.tasks.classification import ClassificationTask
from visionkd.types import DataSet


def task_of(data: DataSet, config: RunConfig) -> Task:
    """Return the task that ``data`` sets."""
    return ClassificationTask(num_classes=len(data.classes), label_smoothing=config.training.label_smoothing)
