"""How far two sets of answers are apart, in numpy: logits, or the candidates of a detector.

Candidates of an image are one array, N x (4 + K): a box, in pixels of the input, and its scores.
"""

from __future__ import annotations

import numpy as np

from visionkd.runtime.boxes import BoxRule

#: Columns of a box.
SIDES = 4


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
        cuts = [slice(None)] if self.rule is None else [slice(SIDES, None), slice(0, SIDES)]
        for part, cut in zip(self.parts, cuts, strict=True):
            part.add(given[..., cut], expected[..., cut], averaged=averaged)
        if not averaged:
            return
        if self.rule is None:
            equal = given.argmax(1) == expected.argmax(1)
        else:  # of the candidates that count, the class with the highest score
            votes = expected[..., SIDES:]
            counts = votes.max(-1) > self.rule.score_threshold
            equal = (given[..., SIDES:].argmax(-1) == votes.argmax(-1))[counts]
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
