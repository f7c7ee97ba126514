"""What a task gives to training: its loss and its metrics."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor
from torchmetrics import MetricCollection

from visionkd.types import Output, TaskName


class Task(Protocol):
    """A task, as seen by the training modules.

    Attributes:
        name: ``classification``, ``segmentation`` or ``detection``.
        main_metric: Name of the metric that picks the best epoch; higher is better.
    """

    name: TaskName
    main_metric: str

    def loss(self, output: Output, target: Any) -> Tensor:
        """Supervised loss, a scalar; of a detector in train mode alone."""

    def answer(self, network: Any, image: Tensor) -> Output:
        """Run ``network`` on images of a validation loader, B x 3 x H x W in [0, 1]."""

    def metrics(self) -> MetricCollection:
        """Fresh metrics in percent, by name without prefix."""

    def update(self, metrics: MetricCollection, output: Output, target: Any) -> None:
        """Add a batch of a validation loader to metrics that :meth:`metrics` gave."""
