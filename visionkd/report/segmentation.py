"""What a report shows of segmentation networks: classes, mistakes, and the worst and best images with their maps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from visionkd.report import figures
from visionkd.report.analysis import Difference
from visionkd.report.scenes import Panel, Scene, color_keys, loaded, uri
from visionkd.report.svg import Picture
from visionkd.report.text import printable
from visionkd.runtime.draw import overlay
from visionkd.runtime.metrics import class_iou, mean_iou
from visionkd.types import IGNORE

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


def describe(
    found: Segmentation, *, classes: Sequence[str], load: Callable[[int], Image.Image] | None, student: str
) -> dict[str, Any]:
    """Return what the page shows, by the names that its template knows."""
    names = [printable(name) for name in classes]
    shares = {role: class_iou(found.intersection[role].sum(0), found.union[role].sum(0)) for role in found.intersection}
    pixels = found.confusion.sum(1)
    scenes = [_scene(number, found, load, student) for number in range(len(found.pictured))]
    shown = {int(v) for maps in (found.labels, *found.maps.values()) for each in maps for v in np.unique(each)}
    order = [index for index in np.argsort(-pixels, kind="stable") if int(index) in shown]
    return {
        "classes": _bars(shares, pixels, names, student=student),
        "confusion": _confusion(found.confusion, names),
        "differences": [
            (other, gap) for other in ("teacher", "baseline") if (gap := paired_difference(found, other)) is not None
        ],
        "scenes": scenes,
        "num_worst": found.num_worst,
        "color_keys": color_keys(order, names),
        "scene_text": f"The images of which the {student.lower()} gets least and most right, by the mIoU of the image"
        " alone. In the last picture wrong pixels are orange; grey ones have no label.",
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
    picture = loaded(load, place, label.shape[::-1])
    drawn = [Panel("image", uri(picture, lossless=False))] if picture is not None else []
    ground = picture if picture is not None else Image.new("RGB", label.shape[::-1], (255, 255, 255))
    drawn.append(Panel("label", uri(overlay(ground, label, size), lossless=False)))
    for role, title in (("student", student.lower()), ("teacher", "teacher")):
        if role in found.maps:
            drawn.append(Panel(title, uri(overlay(ground, found.maps[role][number], size), lossless=False)))
    drawn.append(Panel("errors", uri(error_map(found.maps["student"][number], label), lossless=True)))
    name = printable(found.names[place]) if found.names else f"sample {place}"
    return Scene(name, scores["student"], scores.get("teacher"), tuple(drawn))


def error_map(given: np.ndarray, label: np.ndarray) -> Image.Image:
    """Return an RGBA picture of the pixels that are wrong (orange), without a label (grey), and right (clear)."""
    colors = np.zeros((*label.shape, 4), np.uint8)
    colors[given != label] = _WRONG
    colors[label == IGNORE] = _NO_LABEL
    return Image.fromarray(colors)
