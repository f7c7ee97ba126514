"""How far two sets of answers are apart, in numpy: logits, or the candidates of a detector.

Candidates of an image are one array, N x (4 + K): a box, in pixels of the input, and its scores. Where each class has a
box of its own, it is N x (4 K + K).
"""

from __future__ import annotations

import numpy as np

from visionkd.runtime.boxes import BoxRule

#: Columns of a box.
SIDES = 4
#: Of the proposals of an image, as many may be others, or be seen in another map, for a difference in the last bit.
_OTHERS = 0.02


def rms_difference(values: np.ndarray, reference: np.ndarray) -> float:
    """Return the root mean square of the differences as a share of that of ``reference``."""
    scale = float(np.sqrt(np.mean(np.square(reference, dtype=np.float64))))
    return float(np.sqrt(np.mean(np.square(np.subtract(values, reference, dtype=np.float64))))) / (scale or 1.0)


class Differences:
    """How two sets of answers differ, in batches: maps of many images would not fit into memory together.

    Args:
        rule: How a detector's boxes are chosen; None for logits.

    Attributes:
        largest: Largest difference of a logit, or of a score.
    """

    def __init__(self, rule: BoxRule | None = None) -> None:
        self.rule = rule
        self.parts = [_Part()] if rule is None else [_Part(), _Part()]
        self.same = self.count = 0

    def add(self, given: np.ndarray, expected: np.ndarray, *, averaged: bool) -> None:
        """Take a batch; ``averaged`` ones count for :attr:`rms` and :attr:`agreement`."""
        sides = 0 if self.rule is None else self.rule.sides(given.shape[-1])
        cuts = [slice(None)] if self.rule is None else [slice(sides, None), slice(0, sides)]
        for part, cut in zip(self.parts, cuts, strict=True):
            part.add(given[..., cut], expected[..., cut], averaged=averaged)
        if not averaged:
            return
        if self.rule is None:
            equal = given.argmax(1) == expected.argmax(1)
        else:  # of the candidates that count, the class with the highest score
            votes = expected[..., sides:]
            counts = votes.max(-1) > self.rule.score_threshold
            equal = (given[..., sides:].argmax(-1) == votes.argmax(-1))[counts]
        self.same, self.count = self.same + int(equal.sum()), self.count + equal.size

    @property
    def largest(self) -> float:
        return self.parts[0].largest

    @property
    def relative(self) -> float:
        """The largest difference as a share of the largest value; the larger one of scores and boxes."""
        return max(part.largest / (part.scale if part.scale > 0 else 1.0) for part in self.parts)

    @property
    def rms(self) -> float:
        """Root mean square of the differences as a share of that of the values; the larger one, too."""
        return max(part.rms for part in self.parts)

    @property
    def agreement(self) -> float:
        """Percent of images, pixels or candidates with the same class; 100 where there was nothing to compare."""
        return 100.0 * self.same / self.count if self.count else 100.0


def paired(given: np.ndarray, expected: np.ndarray, rule: BoxRule) -> tuple[np.ndarray, np.ndarray]:
    """Bring what two computations say of proposals into one order.

    Of two anchors that are almost equally sure, a rounding decides which comes first, or is proposed at all; so it does
    where boxes overlap just as much as is allowed, and where the size of a box is the limit between two maps. Hence
    every proposal is put beside the nearest one of the other side, seen from both, and the few that fit worst are left
    out: of each image and each side one, or one in fifty.

    Args:
        given: B x N x columns.
        expected: The same.
        rule: How boxes are chosen.

    Returns:
        One row for each pair, of both; or what was given, where nothing can be near it.
    """
    if not np.isfinite(given).all():
        return given, expected
    sides = rule.sides(given.shape[-1])
    unit = np.ones(given.shape[-1])
    unit[:sides] = max(float(expected[..., :sides].max()), 1.0)
    pairs = [_pairs(mine, theirs, unit, sides) for mine, theirs in zip(given, expected, strict=True)]
    return np.concatenate([mine for mine, _ in pairs]), np.concatenate([theirs for _, theirs in pairs])


def _pairs(given: np.ndarray, expected: np.ndarray, unit: np.ndarray, sides: int) -> tuple[np.ndarray, np.ndarray]:
    left, right = given / unit, expected / unit
    apart = np.square(left).sum(1)[:, None] + np.square(right).sum(1) - 2.0 * left @ right.T
    left_out = max(1, int(_OTHERS * (expected[:, sides:].max(1) > 0).sum()))
    mine, theirs = [], []
    for rows, columns in ((np.arange(len(given)), apart.argmin(1)), (apart.argmin(0), np.arange(len(expected)))):
        worst = np.abs(left[rows] - right[columns]).max(1)
        kept = np.argsort(worst, kind="stable")[: len(worst) - left_out]
        mine.append(given[rows[kept]])
        theirs.append(expected[columns[kept]])
    return np.concatenate(mine), np.concatenate(theirs)


class _Part:
    def __init__(self) -> None:
        self.largest = self.scale = self.squares = self.reference = 0.0
        self.values = 0

    def add(self, given: np.ndarray, expected: np.ndarray, *, averaged: bool) -> None:
        self.largest = float(np.maximum(self.largest, np.abs(given - expected).max()))  # NaN, if any, wins
        self.scale = max(self.scale, float(np.abs(expected).max()))
        if averaged:
            self.squares += float(np.square(np.subtract(given, expected, dtype=np.float64)).sum())
            self.reference += float(np.square(expected, dtype=np.float64).sum())
            self.values += expected.size

    @property
    def rms(self) -> float:
        return float(np.sqrt(self.squares / (self.reference or self.values or 1)))
