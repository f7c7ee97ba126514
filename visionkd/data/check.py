"""Looking for what is wrong with a data set before any training does."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from visionkd.data.check_boxes import BoxLook, box_findings, faults_of, look_at_boxes, size_fault
from visionkd.data.check_maps import MapLook, class_findings, look_at_map
from visionkd.data.subset import SubsetSource, has_boxes, has_maps, targets_of
from visionkd.errors import UnreadableImageError
from visionkd.runtime.images import TruncatedImageError, decode_rgb
from visionkd.types import DataSet, Source

TINY_PIXELS = 16
_PART = 64


@dataclass(frozen=True)
class CheckReport:
    """What :func:`check_data` found. Samples are named ``split: path``.

    Attributes:
        name: Name of the data set.
        num_images: Images by split.
        unreadable: Samples that cannot be decoded, each with the reason.
        truncated: Samples whose file is cut off.
        duplicates: Groups of identical images within one split and class.
        conflicting: Groups of identical images that bear different classes.
        leakage: Groups of identical images that lie in several splits.
        grey: Samples without colour.
        tiny: Samples with a side under 16 pixels, with width and height.
        empty_classes: Classes without an image in a split, as ``split: class``.
        one_image_classes: Classes with a single image in all.
        wrong_maps: Maps of classes that are none, or that do not have the size of their image, with the reason; None
            where targets are no maps.
        pixels_percent: Share of each class in the labelled pixels, and that of pixels without a label; as above.
        wrong_boxes: Boxes that were left out or cut, and images of another size than their boxes were drawn on, with
            the reason; None where targets are no boxes.
        boxes: How many boxes each class has, and how many images have none; as above.
    """

    name: str
    num_images: Mapping[str, int]
    unreadable: tuple[tuple[str, str], ...] = ()
    truncated: tuple[str, ...] = ()
    duplicates: tuple[tuple[str, ...], ...] = ()
    conflicting: tuple[tuple[str, ...], ...] = ()
    leakage: tuple[tuple[str, ...], ...] = ()
    grey: tuple[str, ...] = ()
    tiny: tuple[tuple[str, int, int], ...] = ()
    empty_classes: tuple[str, ...] = ()
    one_image_classes: tuple[str, ...] = ()
    wrong_maps: tuple[tuple[str, str], ...] | None = None
    pixels_percent: Mapping[str, float] | None = None
    wrong_boxes: tuple[tuple[str, str], ...] | None = None
    boxes: Mapping[str, int] | None = None

    @property
    def problems(self) -> bool:
        """Whether anything needs attention; grey and tiny images are facts, not faults."""
        return any(
            (
                self.unreadable,
                self.truncated,
                self.duplicates,
                self.conflicting,
                self.leakage,
                self.empty_classes,
                self.one_image_classes,
                self.wrong_maps,
                self.wrong_boxes,
            )
        )

    def counts(self) -> dict[str, int]:
        """Return how many entries each list has, by name."""
        others = ("name", "num_images", "pixels_percent", "boxes")
        lists = (name for name in self.__dataclass_fields__ if name not in others)
        return {name: len(getattr(self, name)) for name in lists if getattr(self, name) is not None}


@dataclass(frozen=True)
class _Look:
    """What one sample shows."""

    digest: bytes | None = None
    reason: str | None = None
    truncated: bool = False
    grey: bool = False
    size: tuple[int, int] = (0, 0)
    map: MapLook | None = None
    boxes: BoxLook | None = None


def check_data(dataset: DataSet, progress: Callable[[int, int], None] | None = None) -> CheckReport:
    """Decode every image of a data set and report what is wrong.

    Args:
        dataset: The data set.
        progress: Called with images looked at and images in all.
    """
    splits = _distinct(dataset.splits)
    looks = _look_at_all(splits, progress)
    unreadable, truncated, grey, tiny, wrong_maps = [], [], [], [], []
    wrong_boxes = faults_of(splits)
    groups: dict[bytes, list[tuple[str, int | bytes | None, str]]] = defaultdict(list)
    for split, source in splits.items():
        targets = targets_of(source)
        for index, look in enumerate(looks[split]):
            name = f"{split}: {source.name(index)}"
            if look.truncated:
                truncated.append(name)
            elif look.reason is not None:
                unreadable.append((name, look.reason))
            else:
                if look.grey:
                    grey.append(name)
                if min(look.size) < TINY_PIXELS:
                    tiny.append((name, *look.size))
            label: int | bytes | None = int(targets[index])
            if look.map is not None:
                label = look.map.digest
                if look.map.reason is not None:
                    wrong_maps.append((name, look.map.reason))
                elif look.reason is None and look.map.size != look.size:
                    sizes = [f"{width} x {height}" for width, height in (look.map.size, look.size)]
                    wrong_maps.append((name, f"the map has {sizes[0]} pixels, the image {sizes[1]}"))
            if look.boxes is not None:
                label = look.boxes.digest
                fault = size_fault(look.boxes, look.size, source.name(index)) if look.reason is None else None
                if fault is not None:
                    wrong_boxes.append((name, fault))
            if look.digest is not None:
                groups[look.digest].append((split, label, name))
    duplicates, conflicting, leakage = [], [], []
    for group in groups.values():
        if len(group) < 2:
            continue
        names = tuple(name for _, _, name in group)
        several_splits = len({split for split, _, _ in group}) > 1
        several_classes = len({target for _, target, _ in group}) > 1
        if several_splits:
            leakage.append(names)
        if several_classes:
            conflicting.append(names)
        if not several_splits and not several_classes:
            duplicates.append(names)
    maps = {split: [look.map for look in found if look.map is not None] for split, found in looks.items()}
    shares = boxes = None
    if dataset.task == "segmentation":
        empty, single, shares = class_findings(dataset.classes, maps)
    elif dataset.task == "detection":
        found = {split: [look.boxes for look in each if look.boxes is not None] for split, each in looks.items()}
        empty, single, boxes = box_findings(dataset.classes, found)
    else:
        empty, single = _class_problems(dataset.classes, splits)
    return CheckReport(
        name=dataset.name,
        num_images={split: len(source) for split, source in splits.items()},
        unreadable=tuple(unreadable),
        truncated=tuple(truncated),
        duplicates=tuple(duplicates),
        conflicting=tuple(conflicting),
        leakage=tuple(leakage),
        grey=tuple(grey),
        tiny=tuple(tiny),
        empty_classes=empty,
        one_image_classes=single,
        wrong_maps=None if shares is None else tuple(wrong_maps),
        pixels_percent=shares,
        wrong_boxes=None if boxes is None else tuple(wrong_boxes),
        boxes=boxes,
    )


def _distinct(splits: Mapping[str, Source]) -> dict[str, Source]:
    """The splits that hold samples of their own: not a test set that also serves for validation, nor its part."""
    if "all" in splits:  # Holding out a share of the same files leaks nothing that a check of all would not show.
        return {"all": splits["all"]}
    chosen: dict[str, Source] = {}
    # A whole source before its part, and a split under its own name before the role it plays.
    by_size = sorted(splits, key=lambda split: (isinstance(splits[split], SubsetSource), split == "val"))
    for split in by_size:
        source = splits[split]
        base = source.base if isinstance(source, SubsetSource) else source
        if all(base is not other for other in chosen.values()):
            chosen[split] = source
    return {split: chosen[split] for split in splits if split in chosen}


def _look_at_all(splits: Mapping[str, Source], progress: Callable[[int, int], None] | None) -> dict[str, list[_Look]]:
    total = sum(len(source) for source in splits.values())
    done = 0
    looks: dict[str, list[_Look]] = {}
    workers = min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        for split, source in splits.items():
            looks[split] = []
            for start in range(0, len(source), _PART * workers):
                stop = min(start + _PART * workers, len(source))
                parts = [range(first, min(first + _PART, stop)) for first in range(start, stop, _PART)]
                for part in pool.map(lambda part, source=source: [_look(source, index) for index in part], parts):
                    looks[split] += part
                    done += len(part)
                    if progress is not None:
                        progress(done, total)
    return looks


def _look(source: Source, index: int) -> _Look:
    if isinstance(source, SubsetSource):
        return _look(source.base, int(source.indices[index]))
    look = _look_at_image(source, index)
    if has_boxes(source):
        return replace(look, boxes=look_at_boxes(source, index))
    return replace(look, map=look_at_map(source, index)) if has_maps(source) else look


def _look_at_image(source: Source, index: int) -> _Look:
    digest = None
    try:
        read = getattr(source, "read", None)
        if read is None:
            image = source.load(index)
        else:
            content = read(index)
            digest = hashlib.sha256(content).digest()
            image = decode_rgb(content, name=source.name(index))
    except TruncatedImageError as error:
        return _Look(digest, str(error), truncated=True)
    except UnreadableImageError as error:
        return _Look(digest, str(error))
    if digest is None:
        digest = hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()
    return _Look(digest, grey=_is_grey(image), size=image.size)


def _is_grey(image: Image.Image) -> bool:
    pixels = np.asarray(image)
    # Most coloured images show it in one row; only the others are compared whole.
    middle = pixels[pixels.shape[0] // 2]
    return all(np.array_equal(part[..., 0], part[..., channel]) for part in (middle, pixels) for channel in (1, 2))


def _class_problems(classes: tuple[str, ...], splits: Mapping[str, Source]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Classes without an image in a split, and those with one in the split that is trained on."""
    empty: dict[str, None] = {}
    single: list[str] = []
    for split, source in splits.items():
        targets = targets_of(source)
        counts = np.bincount(targets[targets >= 0], minlength=len(classes))  # -1 has no label
        base = source.base if isinstance(source, SubsetSource) else source
        for name in getattr(base, "empty_classes", ()):
            empty[f"{split}: {name}"] = None
        for name, count in zip(classes, counts, strict=True):
            if not count:
                empty[f"{split}: {name}"] = None
            elif count == 1 and split in ("train", "all"):
                single.append(name)
    return tuple(empty), tuple(single)
