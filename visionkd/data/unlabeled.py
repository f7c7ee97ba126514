"""Images without labels: a pool beside a labelled data set, or a data set that has no labels at all.

Their target is -1 (:data:`visionkd.data.layout.UNLABELED`). A method that looks at labels never sees one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from visionkd.data import known
from visionkd.data.archive import open_archive
from visionkd.data.folder import open_folder
from visionkd.data.layout import UNLABELED, Opened, fingerprint
from visionkd.data.subset import SubsetSource, targets_of
from visionkd.errors import Problem, RequestError
from visionkd.types import DataSet, Source


class JoinedSource:
    """Several sources as one, in their order.

    Args:
        parts: The sources; samples are numbered through all of them.
    """

    def __init__(self, parts: Sequence[Source]) -> None:
        self.parts = tuple(parts)
        self._starts = np.cumsum([0, *map(len, self.parts)])
        self.targets = np.concatenate([targets_of(part) for part in self.parts])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _find(self, index: int) -> tuple[Source, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self.parts[part], index - int(self._starts[part])

    def load(self, index: int) -> Any:
        part, place = self._find(index)
        return part.load(place)

    def target(self, index: int) -> int:
        return int(self.targets[index])

    def name(self, index: int) -> str:
        part, place = self._find(index)
        return part.name(place)


class RelabeledSource:
    """A source with other targets.

    Args:
        base: Whose images these are.
        targets: Class indices, one for each.
    """

    def __init__(self, base: Source, targets: np.ndarray) -> None:
        if len(targets) != len(base):
            raise ValueError(f"{len(targets)} targets for {len(base)} samples")
        self.base, self.targets = base, np.asarray(targets, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.base)

    def load(self, index: int) -> Any:
        return self.base.load(index)

    def target(self, index: int) -> int:
        return int(self.targets[index])

    def name(self, index: int) -> str:
        return self.base.name(index)


def open_unlabeled(path: str | os.PathLike[str], *, key: str = "--unlabeled") -> Opened:
    """Open a directory or an archive of images, in whatever folders they lie.

    Args:
        path: Directory or archive; or the name of a known data set, of which the training images are taken.
        key: What to call the setting in messages.

    Returns:
        One source, ``all``, without classes.

    Raises:
        RequestError: If there is no such path.
        DataError: If it holds no image, or cannot be read.
    """
    place = os.path.expanduser(os.fspath(path))
    if os.path.isdir(place):
        return open_folder(place, labels="ignored")
    if os.path.exists(place):
        return open_archive(place, labels="ignored")
    if path in known.names():
        opened = known.open_known(str(path))
        source = opened.sources.get("train") or opened.sources["all"]
        hidden = RelabeledSource(source, np.full(len(source), UNLABELED))
        return replace(opened, classes=(), sources={"all": hidden})
    raise RequestError(Problem(key, f"'{path}' does not exist", "Give a directory of images, or an archive of one."))


def has_labels(source: Source) -> bool:
    """Whether any sample has a label."""
    return bool((targets_of(source) >= 0).any())


def with_unlabeled(data: DataSet, pool: Opened, kept: np.ndarray | None = None) -> DataSet:
    """Put unlabelled images behind the training images; ``labeled`` holds those without them.

    Args:
        data: The data set.
        pool: What :func:`open_unlabeled` returned.
        kept: Positions of the unlabelled images to take; None takes all.
    """
    source = pool.sources["all"]
    kept = np.arange(len(source)) if kept is None else np.asarray(kept, dtype=np.int64)
    train = data.splits["train"]
    joined = JoinedSource([train, SubsetSource(source, kept)]) if len(kept) else train
    return replace(
        data,
        splits={**data.splits, "train": joined, "labeled": train},
        # Sample numbers count through both: what was left out of the pool belongs to their identity.
        fingerprint=fingerprint([data.fingerprint.encode(), pool.fingerprint.encode(), kept.tobytes()]),
    )


def surest_of_each_class(classes: np.ndarray, scores: np.ndarray, count: int) -> np.ndarray:
    """Return the positions of the ``count`` images of each predicted class with the highest score.

    A class may have fewer.

    Args:
        classes: Class that each image is predicted to be, N; -1 for an image to leave out.
        scores: Probability of that class, N.
        count: Most images per class.
    """
    order = np.lexsort((np.arange(len(scores)), -scores, classes))
    ordered = classes[order]
    place = np.arange(len(order)) - np.searchsorted(ordered, ordered, side="left")
    return np.sort(order[(place < count) & (ordered >= 0)])
