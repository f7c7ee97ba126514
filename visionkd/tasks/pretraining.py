"""Training without a task: nothing is predicted that a label could be compared with."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torchmetrics import MetricCollection

from visionkd.types import Output, TaskName


class Pretraining:
    """Stands for the task while an encoder is trained on images alone."""

    name: TaskName = "classification"
    main_metric = "none"

    def loss(self, output: Output, target: Any) -> Tensor:
        """There is none: the module computes its own loss."""
        raise NotImplementedError("a masked objective has no loss against labels")

    def answer(self, network: Any, image: Tensor) -> Output:
        return network(image)

    def metrics(self) -> MetricCollection:
        return MetricCollection({})

    def update(self, metrics: MetricCollection, output: Output, target: Any) -> None:
        raise NotImplementedError("an encoder without a classifier predicts nothing")
