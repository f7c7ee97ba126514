"""Which of the boxes that were found are right, one image at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from visionkd.runtime.box_metrics import BoxSet

#: Intersection over union from which a box is right.
IOU = 0.5
_NEITHER, _WRONG = -2, -1


@dataclass(frozen=True)
class Matches:
    """What became of each box that was found.

    Attributes:
        taken: Position of the true box that it found; -1 where it is wrong, -2 where it lies in a crowd and counts
            neither way.
        scores: Its score.
        num_true: True boxes that are no crowd.
    """

    taken: np.ndarray
    scores: np.ndarray
    num_true: int

    def best_score(self) -> float:
        """Return the least score to look at that balances missed boxes and wrong ones best (highest F1)."""
        counted = self.taken != _NEITHER
        order = np.argsort(-self.scores[counted], kind="stable")
        right = np.cumsum((self.taken[counted] >= 0)[order])
        if not len(right) or not right[-1]:
            return 0.5
        f1 = 2.0 * right / (np.arange(1, len(right) + 1) + self.num_true)
        return float(self.scores[counted][order][int(np.argmax(f1))])


def match(found: BoxSet, truth: BoxSet) -> Matches:
    """Give each box that was found the best true box of its class that is left, the surest first, as COCO does.

    Args:
        found: Boxes with scores.
        truth: The true boxes of the same images in the same order.
    """
    taken = np.full(len(found.labels), _WRONG, np.int64)
    for image in range(len(truth)):
        own, known = found.of(image), truth.of(image)
        overlaps = _overlaps(found.boxes[own], truth.boxes[known], truth.crowd[known])
        overlaps[found.labels[own][:, None] != truth.labels[known][None]] = 0.0
        crowd, free = truth.crowd[known], ~truth.crowd[known]
        for row in np.argsort(-found.scores[own], kind="stable"):
            left = np.where(free, overlaps[row], 0.0)
            if left.size and left.max() >= IOU:
                best = int(left.argmax())
                free[best] = False
                taken[own.start + row] = known.start + best
            elif (overlaps[row][crowd] >= IOU).any():
                taken[own.start + row] = _NEITHER
    return Matches(taken, found.scores, int((~truth.crowd).sum()))


def _overlaps(boxes: np.ndarray, others: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """Intersection over union of N and M boxes, N x M; over the first box alone where the second is a crowd."""
    corner = np.maximum(boxes[:, None, :2], others[None, :, :2])
    sides = np.maximum(np.minimum(boxes[:, None, 2:], others[None, :, 2:]) - corner, 0.0)
    shared = sides.prod(2)
    areas, theirs = ((each[:, 2:] - each[:, :2]).prod(1) for each in (boxes, others))
    union = areas[:, None] + np.where(crowd, 0.0, theirs)[None] - np.where(crowd[None], 0.0, shared)
    return shared / np.maximum(union, 1e-9)
