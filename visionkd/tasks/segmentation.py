"""Semantic segmentation: a class for every pixel."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassConfusionMatrix

from visionkd.types import IGNORE, Output, TaskName

#: Most values of upsampled logits at a time, so that large pictures need no more memory than small ones.
_MOST_VALUES = 1 << 27
#: Sides are padded to a multiple of this, so that no network has half a step left over.
_GRID = 32
_WINDOWS = 8
Evaluation = Literal["resize", "native", "slide"]


class _Confusion(MulticlassConfusionMatrix):
    """Counts of pixels, C x C, rows the targets.

    Pixels without a label go to a row that does not count: taking them out would copy all others in every update.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes + 1, validate_args=False)

    def counts(self) -> Tensor:
        """Return the counts of labelled pixels, C x C of int64."""
        return self.confmat[:-1, :-1]


class MeanIoU(_Confusion):
    """Mean over the classes that map or answer has of their intersection over union, as a share."""

    def compute(self) -> Tensor:
        counts = self.counts().double()
        own = counts.diagonal()
        union = counts.sum(0) + counts.sum(1) - own
        return (own / union).nanmean()


class PixelAccuracy(_Confusion):
    """Share of the labelled pixels that are right."""

    def compute(self) -> Tensor:
        counts = self.counts().double()
        return counts.trace() / counts.sum()


class SegmentationTask:
    """One class for each pixel; pixels of 255 count nowhere.

    Args:
        num_classes: Number of classes.
        aux_weight: Weight of the loss of each auxiliary head.
        label_smoothing: Share of each label that is spread over all classes in training.
        evaluation: How validation images are looked at: ``resize``, ``native`` or ``slide``; see :func:`segment`.
        slide_overlap: Least share of a window that the next one covers again.
    """

    name: TaskName = "segmentation"
    main_metric = "miou"

    def __init__(
        self,
        *,
        num_classes: int,
        aux_weight: float = 0.4,
        label_smoothing: float = 0.0,
        evaluation: Evaluation = "resize",
        slide_overlap: float = 0.33,
    ) -> None:
        self.num_classes = num_classes
        self.evaluation = evaluation
        self.slide_overlap = slide_overlap
        self.aux_weight = aux_weight
        self.label_smoothing = label_smoothing

    def loss(self, output: Output, target: Tensor | Sequence[Tensor]) -> Tensor:
        """Mean cross-entropy over the labelled pixels of the batch, plus ``aux_weight`` times that of each other head.

        Logits are resized to the maps, not the other way round: labels cannot be interpolated.

        Args:
            output: With ``logits``, B x C x h x w, and ``aux`` of the same kind.
            target: Class indices with 255 ignored, B x H x W, or one map for each image at its own size.
        """
        loss = self._cross_entropy(output.logits, target)
        for aux in output.aux:
            loss = loss + self.aux_weight * self._cross_entropy(aux, target)
        return loss

    def _cross_entropy(self, logits: Any, target: Tensor | Sequence[Tensor]) -> Tensor:
        total, count = logits.new_zeros((), dtype=torch.float32), 0
        for part, labels in _parts(logits, target):
            total = total + F.cross_entropy(
                part, labels.long(), ignore_index=IGNORE, label_smoothing=self.label_smoothing, reduction="sum"
            )
            count = count + (labels != IGNORE).sum()
        # A batch without any label has a loss of 0, where a mean would be 0 / 0.
        return total / torch.as_tensor(count, device=total.device).clamp(min=1)

    def answer(self, network: Any, image: Tensor) -> Output:
        """Run ``network`` on images of a validation loader, B x 3 x H x W in [0, 1], in the way of ``evaluation``."""
        if self.evaluation == "resize":
            return network(image)
        found = [segment(network, each, mode=self.evaluation, overlap=self.slide_overlap) for each in image]
        return Output(logits=torch.stack(found))

    def metrics(self) -> MetricCollection:
        found: Any = {"miou": MeanIoU(self.num_classes), "pixel_acc": PixelAccuracy(self.num_classes)}
        return MetricCollection(found, compute_groups=[["miou", "pixel_acc"]])

    def update(self, metrics: MetricCollection, output: Output, target: Tensor | Sequence[Tensor]) -> None:
        """Count the pixels of a batch at the size of their maps."""
        given, labels = [], []
        for logits, maps in _parts(output.logits, target):
            given.append(logits.max(1).indices.flatten())  # argmax takes eight times as long on a CPU
            labels.append(maps.flatten())
        if not given:
            return
        wanted = torch.cat(labels).long()
        wanted = torch.where(wanted == IGNORE, self.num_classes, wanted)
        metrics.update(torch.cat(given), wanted)


