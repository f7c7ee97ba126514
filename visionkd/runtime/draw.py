"""Draw predictions on pictures."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from visionkd.types import IGNORE

_SHORTEST_PX = 256  # small pictures are enlarged, so that there is room for words
_STRIP = (24, 24, 27)
_OPACITY = 0.55
# Hues that are told apart at a glance, in an order that keeps neighbours different; then the same, darker and paler.
_HUES = (0.58, 0.09, 0.36, 0.98, 0.78, 0.16, 0.50, 0.88, 0.26, 0.68)
_LEVELS = ((0.55, 0.72), (0.36, 0.62), (0.74, 0.62), (0.46, 0.30), (0.66, 0.95), (0.25, 0.80))
_NO_LABEL = (128, 128, 128)


def draw_labels(image: Image.Image, labels: Sequence[tuple[str, float]]) -> Image.Image:
    """Return a copy of ``image`` with class names and probabilities in a strip below it.

    Args:
        image: RGB picture.
        labels: Names and probabilities in [0, 1], most probable first.
    """
    factor = max(1, round(_SHORTEST_PX / max(1, min(image.size))))
    if factor > 1:
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    size = max(13, round(min(image.size) / 22))
    font = ImageFont.load_default(size)
    line, margin = round(size * 1.5), size // 2
    canvas = Image.new("RGB", (image.width, image.height + line * len(labels) + margin), _STRIP)
    canvas.paste(image)
    draw = ImageDraw.Draw(canvas)
    for number, (name, probability) in enumerate(labels):
        top = image.height + margin // 2 + number * line
        share = f"{100 * probability:.1f} %"
        right = image.width - margin - draw.textlength(share, font=font)
        draw.rectangle((0, top, round(image.width * probability), top + line - 3), fill=(30, 84, 150))
        draw.text((margin, top + 1), _fitting(name, draw, font, right - 2 * margin), fill="white", font=font)
        draw.text((right, top + 1), share, fill="white", font=font)
    return canvas


def palette(num_classes: int) -> np.ndarray:
    """Return a colour for each value of a map of classes, uint8 256 x 3; pixels without a label are grey.

    The colour of a class depends on its index alone.
    """
    colors = np.full((256, 3), _NO_LABEL, np.uint8)
    for index in range(min(num_classes, IGNORE)):
        turn, place = divmod(index, len(_HUES))
        lightness, saturation = _LEVELS[turn % len(_LEVELS)]
        shift = 0.05 * (turn // len(_LEVELS))
        colors[index] = [round(255 * part) for part in colorsys.hls_to_rgb(_HUES[place] + shift, lightness, saturation)]
    return colors


def map_picture(classes: np.ndarray, num_classes: int) -> Image.Image:
    """Return a map of classes, uint8 H x W, as a palette picture: its values are the classes, its colours theirs."""
    values = np.ascontiguousarray(classes, dtype=np.uint8)
    picture = Image.frombytes("P", values.shape[::-1], values.tobytes())
    picture.putpalette(palette(num_classes).reshape(-1).tolist())
    return picture


def overlay(image: Image.Image, classes: np.ndarray, num_classes: int) -> Image.Image:
    """Return ``image``, RGB, with the colour of each pixel's class laid over it, and edges where classes meet.

    Args:
        image: RGB picture.
        classes: Class of each pixel, uint8 H x W of the same size; 255 leaves the pixel as it is.
        num_classes: Number of classes.
    """
    pixels, labels = np.asarray(image, np.float32), np.asarray(classes, np.uint8)
    if labels.shape != pixels.shape[:2]:
        raise ValueError(f"a map of {labels.shape} pixels for a picture of {pixels.shape[:2]}")
    weight = np.where(labels == IGNORE, 0.0, _OPACITY).astype(np.float32)
    weight[_edges(labels)] = 0.9
    weight[labels == IGNORE] = 0.0
    weight = weight[..., None]
    mixed = (1.0 - weight) * pixels + weight * palette(num_classes)[labels]
    return Image.fromarray(np.round(mixed).astype(np.uint8))


def draw_map(image: Image.Image, classes: np.ndarray, names: Sequence[str]) -> Image.Image:
    """Return an overlay of ``classes`` on ``image`` with a legend of the classes on it below, the largest first.

    Args:
        image: RGB picture.
        classes: Class of each pixel, uint8 H x W of the same size.
        names: Name of each class.
    """
    shares = class_shares(classes, len(names))
    picture = overlay(image, classes, len(names))
    factor = max(1, round(_SHORTEST_PX / max(1, min(picture.size))))
    if factor > 1:
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    size = max(13, round(min(picture.size) / 28))
    font = ImageFont.load_default(size)
    line, margin, box = round(size * 1.5), size // 2, round(size * 0.85)
    colors = palette(len(names))
    measure = ImageDraw.Draw(picture)
    texts = [f"{names[index]} {share:.1f} %" if share >= 0.1 else f"{names[index]} < 0.1 %" for index, share in shares]
    widest = max((measure.textlength(text, font=font) for text in texts), default=0)
    columns = max(1, int(picture.width // (widest + box + 3 * margin)))
    rows = -(-len(shares) // columns)
    canvas = Image.new("RGB", (picture.width, picture.height + line * rows + margin), _STRIP)
    canvas.paste(picture)
    draw = ImageDraw.Draw(canvas)
    width = picture.width / columns
    for number, ((index, _), text) in enumerate(zip(shares, texts, strict=True)):
        left, top = margin + (number // rows) * width, picture.height + margin // 2 + (number % rows) * line
        draw.rectangle((left, top + 3, left + box, top + 3 + box), fill=tuple(map(int, colors[index])))
        room = width - box - 2.5 * margin
        draw.text((left + box + margin, top + 1), _fitting(text, draw, font, room), fill="white", font=font)
    return canvas


def draw_boxes(
    image: Image.Image, boxes: np.ndarray, labels: Sequence[int], scores: Sequence[float], names: Sequence[str]
) -> Image.Image:
    """Return a copy of ``image`` with boxes in the colours of their classes, each with its class and score.

    Args:
        image: RGB picture.
        boxes: N x 4: left, top, right, bottom in its pixels.
        labels: Class indices, N.
        scores: From 0 to 1, N; the highest is drawn last, on top of the others. Empty for boxes that are known.
        names: Name of each class.
    """
    factor = max(1, round(_SHORTEST_PX / max(1, min(image.size))))
    size = (image.width * factor, image.height * factor)
    picture = image.resize(size, Image.Resampling.NEAREST) if factor > 1 else image.copy()
    height = max(12, round(min(size) / 30))
    font, line = ImageFont.load_default(height), max(2, round(min(size) / 200))
    draw, colors = ImageDraw.Draw(picture), palette(len(names))
    known = len(scores) == len(labels)
    for number in sorted(range(len(labels)), key=lambda each: scores[each] if known else 0.0):
        color = tuple(map(int, colors[labels[number]]))
        left, top, right, bottom = (float(side) * factor for side in boxes[number])
        draw.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=color, width=line)
        text = f"{names[labels[number]]} {scores[number]:.2f}" if known else str(names[labels[number]])
        text = _fitting(text, draw, font, size[0] - 2 * line)
        width = draw.textlength(text, font=font) + 2 * line
        above = top - 1.3 * height if top >= 1.3 * height else top  # inside where there is no room above
        start = min(left, size[0] - width)
        draw.rectangle((start, above, start + width, above + 1.3 * height), fill=color)
        dark = sum(share * part for share, part in zip((0.299, 0.587, 0.114), color, strict=True)) < 140
        draw.text((start + line, above), text, fill="white" if dark else "black", font=font)
    return picture


def class_shares(classes: np.ndarray, num_classes: int) -> list[tuple[int, float]]:
    """Return the classes of a map and the percent of its pixels that each has, the largest first."""
    counts = np.bincount(np.asarray(classes).reshape(-1), minlength=256)[:num_classes]
    total = max(1, int(counts.sum()))
    order = np.argsort(-counts, kind="stable")
    return [(int(index), 100.0 * int(counts[index]) / total) for index in order if counts[index]]


def _edges(labels: np.ndarray) -> np.ndarray:
    """Whether the pixel to the right or below is of another class."""
    found = np.zeros(labels.shape, bool)
    found[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    found[:-1] |= labels[:-1] != labels[1:]
    return found


def _fitting(text: str, draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont, width: float) -> str:
    while len(text) > 1 and draw.textlength(text, font=font) > width:
        text = f"{text[:-2]}…"
    return text
