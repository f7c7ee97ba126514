"""What a report shows of segmentation networks: classes, mistakes, and the worst and best images with their maps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from visionkd.errors import VisionKDError
from visionkd.report import figures
from visionkd.report.analysis import Difference
from visionkd.report.pictures import picture_uri
from visionkd.report.svg import Picture
from visionkd.report.text import printable, shorten
from visionkd.runtime.draw import overlay, palette
from visionkd.runtime.metrics import class_iou, mean_iou
from visionkd.types import IGNORE

WIDTH = 320
"""Largest width of a picture in pixels."""
_RESAMPLES = 1000
_FEWEST_IMAGES = 10
_WRONG, _NO_LABEL = (208, 74, 30, 255), (140, 147, 155, 150)


@dataclass(frozen=True, eq=False)
class Segmentation:
    """Pixels of each class in the answers of networks, by role (``student``, ``teacher``, ``baseline``).

    Attributes:
        intersection: N x C pixels that label and answer share, of each image.
        union: N x C pixels of either.
        confusion: C x C pixels of the student's answers; rows are the labels.
        names: Sample names, N.
        pictured: Samples whose maps are there, the worst first, then the best.
        num_worst: How many of these are the worst ones.
        labels: Their labels, uint8 H x W.
        maps: What each network answered about them.
    """

    intersection: Mapping[str, np.ndarray]
    union: Mapping[str, np.ndarray]
    confusion: np.ndarray
    names: tuple[str, ...] = ()
    pictured: tuple[int, ...] = ()
    num_worst: int = 0
    labels: tuple[np.ndarray, ...] = ()
    maps: Mapping[str, tuple[np.ndarray, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.intersection["student"])

    @property
    def num_classes(self) -> int:
        return len(self.confusion)


@dataclass(frozen=True)
class Panel:
    """One picture of a row: its heading, and a data URI."""

    title: str
    image: str


@dataclass(frozen=True)
class Scene:
    """One image with what was said of it: its name, its mIoU, the same of the teacher where there is one."""

    name: str
    score: float
    teacher_score: float | None
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class ColorKey:
    """A class and its colour as CSS."""

    name: str
    color: str


def describe(
    found: Segmentation, *, classes: Sequence[str], load: Callable[[int], Image.Image] | None, student: str
) -> dict[str, Any]:
    """Return what the page shows, by the names that its template knows."""
    names = [printable(name) for name in classes]
    shares = {role: class_iou(found.intersection[role].sum(0), found.union[role].sum(0)) for role in found.intersection}
    pixels = found.confusion.sum(1)
    scenes = [_scene(number, found, load, student) for number in range(len(found.pictured))]
    shown = {int(v) for maps in (found.labels, *found.maps.values()) for each in maps for v in np.unique(each)}
    colors = palette(found.num_classes)
    order = [index for index in np.argsort(-pixels, kind="stable") if int(index) in shown]
    return {
        "classes": _bars(shares, pixels, names, student=student),
        "confusion": _confusion(found.confusion, names),
        "differences": [
            (other, gap) for other in ("teacher", "baseline") if (gap := paired_difference(found, other)) is not None
        ],
        "scenes": scenes,
        "num_worst": found.num_worst,
        "color_keys": [ColorKey(shorten(names[i], 36), "#{:02x}{:02x}{:02x}".format(*colors[i])) for i in order],
    }


def paired_difference(found: Segmentation, other: str) -> Difference | None:
    """Return the student's mIoU minus another network's with the 95 % interval over the choice of images.

    mIoU is no mean over images, so the interval is that of resampled sets of images. None where there is no such
    network, or too few images.
    """
    size = len(found)
    if other not in found.intersection or size < _FEWEST_IMAGES:
        return None
    draws = np.random.default_rng(0).multinomial(size, np.full(size, 1.0 / size), size=_RESAMPLES)

    def gain(weights: np.ndarray) -> float:
        first, second = (
            mean_iou(weights @ found.intersection[role], weights @ found.union[role]) for role in ("student", other)
        )
        return first - second

    gains = np.asarray([gain(weights) for weights in draws])
    low, high = np.nanpercentile(gains, (2.5, 97.5))
    return Difference(gain(np.ones(size, np.int64)), float(low), float(high))


def _bars(
    shares: Mapping[str, np.ndarray], pixels: np.ndarray, names: Sequence[str], *, student: str
) -> Picture | None:
    counts = np.where(np.isfinite(shares["student"]), np.maximum(pixels, 1), 0)
    caption = "Intersection over union of each class in percent, over all images together; the worst class first."
    return figures.class_bars(
        {role: np.nan_to_num(value) for role, value in shares.items()}, counts, names, student=student,
        label="Intersection over union of each class in percent", caption=caption, absent="occur in no image",
    )  # fmt: skip


def _confusion(matrix: np.ndarray, names: Sequence[str]) -> Picture | None:
    caption = (
        "Percent of the pixels of the class at the left that were given the class below. "
        "Blue: right. Orange: mistakes, on a scale of their own, the most frequent one strongest."
    )
    return figures.confusion_map(matrix, names, caption=caption)


def _scene(number: int, found: Segmentation, load: Callable[[int], Image.Image] | None, student: str) -> Scene:
    place = found.pictured[number]
    scores = {role: mean_iou(found.intersection[role][place], found.union[role][place]) for role in found.intersection}
    label, size = found.labels[number], found.num_classes
    picture = _picture(load, place, label.shape)
    drawn = [Panel("image", _uri(picture, lossless=False))] if picture is not None else []
    ground = picture if picture is not None else Image.new("RGB", label.shape[::-1], (255, 255, 255))
    drawn.append(Panel("label", _uri(overlay(ground, label, size), lossless=False)))
    for role, title in (("student", student.lower()), ("teacher", "teacher")):
        if role in found.maps:
            drawn.append(Panel(title, _uri(overlay(ground, found.maps[role][number], size), lossless=False)))
    drawn.append(Panel("errors", _uri(error_map(found.maps["student"][number], label), lossless=True)))
    name = printable(found.names[place]) if found.names else f"sample {place}"
    return Scene(name, scores["student"], scores.get("teacher"), tuple(drawn))


def error_map(given: np.ndarray, label: np.ndarray) -> Image.Image:
    """Return an RGBA picture of the pixels that are wrong (orange), without a label (grey), and right (clear)."""
    colors = np.zeros((*label.shape, 4), np.uint8)
    colors[given != label] = _WRONG
    colors[label == IGNORE] = _NO_LABEL
    return Image.fromarray(colors)


def _picture(load: Callable[[int], Image.Image] | None, place: int, shape: tuple[int, ...]) -> Image.Image | None:
    if load is None:
        return None
    try:
        picture = load(place).convert("RGB")
    except (VisionKDError, OSError, ValueError, IndexError):
        return None  # it has gone since it was evaluated; the maps still help
    return picture if picture.size == tuple(shape[::-1]) else None


def _uri(picture: Image.Image, *, lossless: bool) -> str:
    if picture.width > WIDTH:
        size = (WIDTH, max(1, round(picture.height * WIDTH / picture.width)))
        picture = picture.resize(size, Image.Resampling.NEAREST if lossless else Image.Resampling.LANCZOS)
    return picture_uri(picture, quality=80, lossless=lossless, without_webp="PNG" if lossless else "JPEG")
