"""Image classification."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from visionkd.types import Output, TaskName


class ClassificationTask:
    """One label per image.

    Args:
        num_classes: Number of classes.
        label_smoothing: Share of each label that is spread over all classes in training.
    """

    name: TaskName = "classification"
    main_metric = "top1"

    def __init__(self, *, num_classes: int, label_smoothing: float = 0.0) -> None:
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing

    def loss(self, output: Output, target: Tensor) -> Tensor:
        """Cross-entropy.

        Args:
            output: With ``logits``, B x C.
            target: Class indices, B, or probabilities, B x C.
        """
        return F.cross_entropy(output.logits.float(), target, label_smoothing=self.label_smoothing)

    def answer(self, network: Any, image: Tensor) -> Output:
        return network(image)

    def metrics(self) -> MetricCollection:
        found = {"top1": MulticlassAccuracy(self.num_classes, average="micro", top_k=1, validate_args=False)}
        if self.num_classes > 5:
            found["top5"] = MulticlassAccuracy(self.num_classes, average="micro", top_k=5, validate_args=False)
        return MetricCollection(found)

    def update(self, metrics: MetricCollection, output: Output, target: Tensor) -> None:
        metrics.update(output.logits, target)
