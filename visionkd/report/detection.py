"""What a report shows of detectors: classes, precision and recall, and the worst and best images with their boxes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.ticker import FixedLocator
from PIL import Image, ImageDraw

from visionkd.report import figures
from visionkd.report.box_matches import Matches, match
from visionkd.report.scenes import WIDTH, Panel, Scene, color_keys, loaded, uri
from visionkd.report.svg import LegendItem, Picture, canvas, to_svg
from visionkd.report.text import printable, shorten
from visionkd.runtime.box_metrics import BoxPrecision, BoxSet
from visionkd.runtime.draw import palette
from visionkd.types import IGNORE

#: Images that are shown, and classes whose precision is drawn over the recall: the worst ones.
WORST, BEST, MOST_CURVES = 4, 2, 12
_MISSED, _WRONG, _RIGHT = (208, 74, 30), (130, 60, 170), (150, 156, 162)
_PAPER = (255, 255, 255)
_STYLES: dict[str, Any] = {"student": "-", "teacher": (0, (5, 2)), "baseline": (0, (1.2, 1.6))}


@dataclass(frozen=True, eq=False)
class Detection:
    """What networks found, by role (``student``, ``teacher``, ``baseline``).

    Attributes:
        precision: Precision at each recall.
        found: Boxes with scores of each image.
        truth: The true ones.
        num_classes: Number of classes.
        names: Sample names, N.
        novel: Classes without boxes in training.
    """

    precision: Mapping[str, BoxPrecision]
    found: Mapping[str, BoxSet]
    truth: BoxSet
    num_classes: int
    names: tuple[str, ...] = ()
    novel: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.truth)


def describe(
    found: Detection, *, classes: Sequence[str], load: Callable[[int], Image.Image] | None, student: str
) -> dict[str, Any]:
    """Return what the page shows, by the names that its template knows."""
    names = [f"{printable(name)} (novel)" if n in found.novel else printable(name) for n, name in enumerate(classes)]
    matches = {role: match(boxes, found.truth) for role, boxes in found.found.items()}
    scores = {role: each.best_score() for role, each in matches.items()}
    quality = {role: _image_scores(found, role, matches[role], scores[role]) for role in matches}
    pictured, num_worst = worst_and_best(quality["student"])
    shown = {int(label) for image in pictured for label in found.truth.labels[found.truth.of(image)]}
    shown |= {
        int(label)
        for role in found.found
        for image in pictured
        for label in found.found[role].labels[found.found[role].of(image)][_sure(found, role, image, scores[role])]
    }
    return {
        "classes": _bars(found, names, student=student),
        "precisions": precision_curves(found, names, student=student),
        "scenes": [_scene(image, found, matches, scores, quality, load, student) for image in pictured],
        "num_worst": num_worst,
        "color_keys": color_keys(sorted(shown), names),
        "scene_text": f"The images of which the {student.lower()} gets least and most right, by the F1 of the image"
        f" alone: boxes count from a score of {scores['student']:.2f} on, where the F1 of all images is best, and are"
        " right from an overlap of one half. In the last picture true boxes that were missed are orange, and boxes that"
        " are wrong violet.",
    }


def worst_and_best(quality: np.ndarray) -> tuple[tuple[int, ...], int]:
    """Return the images with the lowest scores, lowest first, then those with the highest, and how many the former are.

    Images with neither a true box nor one that was found have no score, NaN, and are none of these.
    """
    order = [int(index) for index in np.argsort(quality, kind="stable") if np.isfinite(quality[index])]
    pictured = min(len(order), WORST + BEST)
    worst = order[: max(pictured - BEST, min(1, pictured))]
    best = [index for index in reversed(order) if index not in worst][:BEST]
    return (*worst, *best), len(worst)


def precision_curves(found: Detection, names: Sequence[str], *, student: str) -> list[Picture]:
    """Draw precision over recall for each class at an overlap of one half, the class with the lowest AP50 first."""
    values = found.precision["student"].per_class(0.5)
    order = [int(index) for index in np.argsort(values, kind="stable") if np.isfinite(values[index])]
    titles = {"student": student, "teacher": "Teacher", "baseline": "Baseline"}
    legend = tuple(
        LegendItem(role, titles[role], "line" if role == "student" else "dashed") for role in titles
        if role in found.precision
    )  # fmt: skip
    pictures = []
    for number in order[:MOST_CURVES]:
        with canvas(*figures.PANEL) as figure:
            axes = figure.add_subplot()
            for role in titles:
                if role in found.precision:
                    curve = 100.0 * found.precision[role].precision[0, :, number]
                    recall = np.linspace(0.0, 100.0, len(curve))
                    axes.plot(recall, curve, color=figures.COLORS[role], linestyle=_STYLES[role])
            axes.set_xlim(0.0, 100.0)
            axes.set_ylim(0.0, 104.0)
            axes.set_xlabel("recall, %")
            axes.set_ylabel("precision, %")
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(FixedLocator([0, 25, 50, 75, 100]))
            svg = to_svg(figure, f"precision-{number}", f"Precision over recall of {names[number]}")
        title = f"{shorten(names[number], 30)}: AP50 {values[number]:.1f} %"
        pictures.append(Picture(svg, title, figures.PANEL_WIDTH, legend=legend if len(legend) > 1 else ()))
    return pictures


def _bars(found: Detection, names: Sequence[str], *, student: str) -> Picture | None:
    values = {role: each.per_class() for role, each in found.precision.items()}
    counts = np.bincount(found.truth.labels[~found.truth.crowd], minlength=found.num_classes)
    return figures.class_bars(
        {role: np.nan_to_num(value) for role, value in values.items()},
        np.where(np.isfinite(values["student"]), counts, 0), names, student=student,
        label="Average precision of each class in percent",
        caption="Average precision of each class in percent, over overlaps from 0.5 to 0.95; the worst class first.",
        absent="have no box in this split",
    )  # fmt: skip


def _sure(found: Detection, role: str, image: int, score: float) -> np.ndarray:
    """Return which boxes of an image a network is sure enough of."""
    return found.found[role].scores[found.found[role].of(image)] >= score


def _image_scores(found: Detection, role: str, matches: Matches, score: float) -> np.ndarray:
    """Return the F1 of each image in percent, N; NaN where there is nothing and nothing was found."""
    images, count = found.found[role].images(), len(found)
    sure = matches.scores >= score
    right = np.bincount(images[sure & (matches.taken >= 0)], minlength=count)
    wrong = np.bincount(images[sure & (matches.taken == -1)], minlength=count)
    true = np.bincount(found.truth.images()[~found.truth.crowd], minlength=count)
    total = right + wrong + true
    return np.where(total > 0, 200.0 * right / np.maximum(total, 1), np.nan)


def _scene(
    image: int,
    found: Detection,
    matches: Mapping[str, Matches],
    scores: Mapping[str, float],
    quality: Mapping[str, np.ndarray],
    load: Callable[[int], Image.Image] | None,
    student: str,
) -> Scene:
    picture = loaded(load, image, None)
    known = found.truth.of(image)
    panels = [Panel("image", uri(picture, lossless=False))] if picture is not None else []
    if picture is None:
        given = [each.boxes[each.of(image)] for each in found.found.values()]
        edges = np.concatenate([found.truth.boxes[known], *given])
        width, height = (max(1, int(np.ceil(side))) for side in edges[:, 2:].max(0, initial=1.0))
        picture = Image.new("RGB", (width, height), _PAPER)
    factor = min(1.0, 2.0 * WIDTH / picture.width)  # lines are as thick as they look
    ground = picture.resize((max(1, round(picture.width * factor)), max(1, round(picture.height * factor))))
    colors = palette(found.num_classes)
    truth = [(box, tuple(map(int, colors[label % IGNORE]))) for box, label in zip(
        found.truth.boxes[known], found.truth.labels[known].tolist(), strict=True
    )]  # fmt: skip
    panels.append(Panel("truth", _drawn(ground, truth, factor)))
    for role, title in (("student", student.lower()), ("teacher", "teacher")):
        if role in found.found:
            own, sure = found.found[role].of(image), _sure(found, role, image, scores[role])
            boxes, labels = found.found[role].boxes[own][sure], found.found[role].labels[own][sure]
            drawn = [(box, tuple(map(int, colors[label % IGNORE]))) for box, label in zip(boxes, labels, strict=True)]
            panels.append(Panel(title, _drawn(ground, drawn, factor)))
    panels.append(Panel("errors", _drawn(ground, _errors(image, found, matches["student"], scores["student"]), factor)))
    name = printable(found.names[image]) if found.names else f"sample {image}"
    theirs = float(quality["teacher"][image]) if "teacher" in quality else None
    return Scene(name, float(quality["student"][image]), theirs, tuple(panels))


def _errors(image: int, found: Detection, matches: Matches, score: float) -> list[tuple[np.ndarray, tuple[int, ...]]]:
    """Return what the student missed, and what it found where there is nothing; what is right lies below in grey."""
    own, known = found.found["student"].of(image), found.truth.of(image)
    sure = np.flatnonzero(matches.scores[own] >= score) + own.start
    taken = set(matches.taken[sure].tolist())
    boxes = found.found["student"].boxes
    right = [(boxes[row], _RIGHT) for row in sure if matches.taken[row] >= 0]
    wrong = [(boxes[row], _WRONG) for row in sure if matches.taken[row] == -1]
    missed = [
        (found.truth.boxes[row], _MISSED)
        for row in range(known.start, known.stop)
        if row not in taken and not found.truth.crowd[row]
    ]
    return [*right, *wrong, *missed]


def _drawn(ground: Image.Image, boxes: Sequence[tuple[np.ndarray, tuple[int, ...]]], factor: float) -> str:
    """Return a picture with boxes around it as a data URI."""
    canvas_ = ground.copy()
    draw = ImageDraw.Draw(canvas_)
    width = max(2, round(min(ground.size) / 110))
    for box, color in boxes:
        left, top, right, bottom = (float(value) * factor for value in box)
        draw.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=color, width=width)
    return uri(canvas_, lossless=False)
