"""From the candidates of a detector to its answer, in numpy: thresholds, and no two boxes on one object.

A model file gives every candidate that the network has, so that its outputs have no sizes that depend on the image;
what follows is done here, the same way for every file, and gives the boxes that torchvision's own detectors give.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np


@dataclass(frozen=True)
class BoxRule:
    """How candidates are chosen from.

    Attributes:
        score_threshold: Scores have to be above it.
        nms_threshold: Of two boxes of one class that overlap more (intersection over union), the lesser one goes.
        max_detections: Most boxes of an image.
        candidates: Most scores that are looked at for each ``per``; None looks at all.
        per: ``level`` of the pyramid, or ``class``.
        levels: Candidates of each level, in their order.
        min_side: Boxes with a shorter side, in pixels of the view, are no answer.
        own_boxes: Whether each class has a box of its own.
    """

    score_threshold: float = 0.05
    nms_threshold: float = 0.5
    max_detections: int = 100
    candidates: int | None = None
    per: Literal["level", "class"] = "level"
    levels: tuple[int, ...] = ()
    min_side: float = 0.0
    own_boxes: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def sides(self, columns: int) -> int:
        """Return how many of the columns of :func:`joined` are sides of boxes."""
        return columns // 5 * 4 if self.own_boxes else 4

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BoxRule:
        known = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        return cls(**{**known, "levels": tuple(known.get("levels", ()))})


@dataclass(frozen=True)
class FoundBoxes:
    """What is on one picture, the highest score first.

    Attributes:
        boxes: N x 4 of float32: left, top, right, bottom in pixels.
        scores: N of float32, from 0 to 1.
        labels: N of int64, class indices.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.scores)

    def above(self, score: float, most: int | None = None) -> FoundBoxes:
        """Return those with at least this score, ``most`` of them at most."""
        kept = np.flatnonzero(self.scores >= score)[:most]
        return FoundBoxes(self.boxes[kept], self.scores[kept], self.labels[kept])

    def on_picture(self, scale: float, size: tuple[int, int]) -> FoundBoxes:
        """Bring boxes back from a letterbox to the picture, and cut them at its edges; boxes beside it go.

        Args:
            scale: Pixels of the letterbox for one of the picture.
            size: Height and width of the picture.
        """
        edges = np.array([size[1], size[0], size[1], size[0]], np.float32)
        boxes = np.clip(self.boxes / np.float32(scale), 0.0, edges).astype(np.float32)
        inside = (boxes[:, 2:] > boxes[:, :2]).all(1)
        return FoundBoxes(boxes[inside], self.scores[inside], self.labels[inside])


def choose_boxes(
    boxes: np.ndarray, scores: np.ndarray, rule: BoxRule, columns: Sequence[int] | None = None
) -> FoundBoxes:
    """Return the boxes that are the answer about one view.

    Args:
        boxes: N x 4 in pixels of the view, or N x K x 4 where each class has a box of its own.
        scores: N x K, from 0 to 1.
        rule: How they are chosen.
        columns: Classes that compete, in the order of the labels that are answered; None takes all.
    """
    boxes, scores = np.asarray(boxes, np.float32), np.asarray(scores, np.float32)
    if boxes.shape[:1] != scores.shape[:1] or boxes.shape[-1] != 4 or scores.ndim != 2:
        raise ValueError(f"boxes N x 4 and scores N x K expected, got {boxes.shape} and {scores.shape}")
    if columns is not None:
        scores = scores[:, list(columns)]
        boxes = boxes[:, list(columns)] if boxes.ndim == 3 else boxes
    places, labels = _candidates(scores, rule)
    chosen = boxes[places, labels] if boxes.ndim == 3 else boxes[places]
    values = scores[places, labels]
    if rule.min_side > 0:
        large = ((chosen[:, 2:] - chosen[:, :2]) >= rule.min_side).all(1)
        chosen, values, labels = chosen[large], values[large], labels[large]
    kept = suppress(chosen, values, labels, threshold=rule.nms_threshold, most=rule.max_detections)
    return FoundBoxes(chosen[kept], values[kept], labels[kept].astype(np.int64))


