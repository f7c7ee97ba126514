"""Metrics of classification and segmentation in numpy. Shares are in percent; ``nll`` is in nats."""

from __future__ import annotations

import numpy as np

from visionkd.types import IGNORE


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return probabilities along the last axis, float32."""
    shifted = np.asarray(logits, dtype=np.float32)
    shifted = np.exp(shifted - shifted.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def classification_metrics(probs: np.ndarray, targets: np.ndarray, *, num_bins: int = 15) -> dict[str, float]:
    """Return ``top1``, ``top5`` (above five classes), ``ece`` and ``nll``.

    Args:
        probs: N x C probabilities.
        targets: N class indices.
        num_bins: Bins of confidence for ``ece``.
    """
    probs, targets = _checked(probs, targets)
    found = {"top1": top_k_accuracy(probs, targets, 1)}
    if probs.shape[1] > 5:
        found["top5"] = top_k_accuracy(probs, targets, 5)
    found["ece"] = expected_calibration_error(probs, targets, num_bins=num_bins)
    found["nll"] = negative_log_likelihood(probs, targets)
    return found


def top_k_accuracy(scores: np.ndarray, targets: np.ndarray, k: int) -> float:
    """Return the share of rows whose target is among the ``k`` highest of ``scores``, N x C (logits do as well).

    Of equal scores the one with the lower index counts as higher, so that a constant row is right for class 0 alone; a
    row whose target scores NaN is wrong.
    """
    scores, targets = _checked(scores, targets)
    own = scores[np.arange(len(targets)), targets][:, None]
    before = np.arange(scores.shape[1])[None, :] < targets[:, None]
    rank = ((scores > own) | ((scores == own) & before)).sum(axis=1)
    return 100.0 * float(((rank < k) & ~np.isnan(own[:, 0])).mean())


def confusion_matrix(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return C x C counts: rows are the targets, columns the predictions."""
    scores, targets = _checked(scores, targets)
    count = scores.shape[1]
    flat = np.bincount(targets * count + scores.argmax(axis=1), minlength=count * count)
    return flat.reshape(count, count)


def per_class_accuracy(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return the accuracy of each class, C values; NaN for classes without samples."""
    matrix = confusion_matrix(scores, targets)
    totals = matrix.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(totals > 0, 100.0 * np.diag(matrix) / totals, np.nan)


def expected_calibration_error(probs: np.ndarray, targets: np.ndarray, *, num_bins: int = 15) -> float:
    """Return the gap between confidence and accuracy, averaged over equal bins of confidence.

    Guo et al., "On Calibration of Modern Neural Networks", 2017, equation 3.
    """
    probs, targets = _checked(probs, targets)
    confidence = probs.max(axis=1).astype(np.float64)
    correct = probs.argmax(axis=1) == targets
    bins = np.clip(np.ceil(confidence * num_bins).astype(int) - 1, 0, num_bins - 1)
    counts = np.bincount(bins, minlength=num_bins)
    gaps = np.bincount(bins, weights=confidence, minlength=num_bins) - np.bincount(
        bins, weights=correct.astype(np.float64), minlength=num_bins
    )
    return 100.0 * float(np.abs(gaps).sum() / counts.sum())


def negative_log_likelihood(probs: np.ndarray, targets: np.ndarray) -> float:
    """Return the mean of ``-log(probability of the target)``; probabilities are taken as at least 1e-12."""
    probs, targets = _checked(probs, targets)
    own = probs[np.arange(len(targets)), targets].astype(np.float64)
    return float(-np.log(np.maximum(own, 1e-12)).mean())


def _checked(scores: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scores, targets = np.asarray(scores), np.asarray(targets)
    if scores.ndim != 2 or targets.shape != scores.shape[:1] or len(targets) == 0:
        raise ValueError(f"scores N x C and targets N expected, with N above 0; got {scores.shape} and {targets.shape}")
    if targets.min() < 0 or targets.max() >= scores.shape[1]:
        low, high = int(targets.min()), int(targets.max())
        raise ValueError(f"targets from {low} to {high} do not fit {scores.shape[1]} classes")
    return scores, targets.astype(np.int64)


def pixel_confusion(given: np.ndarray, target: np.ndarray, num_classes: int) -> np.ndarray:
    """Return C x C counts of pixels: rows are the targets, columns the answers; pixels without a label do not count.

    Args:
        given: Class of each pixel, H x W, each below ``num_classes``.
        target: The same with 255 where there is no label.
        num_classes: C.
    """
    given, target = np.asarray(given), np.asarray(target)
    if given.shape != target.shape:
        raise ValueError(f"an answer of {given.shape} pixels to a map of {target.shape}")
    seen = target != IGNORE
    labels = target[seen].astype(np.int64)
    if labels.size and labels.max() >= num_classes:
        raise ValueError(f"the class {int(labels.max())} in a map of {num_classes} classes")
    flat = np.bincount(labels * num_classes + given[seen], minlength=num_classes * num_classes)
    return flat.reshape(num_classes, num_classes)


def intersection_and_union(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return for each class the pixels that answer and map share, and those of either: C each of C x C counts."""
    own = np.diagonal(confusion, axis1=-2, axis2=-1)
    return own, confusion.sum(-1) + confusion.sum(-2) - own


def class_iou(intersection: np.ndarray, union: np.ndarray) -> np.ndarray:
    """Return intersection over union in percent, C; NaN for a class that neither map nor answer has."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(union > 0, 100.0 * intersection / union, np.nan)


def mean_iou(intersection: np.ndarray, union: np.ndarray) -> float:
    """Return the mean over the classes that map or answer has; NaN where there is none."""
    found = class_iou(intersection, union)
    return float(np.nanmean(found)) if np.isfinite(found).any() else float("nan")


def segmentation_metrics(confusion: np.ndarray) -> dict[str, float]:
    """Return ``miou`` and ``pixel_acc`` of C x C counts of pixels."""
    total = int(confusion.sum())
    right = float(np.trace(confusion))
    return {
        "miou": mean_iou(*intersection_and_union(confusion)),
        "pixel_acc": 100.0 * right / total if total else float("nan"),
    }


def resize_maps(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return maps, ... x h x w, at another size, by bilinear interpolation between the centres of pixels.

    The same as PyTorch's ``interpolate`` with ``align_corners=False``; nothing is smoothed where a map shrinks.
    """
    if values.shape[-2:] == tuple(size):
        return values
    rows, columns = (_interpolation(*sides) for sides in zip(values.shape[-2:], size, strict=True))
    return rows @ (values @ columns.T)


def _interpolation(before: int, after: int) -> np.ndarray:
    """Return the matrix, after x before, that interpolates along one side."""
    place = np.clip((np.arange(after) + 0.5) * before / after - 0.5, 0.0, before - 1)
    low = np.minimum(place.astype(int), max(before - 2, 0))
    share = (place - low).astype(np.float32)
    found = np.zeros((after, before), np.float32)
    found[np.arange(after), low] = 1.0 - share
    found[np.arange(after), np.minimum(low + 1, before - 1)] += share
    return found
