"""Object detection: boxes with a class and a score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.utilities import dim_zero_cat

from visionkd.runtime.box_metrics import BoxSet, average_precision
from visionkd.types import Detections, Output, TaskName

#: Columns of the states below: left, top, right, bottom, class, and score or crowd.
_COLUMNS = 6


class BoxPrecisions(Metric):
    """COCO's average precisions as shares, of images that any number of processes looked at.

    Boxes are kept as they come and compared at the end, by :func:`visionkd.runtime.box_metrics.average_precision`, as
    those of model files are.

    Args:
        num_classes: Number of classes.
        novel: Indices of classes to measure apart.
    """

    full_state_update = False
    found: list[Tensor]
    true: list[Tensor]
    counts: list[Tensor]

    def __init__(self, num_classes: int, novel: Sequence[int] = ()) -> None:
        super().__init__()
        self.num_classes, self.novel = num_classes, tuple(novel)
        for name in ("found", "true", "counts"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, found: Sequence[Detections], target: Sequence[Mapping[str, Tensor]]) -> None:
        """Take what was found in a batch of images, and what is true, both in pixels of the pictures."""
        for given, wanted in zip(found, target, strict=True):
            self.found.append(_rows(given.boxes, given.labels, given.scores))
            self.true.append(_rows(wanted["boxes"], wanted["labels"], wanted["crowd"]))
            self.counts.append(torch.tensor([[len(given.labels), len(wanted["labels"])]], device=self.device))

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:
        # a process whose share of the images is empty would not take part, and the others would wait for it
        for state in (self.found, self.true, self.counts):
            if not state:
                state.append(torch.zeros(0, 2 if state is self.counts else _COLUMNS, device=self.device))
        self.counts[:] = [each.long() for each in self.counts]
        super()._sync_dist(*args, **kwargs)

    def compute(self) -> dict[str, Tensor]:
        none = torch.zeros(0, _COLUMNS, device=self.device)
        found, true = (dim_zero_cat([none, *_listed(each)]).cpu().numpy() for each in (self.found, self.true))
        counts = dim_zero_cat([none[:, :2].long(), *_listed(self.counts)]).cpu().numpy()
        given = BoxSet(counts[:, 0], found[:, :4], found[:, 4].astype("int64"), found[:, 5], found[:, 5] < 0)
        wanted = BoxSet(counts[:, 1], true[:, :4], true[:, 4].astype("int64"), 0 * true[:, 5], true[:, 5] > 0)
        measured = average_precision(given, wanted, num_classes=self.num_classes).metrics(self.novel)
        return {name: torch.tensor(value / 100.0) for name, value in measured.items()}


def _listed(state: Tensor | list[Tensor]) -> list[Tensor]:
    """A state as parts, whether it was gathered or not."""
    return [state] if isinstance(state, Tensor) else state


def _rows(boxes: Tensor, labels: Tensor, last: Tensor) -> Tensor:
    return torch.cat([boxes.reshape(-1, 4).float(), labels[:, None].float(), last[:, None].float()], dim=1)


class DetectionTask:
    """Boxes of some classes.

    Args:
        num_classes: Number of classes.
        novel: Indices of classes that have no boxes in training.
    """

    name: TaskName = "detection"
    main_metric = "ap"

    def __init__(self, *, num_classes: int, novel: Sequence[int] = ()) -> None:
        self.num_classes, self.novel = num_classes, tuple(novel)

    def loss(self, output: Output, target: Any) -> Tensor:
        """Return the sum of the detector's own losses, which it computed from the target in train mode.

        Args:
            output: With ``losses``.
            target: Not looked at.

        Raises:
            ValueError: If there are none, as in eval mode.
        """
        if not output.losses:
            raise ValueError("a detector gives no losses in eval mode")
        return torch.stack([value.float() for value in output.losses.values()]).sum()

    def answer(self, network: Any, image: Tensor) -> Output:
        return network(image)

    def metrics(self) -> MetricCollection:
        return MetricCollection({"boxes": BoxPrecisions(self.num_classes, self.novel)})

    def update(self, metrics: MetricCollection, output: Output, target: Sequence[Mapping[str, Tensor]]) -> None:
        """Take a batch, whose boxes were found in letterboxed images; ``target`` says how to bring them back."""
        found = [in_picture(each, wanted) for each, wanted in zip(output.boxes, target, strict=True)]
        metrics.update(found, target)


def in_picture(found: Detections, target: Mapping[str, Tensor]) -> Detections:
    """Bring boxes from pixels of a letterboxed view back to those of its picture, cut at its edge; others go.

    It is :meth:`visionkd.runtime.boxes.FoundBoxes.on_picture` in torch.

    Args:
        found: What was found in the view.
        target: With ``scale`` and ``size``, as :class:`visionkd.data.detection_transforms.BoxEvalTransform` gives them.
    """
    edges = target["size"].flip(0).repeat(2).to(found.boxes)
    boxes = torch.minimum((found.boxes / target["scale"].to(found.boxes)).clamp(min=0), edges)
    inside = (boxes[:, 2:] > boxes[:, :2]).all(1)
    return Detections(boxes[inside], found.scores[inside], found.labels[inside])
