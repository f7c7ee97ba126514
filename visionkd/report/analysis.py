"""The numbers behind the pictures: plain numpy on targets and probabilities."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

CHUNK = 4096
"""Rows handled at a time where an N x C temporary would be large."""


@dataclass(frozen=True, eq=False)
class Answers:
    """One network's answers, reduced to what most pictures need.

    Attributes:
        pred: Predicted class, length N.
        confidence: Probability of the predicted class, length N.
        correct: Whether it is the target, length N.
    """

    pred: np.ndarray
    confidence: np.ndarray
    correct: np.ndarray

    @property
    def top1(self) -> float | None:
        """Percent; None without samples."""
        return 100.0 * float(self.correct.mean()) if len(self.correct) else None


def answers(probs: np.ndarray, targets: np.ndarray) -> Answers:
    """Reduce N x C ``probs``; a value that is not finite counts as 0, so that one bad row does not hide the others."""
    probs = np.nan_to_num(np.asarray(probs, dtype=np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    pred = probs.argmax(axis=1) if len(probs) else np.zeros(0, dtype=np.int64)
    confidence = np.clip(np.take_along_axis(probs, pred[:, None], axis=1)[:, 0], 0.0, 1.0)
    return Answers(pred=pred, confidence=confidence, correct=pred == np.asarray(targets))


def topk_accuracy(probs: np.ndarray, targets: np.ndarray, k: int = 5) -> float | None:
    """Percent of samples whose target is among the ``k`` likeliest classes; ties count for the network."""
    if not len(targets):
        return None
    hits = 0
    for start in range(0, len(targets), CHUNK):
        part, wanted = probs[start : start + CHUNK], targets[start : start + CHUNK]
        hits += int(((part > np.take_along_axis(part, wanted[:, None], axis=1)).sum(axis=1) < k).sum())
    return 100.0 * hits / len(targets)


def class_accuracy(correct: np.ndarray, targets: np.ndarray, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the accuracy in percent (NaN for a class without samples) and the number of samples of each class."""
    counts = np.bincount(targets, minlength=num_classes)
    hits = np.bincount(targets, weights=correct, minlength=num_classes)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(counts > 0, 100.0 * hits / counts, np.nan), counts


def confusion(pred: np.ndarray, targets: np.ndarray, num_classes: int) -> np.ndarray:
    """Return C x C counts, rows are targets, columns predictions."""
    flat = np.bincount(targets * num_classes + pred, minlength=num_classes * num_classes)
    return flat.reshape(num_classes, num_classes)


@dataclass(frozen=True)
class ConfusedPair:
    """How often class ``target`` was called ``pred``; ``share`` in percent of the target's samples."""

    target: int
    pred: int
    count: int
    share: float


def confused_pairs(matrix: np.ndarray, limit: int) -> list[ConfusedPair]:
    """Return the most frequent mistakes, most frequent first, then by class index.

    A mistake made once is no pattern: such pairs are left out, unless there are no others.
    """
    mistakes = matrix.copy()
    np.fill_diagonal(mistakes, 0)
    rows, cols = np.nonzero(mistakes >= (2 if mistakes.max(initial=0) > 1 else 1))
    counts = mistakes[rows, cols]
    order = np.lexsort((cols, rows, -counts))[:limit]
    totals = matrix.sum(axis=1)
    return [
        ConfusedPair(int(rows[i]), int(cols[i]), int(counts[i]), float(100.0 * counts[i] / totals[rows[i]]))
        for i in order
    ]


@dataclass(frozen=True)
class Agreement:
    """Student against teacher over N samples.

    Attributes:
        rate: Percent of samples on which both name the same class.
        both_right, only_teacher, only_student, both_wrong: Numbers of samples; they add up to N.
        same_mistake: Of ``both_wrong``, how many name the same wrong class.
        kl: Mean KL divergence of the student's distribution from the teacher's, KL(teacher || student), in nats.
    """

    rate: float
    both_right: int
    only_teacher: int
    only_student: int
    both_wrong: int
    same_mistake: int
    kl: float


def agreement(student: Answers, teacher: Answers, kl: float) -> Agreement | None:
    """Count who is right; None without samples."""
    if not len(student.pred):
        return None
    same = student.pred == teacher.pred
    wrong = ~student.correct & ~teacher.correct
    return Agreement(
        rate=100.0 * float(same.mean()),
        both_right=int((student.correct & teacher.correct).sum()),
        only_teacher=int((~student.correct & teacher.correct).sum()),
        only_student=int((student.correct & ~teacher.correct).sum()),
        both_wrong=int(wrong.sum()),
        same_mistake=int((wrong & same).sum()),
        kl=kl,
    )


def mean_kl(student_probs: np.ndarray, teacher_probs: np.ndarray, floor: float = 1e-8) -> float:
    """Return the mean over samples of KL(teacher || student) in nats; probabilities below ``floor`` count as that."""
    total = 0.0
    for start in range(0, len(student_probs), CHUNK):
        student = np.nan_to_num(student_probs[start : start + CHUNK].astype(np.float32))
        teacher = np.nan_to_num(teacher_probs[start : start + CHUNK].astype(np.float32))
        ratio = np.log(np.maximum(teacher, floor)) - np.log(np.maximum(student, floor))
        total += float((teacher * ratio).sum(dtype=np.float64))
    return total / len(student_probs) if len(student_probs) else float("nan")


@dataclass(frozen=True, eq=False)
class Reliability:
    """Confidence against accuracy in equal bins of confidence.

    Attributes:
        confidence: Mean confidence of each bin, NaN where empty.
        accuracy: Share of right answers in each bin, NaN where empty.
        counts: Samples in each bin.
        ece: Expected calibration error in percent: the mean gap between the two, weighted by ``counts``.
    """

    confidence: np.ndarray
    accuracy: np.ndarray
    counts: np.ndarray
    ece: float


def reliability(network: Answers, bins: int = 15) -> Reliability:
    """Bin the answers by confidence; a confidence on an edge falls into the lower bin, as is usual for this error."""
    place = np.clip(np.ceil(network.confidence.astype(np.float64) * bins).astype(np.int64) - 1, 0, bins - 1)
    counts = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore", divide="ignore"):
        confidence = np.bincount(place, weights=network.confidence, minlength=bins) / counts
        accuracy = np.bincount(place, weights=network.correct, minlength=bins) / counts
    gaps = np.nan_to_num(np.abs(confidence - accuracy)) * counts
    ece = 100.0 * float(gaps.sum() / counts.sum()) if counts.sum() else float("nan")
    return Reliability(confidence, accuracy, counts, ece)


def confident_errors(network: Answers, limit: int) -> list[int]:
    """Return the samples that were answered wrongly with the highest confidence, surest first, then by index."""
    wrong = np.flatnonzero(~network.correct)
    order = np.lexsort((wrong, -network.confidence[wrong]))[:limit]
    return [int(index) for index in wrong[order]]


@dataclass(frozen=True)
class Difference:
    """Accuracy of one network minus another's on the same samples, in points, with its 95 % interval."""

    points: float
    low: float
    high: float


def paired_difference(first: Answers, second: Answers) -> Difference | None:
    """Compare sample by sample, which is sharper than comparing two intervals; None below 30 samples."""
    size = len(first.correct)
    if size < 30:
        return None
    gain = first.correct.astype(np.float64) - second.correct
    half = 1.96 * float(gain.std(ddof=1)) / size**0.5
    mean = float(gain.mean())
    return Difference(100.0 * mean, 100.0 * (mean - half), 100.0 * (mean + half))