def _parts(logits: Any, target: Tensor | Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield upsampled logits, b x C x H x W, with their maps, b x H x W; maps of one size go together."""
    if isinstance(target, Tensor):
        sizes = [tuple(target.shape[1:])] * len(target)
    else:
        sizes = [tuple(each.shape) for each in target]
    start = 0
    while start < len(sizes):
        size = sizes[start]
        most = len(sizes) if isinstance(target, Tensor) else max(1, _MOST_VALUES // (logits.shape[1] * math.prod(size)))
        stop = start + 1
        while stop < len(sizes) and stop - start < most and sizes[stop] == size:
            stop += 1
        part = logits[start:stop]
        maps = target[start:stop]
        yield _upsampled(part, size), maps if isinstance(maps, Tensor) else torch.stack(list(maps))
        start = stop


def segment(
    network: Any, image: Tensor, *, mode: Evaluation = "resize", overlap: float = 0.33, batch_size: int = _WINDOWS
) -> Tensor:
    """Return what a network says about one picture, at the picture's own size.

    Args:
        network: Takes B x 3 x H x W in [0, 1] and answers with ``logits``; ``input`` has its size and statistics.
        image: 3 x H x W in [0, 1], or with further planes behind the colours.
        mode: ``resize`` brings the picture to the network's input size; ``native`` takes it as it is, with the mean
            colour around it up to a multiple of 32 pixels; ``slide`` moves a window of the input size over it, so that
            each one covers at least ``overlap`` of the one before, and averages the logits where windows overlap.
        overlap: Share of a window in [0, 1).
        batch_size: Windows at a time.

    Returns:
        Logits, C x H x W.
    """
    height, width = image.shape[1:]
    if mode == "resize":
        size = tuple(network.input.img_size)
        small = F.interpolate(image[None], size=size, mode="bilinear", align_corners=False, antialias=True)
        return _upsampled(network(small).logits, (height, width))[0]
    if mode == "native":
        padded = _padded(network, image, -height % _GRID, -width % _GRID)
        return _upsampled(network(padded[None]).logits, tuple(padded.shape[1:]))[0, :, :height, :width]
    rows, columns = network.input.img_size
    padded = _padded(network, image, max(0, rows - height), max(0, columns - width))
    tops, lefts = (
        _starts(whole, window, overlap) for whole, window in zip(padded.shape[1:], (rows, columns), strict=True)
    )
    places = [(top, left) for top in tops for left in lefts]
    total: Any = 0
    seen = image.new_zeros(padded.shape[1:])
    for first in range(0, len(places), batch_size):
        some = places[first : first + batch_size]
        windows = torch.stack([padded[:, top : top + rows, left : left + columns] for top, left in some])
        logits = _upsampled(network(windows).logits, (rows, columns))
        if not first:
            total = logits.new_zeros((logits.shape[1], *padded.shape[1:]))
        for (top, left), found in zip(some, logits, strict=True):
            total[:, top : top + rows, left : left + columns] += found
            seen[top : top + rows, left : left + columns] += 1
    return (total / seen)[:, :height, :width]


def _starts(whole: int, window: int, overlap: float) -> list[int]:
    """Where windows begin, evenly spread over a side from its first pixel to its last."""
    count = 1 + math.ceil((whole - window) / max(1.0, window * (1.0 - overlap)))
    return [round(number * (whole - window) / max(1, count - 1)) for number in range(count)]


def _padded(network: Any, image: Tensor, below: int, right: int) -> Tensor:
    """Put the mean colour below a picture and to its right; further planes get zeros."""
    if not below and not right:
        return image
    planes, height, width = image.shape
    fill = image.new_zeros(planes)
    fill[:3] = image.new_tensor(network.input.mean[:3])
    padded = fill[:, None, None].repeat(1, height + below, width + right)
    padded[:, :height, :width] = image
    return padded


def _upsampled(logits: Tensor, size: tuple[int, ...]) -> Tensor:
    if tuple(logits.shape[2:]) == size:
        return logits.float()
    return F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)
