"""Images with what networks said of them, side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from PIL import Image

from visionkd.errors import VisionKDError
from visionkd.report.pictures import picture_uri
from visionkd.report.text import shorten
from visionkd.runtime.draw import palette
from visionkd.types import IGNORE

WIDTH = 320
"""Largest width of a picture in pixels."""


@dataclass(frozen=True)
class Panel:
    """One picture of a row: its heading, and a data URI."""

    title: str
    image: str


@dataclass(frozen=True)
class Scene:
    """One image with what was said of it: its name, its own score in percent, the teacher's where there is one."""

    name: str
    score: float
    teacher_score: float | None
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class ColorKey:
    """A class and its colour as CSS."""

    name: str
    color: str


def color_keys(order: Iterable[int], names: Sequence[str]) -> list[ColorKey]:
    """Return the colours of some classes, by their indices."""
    colors = palette(len(names))
    return [ColorKey(shorten(names[i], 36), "#{:02x}{:02x}{:02x}".format(*colors[i % IGNORE])) for i in order]


def loaded(load: Callable[[int], Image.Image] | None, place: int, size: Sequence[int] | None) -> Image.Image | None:
    """Return a picture of the evaluation; None where it has gone, or has another width and height by now."""
    if load is None:
        return None
    try:
        picture = load(place).convert("RGB")
    except (VisionKDError, OSError, ValueError, IndexError):
        return None  # it has gone since it was evaluated; the answers still help
    return picture if size is None or picture.size == tuple(size) else None


def uri(picture: Image.Image, *, lossless: bool) -> str:
    """Return a data URI, no wider than :data:`WIDTH`."""
    if picture.width > WIDTH:
        size = (WIDTH, max(1, round(picture.height * WIDTH / picture.width)))
        picture = picture.resize(size, Image.Resampling.NEAREST if lossless else Image.Resampling.LANCZOS)
    return picture_uri(picture, quality=80, lossless=lossless, without_webp="PNG" if lossless else "JPEG")
