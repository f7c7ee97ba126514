"""Ranges of activations, from what was seen of their magnitudes: max, entropy, percentile and mean squared error.

A histogram of magnitudes keeps its bin width and grows where later values are larger. The searches are those of
NVIDIA's calibrators (Wu et al., "Integer Quantization for Deep Learning Inference", 2020, arXiv 2004.09602).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from visionkd.quantization.fake_quant import QMAX, QMIN

BINS = 2048
#: The least range that the searches try, in bins; as many as there are positive integers and zero.
START_BIN = 128
_MOST_CANDIDATES = 8192


class MaxObserver:
    """Keeps the largest magnitude.

    Attributes:
        amax: Largest magnitude; NaN or infinite where a value was.
        batches: Number of tensors seen.
    """

    def __init__(self) -> None:
        self.amax, self.batches = 0.0, 0

    def __call__(self, x: Tensor) -> None:
        self.batches += 1
        largest = float(x.abs().amax())
        self.amax = largest if not math.isfinite(largest) else max(self.amax, largest)


class HistogramObserver:
    """Keeps the largest magnitude and a histogram of all magnitudes.

    Args:
        bins: Bins between 0 and the largest magnitude of the first batch that is not all zero.

    Attributes:
        amax: Largest magnitude; NaN or infinite where a value was.
        batches: Number of tensors seen.
        counts: Values in each bin, float64.
        width: Width of a bin.
    """

    def __init__(self, bins: int = BINS) -> None:
        self.bins, self.amax, self.batches = bins, 0.0, 0
        self.counts = np.zeros(0)
        self.width = 0.0
        self._zeros = 0

    def __call__(self, x: Tensor) -> None:
        self.batches += 1
        x = x.float().abs()
        largest = float(x.amax())
        if not math.isfinite(largest) or not math.isfinite(self.amax):
            self.amax = largest if not math.isfinite(largest) else self.amax
            return
        self.amax = max(self.amax, largest)
        if not self.width:
            if largest == 0.0:
                self._zeros += x.numel()
                return
            self.width = largest / self.bins
            self.counts = np.zeros(self.bins)
            self.counts[0] += self._zeros
        bins = max(len(self.counts), math.ceil(np.float32(largest) / np.float32(self.width)))
        top = max(self.width * bins, largest)  # histc leaves out what lies above
        counts = torch.histc(x, bins=bins, min=0.0, max=top).double().cpu().numpy()
        counts[: len(self.counts)] += self.counts
        self.counts = counts

    @property
    def edges(self) -> np.ndarray:
        """Bounds of the bins, one more than bins."""
        return self.width * np.arange(len(self.counts) + 1)


def percentile_amax(counts: np.ndarray, edges: np.ndarray, percentile: float) -> float:
    """Return the lower bound of the first bin at which ``percentile`` percent of the values are reached."""
    cumulative = np.cumsum(counts) / counts.sum()
    index = min(int(np.searchsorted(cumulative, percentile / 100.0)), len(counts) - 1)
    return float(edges[max(index, 1)])


def entropy_amax(counts: np.ndarray, edges: np.ndarray, *, start_bin: int = START_BIN, stride: int = 1) -> float:
    """Return the range that loses least information: the smallest KL divergence of rounded from clipped values.

    For each range of ``i`` bins, P is the histogram up to there with what lies beyond in its last bin, and Q has 128
    groups of bins, each group's mean on its bins that are not empty; the tail is not in Q. The zeros of ReLU would
    outweigh all else, so the first bin counts what the second does. Of equal divergences the widest range wins.
    """
    counts = np.array(counts, dtype=np.float64)
    if len(counts) <= start_bin:
        return float(edges[-1])
    counts[0] = counts[1]
    best, found = math.inf, len(counts)
    total = np.cumsum(counts)
    for i in range(start_bin, len(counts) + 1, stride):
        reference = counts[:i].copy()
        groups = np.arange(i) * START_BIN // i
        filled = reference > 0
        sums = np.bincount(groups, weights=reference, minlength=START_BIN)
        sizes = np.maximum(np.bincount(groups, weights=filled, minlength=START_BIN), 1)
        rounded = np.where(filled, (sums / sizes)[groups], 0.0)
        reference[-1] += total[-1] - total[i - 1]
        divergence = _divergence(reference, rounded)
        if divergence <= best:
            best, found = divergence, i
    return float(edges[found])


def mse_amax(counts: np.ndarray, edges: np.ndarray, *, start_bin: int = START_BIN, stride: int = 1) -> float:
    """Return the range, a centre of a bin, with the least mean squared error of rounding and clipping the centres."""
    centers = (edges[1:] + edges[:-1]) / 2
    if len(centers) <= start_bin:
        return float(edges[-1])
    candidates = np.arange(start_bin, len(centers), stride)
    filled = counts > 0
    values, weights = centers[filled], counts[filled]
    errors = np.empty(len(candidates))
    for number, candidate in enumerate(candidates):
        scale = centers[candidate] / QMAX
        rounded = np.clip(np.round(values / scale), QMIN, QMAX) * scale
        errors[number] = np.dot((rounded - values) ** 2, weights)
    return float(centers[candidates[int(np.argmin(errors))]])


def range_of(observer: MaxObserver | HistogramObserver, calibration: str, percentile: float) -> float:
    """Return the range that a calibration chooses; NaN, infinite or 0 where the values allow none."""
    if isinstance(observer, MaxObserver) or not math.isfinite(observer.amax) or observer.amax == 0.0:
        return observer.amax
    counts, edges = observer.counts, observer.edges
    stride = max(1, math.ceil(len(counts) / _MOST_CANDIDATES))
    if calibration == "percentile":
        return percentile_amax(counts, edges, percentile)
    if calibration == "entropy":
        return entropy_amax(counts, edges, stride=stride)
    return mse_amax(counts, edges, stride=stride)


def _divergence(p: np.ndarray, q: np.ndarray) -> float:
    """KL divergence of two histograms, each brought to the sum 1; infinite where ``q`` has no mass and ``p`` does."""
    total = q.sum()
    if total == 0:
        return math.inf
    p, q = p / p.sum(), q / total
    present = p > 0
    if (q[present] == 0).any():
        return math.inf
    return float((p[present] * np.log(p[present] / q[present])).sum())
