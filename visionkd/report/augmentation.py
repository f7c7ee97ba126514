"""What a learned augmentation did over the training: its pictures, its parameters, and the turns of the game."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image

from visionkd.report.data import Curve, Curves
from visionkd.report.figures import PANEL, PANEL_WIDTH, thin, tick
from visionkd.report.pictures import picture_uri
from visionkd.report.svg import MUTED, STUDENT, TEACHER, LegendItem, Picture, canvas, to_svg
from visionkd.report.text import MINUS, NBSP

_TEXT_KEY = "augmentation"
_SMALL = 48
"""Pixels of a picture below which it is kept without loss and shown with square pixels."""


@dataclass(frozen=True, eq=False)
class Moment:
    """The same images, augmented as the augmentor did it at one moment of the training.

    Attributes:
        epoch: Time in epochs.
        clean: The images side by side.
        augmented: The same ones, augmented.
        count: How many.
        student: Class that the student names for each augmented image.
        teacher: Class that the teachers name.
        parameters: What was learned by then, ``{name: {"mean": ..., "std": ...}}``; ``std`` where there is a spread.
    """

    epoch: float
    clean: Image.Image
    augmented: Image.Image
    count: int
    student: tuple[int, ...]
    teacher: tuple[int, ...]
    parameters: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Strip:
    """A row of pictures, ready to print."""

    title: str
    note: str
    image: str
    pixelated: bool


def read_moments(directory: Path) -> tuple[Moment, ...]:
    """Return what a run kept in ``directory``, in order; files that are not of this kind are left out."""
    found = []
    for path in sorted(directory.glob("step_*.png")):
        try:
            with Image.open(path) as file:
                facts, strip = json.loads(file.text[_TEXT_KEY]), file.convert("RGB")  # type: ignore[attr-defined]
            half = strip.height // 2
            found.append(
                Moment(
                    epoch=float(facts["epoch"]),
                    clean=strip.crop((0, 0, strip.width, half)),
                    augmented=strip.crop((0, half, strip.width, 2 * half)),
                    count=int(facts["images"]),
                    student=tuple(facts["student"]),
                    teacher=tuple(facts["teacher"]),
                    parameters=facts["parameters"],
                )
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return tuple(sorted(found, key=lambda moment: moment.epoch))


def strips(moments: Sequence[Moment]) -> list[Strip]:
    """Return the clean images and below them each moment's."""
    if not moments:
        return []
    rows = [_strip("Clean", "", moments[0].clean, moments[0].count)]
    for moment in moments:
        same = sum(s == t for s, t in zip(moment.student, moment.teacher, strict=False))
        note = f"both agree on {same} of {moment.count}"
        rows.append(_strip(f"Epoch {tick(round(moment.epoch, 2))}", note, moment.augmented, moment.count))
    return rows


def _strip(title: str, note: str, image: Image.Image, count: int) -> Strip:
    small = image.width // max(1, count) <= _SMALL
    data = picture_uri(image, quality=80, lossless=small, without_webp="PNG")
    return Strip(title, note, data, small)


def parameter_rows(moments: Sequence[Moment]) -> list[tuple[str, str, str]]:
    """Return each parameter's name, and its mean and spread at the first moment and at the last one."""
    if not moments:
        return []
    first, last = moments[0].parameters, moments[-1].parameters
    return [(name, _spread(first.get(name, {})), _spread(values)) for name, values in last.items()]


def _spread(values: Mapping[str, float]) -> str:
    if "mean" not in values:
        return ""
    if "std" in values:
        return f"{_number(values['mean'])} ±{NBSP}{_number(values['std'])}"
    mean = values["mean"]
    return _number(mean) if abs(mean) >= 0.05 or mean == 0 else f"{mean:.2g}".replace("-", MINUS)


def _number(value: float) -> str:
    text = f"{value:.1f}"
    return (text if float(text) else "0.0").replace("-", MINUS)


def turn_pictures(curves: Curves | None) -> list[Picture]:
    """Draw the agreement with the teacher, both divergences, and the share of augmentor steps, over the epochs."""
    if curves is None or curves.get("augmentor_steps", "train") is None:
        return []
    panels: list[tuple[str, str, list[tuple[str, str, LegendItem, dict[str, Any]]], float]] = [
        (
            "turns-agreement",
            "Agreement with the teacher, %",
            [
                ("agreement", STUDENT, LegendItem("student", "on augmented images"), {}),
                ("clean_agreement", TEACHER, LegendItem("teacher", "on clean images", "dashed"), {"linestyle": "--"}),
            ],
            100.0,
        ),
        (
            "turns-divergence",
            "Divergence in the augmentor's turns",
            [
                ("disagreement", STUDENT, LegendItem("student", "student from teacher"), {}),
                (
                    "teacher_consistency",
                    TEACHER,
                    LegendItem("teacher", "teacher from its answer to the clean image", "dashed"),
                    {"linestyle": "--"},
                ),
            ],
            1.0,
        ),
        (
            "turns-share",
            "The augmentor's share of the steps, %",
            [("augmentor_steps", MUTED, LegendItem("student", ""), {"drawstyle": "steps-pre"})],
            100.0,
        ),
    ]
    pictures = []
    for key, title, lines, scale in panels:
        drawn = [(curves.get(name, "train"), color, item, style) for name, color, item, style in lines]
        drawn = [(_scaled(thin(curve), scale), *rest) for curve, *rest in drawn if curve is not None]
        if not any(len(curve.values) > 1 for curve, *_ in drawn):
            continue
        with canvas(*PANEL) as figure:
            axes = figure.add_subplot()
            for curve, color, _, style in drawn:
                axes.plot(curve.epochs, curve.values, color=color, **style)
            axes.set_xlabel("epoch")
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            axes.yaxis.set_major_locator(MaxNLocator(5))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
            axes.grid(visible=False, axis="x")
            largest = max(float(np.max(curve.values)) for curve, *_ in drawn)
            axes.set_ylim(0.0, 104.0 if scale == 100.0 else 1.08 * max(largest, 1e-6))
            svg = to_svg(figure, key, f"{title} over the epochs")
        legend = tuple(item for _, _, item, _ in drawn) if len(lines) > 1 else ()
        pictures.append(Picture(svg, title, PANEL_WIDTH, legend=legend))
    return pictures


def _scaled(curve: Curve, scale: float) -> Curve:
    return Curve(curve.epochs, scale * curve.values)
