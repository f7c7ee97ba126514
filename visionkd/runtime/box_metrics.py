"""Average precision of boxes as COCO measures it, in numpy and faster-coco-eval, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from visionkd.errors import WorkError

#: Most boxes of an image that count, as in COCO.
MOST_BOXES = 100
#: Intersection over union from which a box is right, one after the other.
IOUS = np.linspace(0.5, 0.95, 10)
_AREA = (0.0, 1e10)


@dataclass(frozen=True)
class BoxSet:
    """Boxes of several images, one image after the other.

    Attributes:
        counts: Boxes of each image, N of int64.
        boxes: M x 4 of float32: left, top, right, bottom in pixels.
        labels: Class indices, M of int64.
        scores: From 0 to 1, M of float32; zeros of what is true.
        crowd: M of bool: whether a box stands for many objects. What is found there counts neither way.
    """

    counts: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    crowd: np.ndarray

    def __post_init__(self) -> None:
        object.__setattr__(self, "ends", np.concatenate([[0], np.cumsum(self.counts, dtype=np.int64)]))

    def __len__(self) -> int:
        return len(self.counts)

    def of(self, index: int) -> slice:
        """Return the place of the boxes of an image."""
        ends: Any = self.ends  # type: ignore[attr-defined]
        return slice(int(ends[index]), int(ends[index + 1]))

    def images(self) -> np.ndarray:
        """Return the image that each box belongs to, M of int64."""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    def taken(self, images: Sequence[int] | np.ndarray) -> BoxSet:
        """Return the boxes of some images, in their order."""
        places = [self.of(int(index)) for index in images]
        rows = np.concatenate([np.arange(each.start, each.stop) for each in places] or [np.zeros(0, np.int64)])
        rows = rows.astype(np.int64)
        counts = np.array([each.stop - each.start for each in places], np.int64)
        return BoxSet(counts, self.boxes[rows], self.labels[rows], self.scores[rows], self.crowd[rows])


def box_set(parts: Sequence[dict[str, np.ndarray]]) -> BoxSet:
    """Join boxes, image by image: ``boxes``, ``labels``, and ``scores`` or ``crowd`` where there are any."""

    def joined(name: str, kind: Any, *width: int) -> np.ndarray:
        empty = np.zeros((0, *width), kind)
        found = [
            np.asarray(part[name], kind).reshape(-1, *width) if name in part else np.zeros(len(part["labels"]), kind)
            for part in parts
        ]
        return np.concatenate([empty, *found])

    counts = np.array([len(part["labels"]) for part in parts], np.int64)
    return BoxSet(
        counts,
        joined("boxes", np.float32, 4),
        joined("labels", np.int64),
        joined("scores", np.float32),
        joined("crowd", bool),
    )


@dataclass(frozen=True)
class BoxPrecision:
    """Precision at each recall, from which all measures follow.

    Attributes:
        precision: T x R x K shares for the T values of :data:`IOUS`, recalls from 0 to 1 in R steps, and K classes; NaN
            for a class of which there is nothing to find.
    """

    precision: np.ndarray

    def per_class(self, iou: float | None = None) -> np.ndarray:
        """Return the average precision of each class in percent, at one of :data:`IOUS` or over all of them; K."""
        chosen = self.precision if iou is None else self.precision[np.isclose(IOUS, iou)]
        return 100.0 * chosen.mean(axis=(0, 1))

    def metrics(self, novel: Sequence[int] = ()) -> dict[str, float]:
        """Return ``ap``, ``ap50`` and ``ap75`` in percent, means over the classes that occur.

        Args:
            novel: Classes without training boxes; with any, ``ap50_base`` and ``ap50_novel`` tell both kinds apart.
        """
        at_50 = self.per_class(0.5)
        found = {"ap": _mean(self.per_class()), "ap50": _mean(at_50), "ap75": _mean(self.per_class(0.75))}
        if novel:
            is_novel = np.isin(np.arange(len(at_50)), list(novel))
            found |= {"ap50_base": _mean(at_50[~is_novel]), "ap50_novel": _mean(at_50[is_novel])}
        return found


def average_precision(found: BoxSet, truth: BoxSet, *, num_classes: int) -> BoxPrecision:
    """Compare what was found with what is true, as COCO does.

    "Microsoft COCO: Common Objects in Context" (Lin et al., ECCV 2014) and its evaluation code: each box found takes
    the best true box of its class that is left, the surest first; precision is made monotone and read at 101 recalls.

    Args:
        found: Boxes with scores; the :data:`MOST_BOXES` best of each image and class count.
        truth: Boxes with ``crowd``, of the same images in the same order.
        num_classes: Number of classes.

    Raises:
        ValueError: If there are not as many images in both.
        WorkError: If faster-coco-eval is not installed.
    """
    if len(found) != len(truth):
        raise ValueError(f"{len(found)} images were looked at, and {len(truth)} have boxes")
    recalls = 101
    if not len(truth.labels):
        return BoxPrecision(np.full((len(IOUS), recalls, num_classes), np.nan))
    if not len(found.labels):
        occurs = np.bincount(truth.labels[~truth.crowd], minlength=num_classes)[:num_classes] > 0
        empty = np.where(occurs, 0.0, np.nan)
        return BoxPrecision(np.broadcast_to(empty, (len(IOUS), recalls, num_classes)).copy())
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ImportError as error:
        raise WorkError(
            "average precision is measured by faster-coco-eval, which is not installed",
            hint="pip install faster-coco-eval (it needs numpy alone)",
        ) from error
    images = [{"id": number, "height": 1, "width": 1} for number in range(len(truth))]
    # ids from 1: COCO's code takes 0 for "nothing matched"
    categories = [{"id": number + 1, "name": str(number)} for number in range(num_classes)]
    known = COCO({"images": images, "categories": categories, "annotations": _rows(truth, iscrowd=truth.crowd)})
    given = COCO({"images": images, "categories": categories, "annotations": _rows(found, score=found.scores)})
    evaluation = COCOeval_faster(known, given, iouType="bbox", print_function=lambda *_: None)
    parameters = evaluation.params
    parameters.iouThrs, parameters.maxDets = IOUS, [MOST_BOXES]
    parameters.areaRng, parameters.areaRngLbl = [list(_AREA)], ["all"]
    evaluation.evaluate()
    evaluation.accumulate()
    precision = np.asarray(evaluation.eval["precision"], np.float64)[:, :, :, 0, 0]
    return BoxPrecision(np.where(precision < 0, np.nan, precision))


def _rows(boxes: BoxSet, **more: np.ndarray) -> list[dict[str, Any]]:
    """Return boxes as COCO's annotations."""
    left, top, right, bottom = boxes.boxes.astype(np.float64).T
    sides = np.stack([left, top, right - left, bottom - top], axis=1)
    names = list(more)
    rest = zip(*(more[name].tolist() for name in names), strict=True)
    rows = zip(boxes.images().tolist(), boxes.labels.tolist(), sides.tolist(), rest, strict=True)
    return [
        {
            "id": number + 1,
            "image_id": image,
            "category_id": label + 1,
            "bbox": box,
            "area": box[2] * box[3],
            "iscrowd": 0,
            **dict(zip(names, values, strict=True)),
        }
        for number, (image, label, box, values) in enumerate(rows)
    ]


def _mean(values: np.ndarray) -> float:
    """Mean over the classes that occur; NaN where none does."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")
