"""What an exported file is held to besides its numbers: the accuracy of its task, on the same images.

numpy only: a device without torch compares its engine with the ONNX file by this.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

from visionkd.runtime.box_metrics import average_precision, box_set
from visionkd.runtime.boxes import BoxRule, FoundBoxes, choose_boxes, parted
from visionkd.runtime.metrics import pixel_confusion, resize_maps, segmentation_metrics, top_k_accuracy
from visionkd.types import IGNORE


class Tally(Protocol):
    """Collects answers in the order of the images."""

    def add(self, logits: np.ndarray) -> None:
        """Take what is said of the next images: logits N x C or N x C x h x w, or joined candidates."""

    def percent(self) -> float:
        """Return the accuracy of all that was taken."""


class Truth(Protocol):
    """Right answers about images, and the measure by which a task compares with them.

    Attributes:
        metric: Name of the measure, as it stands in files.
        title: The same, as it stands in sentences.
    """

    metric: ClassVar[str]
    title: ClassVar[str]

    def tally(self) -> Tally:
        """Begin to count."""


@dataclass(frozen=True)
class Labels:
    """The class of each image, N, as a column of the logits: top-1."""

    targets: np.ndarray
    metric: ClassVar[str] = "top1"
    title: ClassVar[str] = "top-1"

    def tally(self) -> Tally:
        return _Hits(np.asarray(self.targets))


@dataclass(frozen=True)
class Masks:
    """The class of each pixel, N maps H x W of any size, as a channel of the logits; 255 is not looked at: mIoU.

    Logits are brought to the size of a map by bilinear interpolation.
    """

    maps: Sequence[np.ndarray]
    num_classes: int
    metric: ClassVar[str] = "miou"
    title: ClassVar[str] = "mIoU"

    def tally(self) -> Tally:
        return _Overlaps(self.maps, self.num_classes)


@dataclass(frozen=True)
class Boxes:
    """The boxes of each image: COCO's AP.

    Attributes:
        targets: ``boxes``, ``labels`` and ``crowd`` of each image, in its own pixels.
        views: Pixels of the letterboxed view for one of the image, and height and width of the image.
        rule: How boxes are chosen among candidates.
        columns: Output of each class; None where they are the same.
        num_classes: Classes of the targets.
    """

    targets: Sequence[Mapping[str, np.ndarray]]
    views: Sequence[tuple[float, tuple[int, int]]]
    rule: BoxRule
    columns: Sequence[int] | None
    num_classes: int
    metric: ClassVar[str] = "ap"
    title: ClassVar[str] = "AP"

    def tally(self) -> Tally:
        return _Found(self)


def score(truth: Truth, batches: Iterable[np.ndarray]) -> float:
    """Return the accuracy in percent of logits that come in batches."""
    tally = truth.tally()
    for logits in batches:
        tally.add(logits)
    return tally.percent()


def truth_of(targets: Sequence[np.ndarray] | np.ndarray, *, columns: Sequence[int] | None, num_classes: int) -> Truth:
    """Return the right answers as a network counts them.

    Args:
        targets: Class indices, N, or N maps of them.
        columns: Output of each class; None where they are the same.
        num_classes: Outputs of the network.
    """
    if len(targets) and np.ndim(targets[0]) == 2:
        return Masks([_renamed(np.asarray(target), columns) for target in targets], num_classes)
    classes = np.asarray(targets)
    return Labels(classes if columns is None else np.asarray(columns)[classes])


def _renamed(target: np.ndarray, columns: Sequence[int] | None) -> np.ndarray:
    if columns is None:
        return target
    table = np.full(256, IGNORE, np.uint8)
    table[: len(columns)] = columns
    return table[target]


def boxes_truth(
    targets: Sequence[Mapping[str, Any]],
    views: Sequence[tuple[float, tuple[int, int]]],
    *,
    rule: BoxRule,
    columns: Sequence[int] | None,
    num_classes: int,
) -> Boxes | None:
    """Return the right answers about images with boxes; None where no image has any.

    Args:
        targets: ``boxes``, ``labels`` and ``crowd`` of each image.
        views: As in :class:`Boxes`.
        rule: How boxes are chosen among candidates.
        columns: Output of each class; None where they are the same.
        num_classes: Outputs of the network.
    """
    arrays = [{name: np.asarray(target[name]) for name in ("boxes", "labels", "crowd")} for target in targets]
    if not any((~target["crowd"].astype(bool)).any() for target in arrays):
        return None
    return Boxes(arrays, views, rule, columns, num_classes if columns is None else len(columns))


class _Hits:
    def __init__(self, targets: np.ndarray) -> None:
        self.targets, self.logits = targets, []

    def add(self, logits: np.ndarray) -> None:
        self.logits.append(logits)

    def percent(self) -> float:
        return top_k_accuracy(np.concatenate(self.logits), self.targets, 1)


class _Overlaps:
    def __init__(self, maps: Sequence[np.ndarray], num_classes: int) -> None:
        self.maps, self.done = maps, 0
        self.counts = np.zeros((num_classes, num_classes), np.int64)

    def add(self, logits: np.ndarray) -> None:
        for values in logits:
            target = np.asarray(self.maps[self.done])
            given = resize_maps(values, target.shape).argmax(0)
            self.counts += pixel_confusion(given, target, len(self.counts))
            self.done += 1

    def percent(self) -> float:
        if self.done != len(self.maps):
            raise ValueError(f"{self.done} answers for {len(self.maps)} maps")
        return segmentation_metrics(self.counts)["miou"]


class _Found:
    def __init__(self, truth: Boxes) -> None:
        self.truth = truth
        self.found: list[FoundBoxes] = []

    def add(self, logits: np.ndarray) -> None:
        for values in logits:
            boxes, scores = parted(values, self.truth.rule)
            found = choose_boxes(boxes, scores, self.truth.rule, self.truth.columns)
            self.found.append(found.on_picture(*self.truth.views[len(self.found)]))

    def percent(self) -> float:
        truth = self.truth
        if len(self.found) != len(truth.targets):
            raise ValueError(f"{len(self.found)} answers for {len(truth.targets)} images with boxes")
        given = box_set([{"boxes": each.boxes, "labels": each.labels, "scores": each.scores} for each in self.found])
        return average_precision(given, box_set(list(truth.targets)), num_classes=truth.num_classes).metrics()["ap"]