def joined(boxes: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return candidates as one array, boxes first: ... x N x (4 + K), or (4 K + K) where each class has its own box.

    Args:
        boxes: ... x N x 4, or ... x N x K x 4.
        scores: ... x N x K.
    """
    return np.concatenate([boxes.reshape(*scores.shape[:-1], -1), scores], -1)


def parted(values: np.ndarray, rule: BoxRule) -> tuple[np.ndarray, np.ndarray]:
    """Return the boxes and scores that :func:`joined` was given."""
    sides = rule.sides(values.shape[-1])
    boxes, scores = values[..., :sides], values[..., sides:]
    return (boxes.reshape(*scores.shape, 4) if rule.own_boxes else boxes), scores


def suppress(
    boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, *, threshold: float, most: int | None = None
) -> np.ndarray:
    """Return the positions of boxes, the highest score first, that no higher one of their class covers.

    Args:
        boxes: N x 4.
        scores: N.
        labels: N.
        threshold: Intersection over union above which a box is covered.
        most: Most positions.
    """
    order = np.argsort(-scores, kind="stable")
    by_class = np.argsort(labels[order], kind="stable")  # class by class, and in a class by score
    rows = np.argsort(by_class)
    boxes, labels = boxes[order][by_class], labels[order][by_class]
    ends = np.searchsorted(labels, labels, side="right")  # where the class of each ends
    sides = np.maximum(boxes[:, 2:] - boxes[:, :2], 0.0)
    areas = sides[:, 0] * sides[:, 1]
    covered = np.zeros(len(boxes), bool)
    kept: list[int] = []
    for position, row in zip(order.tolist(), rows.tolist(), strict=True):
        if len(kept) == most:
            break
        if covered[row]:
            continue
        kept.append(position)
        rest = slice(row + 1, ends[row])
        corner = np.maximum(boxes[rest, :2], boxes[row, :2])
        shared = np.maximum(np.minimum(boxes[rest, 2:], boxes[row, 2:]) - corner, 0.0)
        overlap = shared[:, 0] * shared[:, 1]
        # not divided: two boxes without area overlap by nothing
        covered[rest] |= overlap > threshold * (areas[rest] + areas[row] - overlap)
    return np.asarray(kept, np.int64)


def _candidates(scores: np.ndarray, rule: BoxRule) -> tuple[np.ndarray, np.ndarray]:
    """Return rows and columns of the scores that are looked at."""
    high = scores > rule.score_threshold  # NaN is none
    if rule.candidates is None:
        rows, columns = np.nonzero(high)
        return rows, columns
    found: list[np.ndarray] = []
    for part in _parts(scores.shape, rule):
        flat = np.flatnonzero(high[part])
        if len(flat) > rule.candidates:
            order = np.argsort(-scores[part].reshape(-1)[flat], kind="stable")[: rule.candidates]
            flat = flat[order]
        rows, columns = np.unravel_index(flat, high[part].shape)
        found.append(np.stack([rows + part[0].start, columns + part[1].start]))
    rows, columns = np.concatenate(found, axis=1)
    return rows, columns


def _parts(shape: tuple[int, ...], rule: BoxRule) -> list[tuple[slice, slice]]:
    """Return what has its candidates each: levels as rows, or classes as columns."""
    count, classes = shape
    if rule.per == "class":
        return [(slice(0, count), slice(column, column + 1)) for column in range(classes)]
    levels = rule.levels or (count,)
    if sum(levels) != count:
        raise ValueError(f"levels of {sum(levels)} candidates in all for {count}")
    ends = np.cumsum(levels).tolist()
    return [(slice(end - size, end), slice(0, classes)) for size, end in zip(levels, ends, strict=True)]
