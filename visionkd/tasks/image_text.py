"""Training on images and their captions: classes are found by their names, if there are any."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from visionkd.types import Output, TaskName


class ImageText:
    """Stands for the task while images and texts are contrasted.

    Args:
        num_classes: Classes whose names are compared with the validation images; 0 where that is not possible.
    """

    name: TaskName = "classification"
    main_metric = "zero_shot_top1"

    def __init__(self, num_classes: int = 0) -> None:
        self.num_classes = num_classes

    def loss(self, output: Output, target: Any) -> Tensor:
        """There is none: the module computes its own loss."""
        raise NotImplementedError("images and texts are contrasted, not classified")

    def answer(self, network: Any, image: Tensor) -> Output:
        return network(image)

    def metrics(self) -> MetricCollection:
        if not self.num_classes:
            return MetricCollection({})
        return MetricCollection({"zero_shot_top1": MulticlassAccuracy(self.num_classes, average="micro")})

    def update(self, metrics: MetricCollection, output: Output, target: Any) -> None:
        if self.num_classes:
            metrics.update(output.logits, target)
