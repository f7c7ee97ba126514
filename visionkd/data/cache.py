"""Decoded images kept in memory, so that small images cost no decoding after the first pass."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from visionkd.data.subset import has_boxes, has_maps
from visionkd.errors import DataError, UnreadableImageError
from visionkd.runtime.box_metrics import BoxSet, box_set
from visionkd.types import Source

AUTO_LIMIT_BYTES = 1_000_000_000
_MIN_EPOCHS = 3
_PROBES = 16
_PART = 64
_RESERVE = 1.1
_NO_BOXES: dict[str, Any] = {"boxes": (), "labels": (), "crowd": ()}


class CachedSource:
    """A source whose images lie decoded in one tensor that all loader processes share.

    ``load`` gives uint8 tensors 3 x H x W, which are views of the shared memory and must not be written to. Targets
    that are maps lie behind their images, and are views as well. Boxes are asked for once.
    """

    def __init__(
        self,
        source: Source,
        pixels: Tensor,
        offsets: np.ndarray,
        shapes: np.ndarray,
        *,
        maps: bool = False,
        boxes: BoxSet | None = None,
    ) -> None:
        self.source = source
        self._pixels = pixels
        self._offsets = offsets
        self._shapes = shapes
        self._maps = maps
        self._boxes = boxes

    def __len__(self) -> int:
        return len(self.source)

    def load(self, index: int) -> Tensor:
        height, width = self._shapes[index].tolist()
        if not height:
            raise UnreadableImageError(f"cannot read '{self.source.name(index)}'")
        start = int(self._offsets[index])
        return self._pixels[start : start + height * width * 3].view(height, width, 3).permute(2, 0, 1)

    def target(self, index: int) -> Any:
        if self._boxes is not None:
            own, boxes = self._boxes.of(index), self._boxes
            return {"boxes": boxes.boxes[own], "labels": boxes.labels[own], "crowd": boxes.crowd[own]}
        if not self._maps:
            return self.source.target(index)
        height, width = self._shapes[index].tolist()
        if not height:
            raise UnreadableImageError(f"cannot read '{self.source.name(index)}'")
        start = int(self._offsets[index]) + height * width * 3
        return self._pixels[start : start + height * width].view(height, width).numpy()

    def name(self, index: int) -> str:
        return self.source.name(index)

    @property
    def nbytes(self) -> int:
        return self._pixels.numel()


def estimate_bytes(source: Source) -> int:
    """Estimate the size of all images decoded, from a few of them."""
    if not len(source):
        return 0
    sizes = []
    for index in np.linspace(0, len(source) - 1, min(_PROBES, len(source))).astype(int).tolist():
        try:
            image = source.load(index)
        except UnreadableImageError:
            continue
        sizes.append(image.width * image.height * (4 if has_maps(source) else 3))
    return int(sum(sizes) / max(1, len(sizes)) * len(source))


def build_cache(
    source: Source, *, limit_bytes: int | None = None, progress: Callable[[int, int], None] | None = None
) -> CachedSource | None:
    """Decode every image of ``source`` once, in threads.

    Args:
        source: What to decode; images that cannot be read stay unreadable in the cache.
        limit_bytes: Give up when the images need more than that; None never does.
        progress: Called with images done and images in all.

    Returns:
        The cached source, or None if it is larger than the limit.
    """
    count = len(source)
    expected = int(estimate_bytes(source) * _RESERVE) + 1
    if limit_bytes is not None and expected > limit_bytes * _RESERVE:
        return None
    pixels = torch.empty(expected, dtype=torch.uint8)
    offsets, shapes = np.zeros(count, dtype=np.int64), np.zeros((count, 2), dtype=np.int32)

    maps, boxed = has_maps(source), has_boxes(source)
    targets: list[Any] = []

    def decode(indices: range) -> list[tuple[tuple[int, ...], np.ndarray, Any] | None]:
        return [_decode(source, index, maps, boxed) for index in indices]

    used = 0
    workers = len(_affinity())
    with ThreadPoolExecutor(workers) as pool:
        # A few parts at a time: decoded images wait only for those before them.
        for start in range(0, count, _PART * workers):
            stop = min(start + _PART * workers, count)
            parts = [range(first, min(first + _PART, stop)) for first in range(start, stop, _PART)]
            for index, found in zip(range(start, stop), itertools.chain(*pool.map(decode, parts)), strict=True):
                targets.append(_NO_BOXES if found is None else found[2])
                if found is None:
                    continue
                shape, array, _ = found
                if used + array.size > len(pixels):
                    if limit_bytes is not None and used + array.size > limit_bytes * _RESERVE:
                        return None
                    grown = torch.empty(int(len(pixels) * 1.5) + array.size, dtype=torch.uint8)
                    grown[:used] = pixels[:used]
                    pixels = grown
                pixels.numpy()[used : used + array.size] = array
                offsets[index], shapes[index] = used, shape
                used += array.size
            if progress is not None:
                progress(stop, count)
    boxes = box_set(targets) if boxed else None
    return CachedSource(source, pixels[:used], offsets, shapes, maps=maps, boxes=boxes)


def cached(
    source: Source, mode: str, *, epochs: int | None = None, progress: Callable[[int, int], None] | None = None
) -> Source:
    """Return ``source`` cached, or as it is.

    Args:
        source: What to decode.
        mode: ``ram`` caches, ``none`` does not, ``auto`` does where all images fit in 1 GB and pay for it.
        epochs: Passes to come, if known: ``auto`` caches nothing for fewer than three.
        progress: Called with images done and images in all.
    """
    if mode == "none" or not len(source):
        return source
    if mode == "ram":
        return build_cache(source, progress=progress) or source
    too_few = epochs is not None and epochs < _MIN_EPOCHS
    if too_few or estimate_bytes(source) > AUTO_LIMIT_BYTES:
        return source
    return build_cache(source, limit_bytes=AUTO_LIMIT_BYTES, progress=progress) or source


def _decode(
    source: Source, index: int, maps: bool, boxed: bool
) -> tuple[tuple[int, ...], np.ndarray, Any] | None:
    """Return height and width of an image, its pixels in a row, with those of its map behind them, and its boxes."""
    try:
        image = np.asarray(source.load(index))
        if not maps:
            return image.shape[:2], image.reshape(-1), source.target(index) if boxed else None
        target = source.target(index)
    except UnreadableImageError:
        return None
    if target.shape != image.shape[:2]:
        raise different_sizes(source.name(index), image.shape[:2], target.shape)
    return image.shape[:2], np.concatenate([image.reshape(-1), target.reshape(-1)]), None


def different_sizes(name: str, image: Sequence[int], target: Sequence[int]) -> DataError:
    """Return the error about a picture whose map has another height and width."""
    sizes = " and ".join(f"{width} x {height}" for height, width in (image, target))
    return DataError(
        f"'{name}' and its map of classes differ in size: {sizes} pixels",
        hint="Each map must have the size of its picture; 'visionkd data check' lists all that do not.",
    )


def _affinity() -> set[int]:
    """Processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))
