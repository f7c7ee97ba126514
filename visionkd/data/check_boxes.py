"""Looking for what is wrong with boxes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from visionkd.data.boxes import different_sizes
from visionkd.data.subset import SubsetSource
from visionkd.types import Source


@dataclass(frozen=True)
class BoxLook:
    """What is known about the boxes of one image.

    Attributes:
        digest: Hash of all of them.
        labels: Class index of each.
        written: Width and height that the image should have; None where that is not written down.
    """

    digest: bytes
    labels: np.ndarray
    written: tuple[int, int] | None


def look_at_boxes(source: Source, index: int) -> BoxLook:
    """Return what is known about the boxes of an image, without decoding it."""
    target = source.target(index)
    digest = hashlib.sha256(target["boxes"].tobytes() + target["labels"].tobytes()).digest()
    sizes = getattr(source, "sizes", None)
    written = None if sizes is None or not sizes[index].all() else (int(sizes[index][0]), int(sizes[index][1]))
    return BoxLook(digest, target["labels"], written)


def size_fault(look: BoxLook, size: tuple[int, int], name: str) -> str | None:
    """Return what is wrong with an image of ``size``, width and height; None where its boxes were drawn on it."""
    if look.written is None or look.written == size:
        return None
    return different_sizes(name, size, look.written).message


def faults_of(splits: Mapping[str, Source]) -> list[tuple[str, str]]:
    """Return the boxes that were left out or cut when the data was opened: ``split: image``, and what is wrong."""
    found = []
    for split, source in splits.items():
        base: Any = source.base if isinstance(source, SubsetSource) else source
        found += [(f"{split}: {fault.image}", str(fault)) for fault in getattr(base, "faults", ())]
    return found


def box_findings(
    classes: Sequence[str], looks: Mapping[str, Sequence[BoxLook]]
) -> tuple[tuple[str, ...], tuple[str, ...], dict[str, int]]:
    """Return classes without a box, those in one image only, and how many boxes each has.

    Args:
        classes: Class names.
        looks: What the images of each split have.

    Returns:
        The first as ``split: class``; the second of the split that is trained on; the third over all splits, with the
        number of images without a box under ``images without boxes``.
    """
    empty, single, without = [], [], 0
    total = np.zeros(len(classes), np.int64)
    for split, found in looks.items():
        counts = np.array([np.bincount(look.labels, minlength=len(classes)) for look in found], np.int64)
        counts = counts.reshape(-1, len(classes))
        total += counts.sum(0)
        images = (counts > 0).sum(0)
        without += int((counts.sum(1) == 0).sum())
        empty += [f"{split}: {name}" for number, name in enumerate(classes) if not images[number]]
        if split in ("train", "all"):
            single += [name for number, name in enumerate(classes) if images[number] == 1]
    boxes = {name: int(total[number]) for number, name in enumerate(classes)}
    return tuple(empty), tuple(single), {**boxes, "images without boxes": without}
