"""Looking for what is wrong with maps of classes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from visionkd.errors import DataError, UnreadableImageError
from visionkd.types import IGNORE, Source


@dataclass(frozen=True)
class MapLook:
    """What one map shows.

    Attributes:
        digest: Hash of its classes; None where it is no map.
        reason: Why it is none.
        pixels: Pixels of each of the 256 values.
        size: Width and height.
    """

    digest: bytes | None = None
    reason: str | None = None
    pixels: np.ndarray | None = None
    size: tuple[int, int] = (0, 0)


def look_at_map(source: Source, index: int) -> MapLook:
    """Decode one map."""
    try:
        target = source.target(index)
    except (DataError, UnreadableImageError) as error:
        return MapLook(reason=str(error).splitlines()[0])
    pixels = np.bincount(target.reshape(-1), minlength=IGNORE + 1)
    digest = hashlib.sha256(repr(target.shape).encode() + target.tobytes()).digest()
    return MapLook(digest, None, pixels, target.shape[::-1])


def class_findings(
    classes: Sequence[str], looks: Mapping[str, Sequence[MapLook]]
) -> tuple[tuple[str, ...], tuple[str, ...], dict[str, float]]:
    """Return classes without a pixel, those in one picture only, and each one's share of the labelled pixels.

    Args:
        classes: Class names.
        looks: What the maps of each split show.

    Returns:
        The first as ``split: class``; the second of the split that is trained on; the third in percent, with the share
        of pixels without a label under ``no label``.
    """
    empty, single = [], []
    total = np.zeros(IGNORE + 1, dtype=np.int64)
    for split, found in looks.items():
        pixels = np.array([look.pixels for look in found if look.pixels is not None], dtype=np.int64)
        pixels = pixels.reshape(-1, IGNORE + 1)
        total += pixels.sum(0)
        pictures = (pixels > 0).sum(0)
        empty += [f"{split}: {name}" for value, name in enumerate(classes) if not pictures[value]]
        if split in ("train", "all"):
            single += [name for value, name in enumerate(classes) if pictures[value] == 1]
    labeled = max(1, int(total[:IGNORE].sum()))
    shares = {name: round(100.0 * int(total[value]) / labeled, 3) for value, name in enumerate(classes)}
    shares["no label"] = round(100.0 * int(total[IGNORE]) / max(1, int(total.sum())), 3)
    return tuple(empty), tuple(single), shares
