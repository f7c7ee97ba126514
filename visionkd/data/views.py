"""The views of a task, at training and at evaluation."""

from __future__ import annotations

from typing import Any

from visionkd.config.schema import RunConfig
from visionkd.data.dense_transforms import DenseEvalTransform, DenseTrainTransform
from visionkd.data.detection_transforms import BoxEvalTransform, BoxTrainTransform
from visionkd.data.transforms import EvalTransform, TrainTransform
from visionkd.types import InputSpec, TaskName


def train_view(task: TaskName, config: RunConfig, *, img_size: tuple[int, int], spec: InputSpec) -> Any:
    """Return what draws the training views of a task.

    Args:
        task: What is trained.
        config: Settings of the run.
        img_size: Largest input of the networks that look at the views, height and width in pixels.
        spec: Input of the network that trains: how pictures are resized, and what surrounds those with boxes.
    """
    if task == "detection":
        return BoxTrainTransform(config.augment, config.detection, spec, img_size)
    if task == "segmentation":
        return DenseTrainTransform(config.augment, config.segmentation, img_size, spec.interpolation)
    return TrainTransform(config.augment, img_size=img_size, interpolation=spec.interpolation)


def eval_view(task: TaskName, spec: InputSpec, *, evaluation: str = "resize") -> Any:
    """Return what gives the one view of an image at evaluation.

    Args:
        task: What is evaluated.
        spec: The network's input.
        evaluation: As in :class:`visionkd.config.segmentation.SegmentationConfig`.
    """
    if task == "detection":
        return BoxEvalTransform(spec)
    return DenseEvalTransform(spec, evaluation) if task == "segmentation" else EvalTransform(spec)
