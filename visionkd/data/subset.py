"""Parts of a source: automatic splits and limits, both spread over the classes."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from visionkd.types import Source


class SubsetSource:
    """Some samples of another source.

    Args:
        base: The source to take from; a subset of a subset refers to the innermost one.
        indices: Positions in ``base``.
    """

    def __init__(self, base: Source, indices: np.ndarray) -> None:
        indices = np.asarray(indices, dtype=np.int64)
        if isinstance(base, SubsetSource):
            base, indices = base.base, base.indices[indices]
        self.base = base
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def load(self, index: int) -> Image.Image:
        return self.base.load(int(self.indices[index]))

    def target(self, index: int) -> Any:
        return self.base.target(int(self.indices[index]))

    def name(self, index: int) -> str:
        return self.base.name(int(self.indices[index]))


def has_maps(source: Source) -> bool:
    """Whether the targets of a source are maps of classes, as large as its images."""
    if isinstance(source, SubsetSource):
        source = source.base
    return bool(getattr(source, "maps", False))


def has_boxes(source: Source) -> bool:
    """Whether the targets of a source are boxes."""
    if isinstance(source, SubsetSource):
        source = source.base
    return bool(getattr(source, "boxed", False))


def targets_of(source: Source) -> np.ndarray:
    """Return the class index of every sample, N of int64, without decoding any image; -1 where a map has many."""
    if isinstance(source, SubsetSource):
        return targets_of(source.base)[source.indices]
    targets = getattr(source, "targets", None)
    if targets is None:
        targets = [source.target(index) for index in range(len(source))]
    return np.asarray(targets, dtype=np.int64)


def stratified_split(targets: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Hold out a share of each class; unlabelled samples count as one class.

    A class with one sample stays in training; one with more gives at least one sample to each part.

    Args:
        targets: Class indices, N.
        fraction: Share to hold out, between 0 and 1.
        seed: Another seed holds out other samples.

    Returns:
        Sorted positions of the training and of the held-out part.
    """
    held_out = []
    for label in np.unique(targets):
        members = np.flatnonzero(targets == label)
        count = min(max(1, round(len(members) * fraction)), len(members) - 1)
        order = np.random.default_rng((seed, _entropy(label))).permutation(len(members))
        held_out.append(members[order[:count]])
    val = np.sort(np.concatenate(held_out)) if held_out else np.zeros(0, dtype=np.int64)
    return np.setdiff1d(np.arange(len(targets)), val, assume_unique=True), val


def _entropy(label: int) -> int:
    """A class index as entropy, which is never negative: -1 stands for samples without a label."""
    return int(label) % (1 << 32)


def stratified_limit(targets: np.ndarray, limit: int, seed: int) -> np.ndarray:
    """Choose ``limit`` samples, as evenly over the classes as their sizes allow.

    Args:
        targets: Class indices, N.
        limit: How many to keep.
        seed: Another seed keeps other samples.

    Returns:
        Sorted positions, ``min(limit, N)``.
    """
    if limit >= len(targets):
        return np.arange(len(targets))
    rank = np.empty(len(targets), dtype=np.int64)
    tie = np.empty(len(targets))
    for label in np.unique(targets):
        members = np.flatnonzero(targets == label)
        rng = np.random.default_rng((seed, 1, _entropy(label)))
        rank[members] = rng.permutation(len(members))
        # Where the last round cannot serve every class, chance decides which ones go without, not the alphabet.
        tie[members] = rng.random()
    return np.sort(np.lexsort((tie, rank))[:limit])


def stratified_subset(source: Source, limit: int, *, seed: int) -> Source:
    """Return at most ``limit`` samples of a source, spread over its classes; the source itself where it has no more."""
    if len(source) <= limit:
        return source
    return SubsetSource(source, stratified_limit(targets_of(source), limit, seed))
