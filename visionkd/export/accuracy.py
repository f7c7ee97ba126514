"""What an exported file is held to besides its numbers: the accuracy of its task, on the same images.

numpy only: a device without torch compares its engine with the ONNX file by this.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from visionkd.runtime.metrics import pixel_confusion, resize_maps, segmentation_metrics, top_k_accuracy
from visionkd.types import IGNORE


class Tally(Protocol):
    """Collects answers in the order of the images."""

    def add(self, logits: np.ndarray) -> None:
        """Take the logits of the next images: N x C, or N x C x h x w."""

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
