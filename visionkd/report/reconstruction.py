"""What a masked autoencoder sees of images and makes of them: three rows of pictures."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from visionkd.report.augmentation import Strip
from visionkd.report.pictures import picture_uri

_TEXT_KEY = "reconstructions"
_SMALL = 48
"""Pixels of a picture below which it is kept without loss and shown with square pixels."""
_TITLES = ("Images", "What the encoder sees", "Removed patches as the decoder fills them in")


@dataclass(frozen=True)
class Reconstructions:
    """The rows, ready to print, and what to say about them."""

    strips: tuple[Strip, ...]
    caption: str


def read_reconstructions(path: Path | None) -> Reconstructions | None:
    """Return what a run kept in ``path``; None where there is no such picture."""
    if path is None:
        return None
    try:
        with Image.open(path) as file:
            facts, picture = json.loads(file.text[_TEXT_KEY]), file.convert("RGB")  # type: ignore[attr-defined]
        count, kept, total = int(facts["images"]), int(facts["kept"]), int(facts["patches"])
        epoch, normalized = int(facts["epoch"]), bool(facts["normalized"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    height, small = picture.height // 3, picture.width // max(1, count) <= _SMALL
    strips = []
    for number, title in enumerate(_TITLES):
        row = picture.crop((0, number * height, picture.width, (number + 1) * height))
        strips.append(Strip(title, "", picture_uri(row, quality=80, lossless=small, without_webp="PNG"), small))
    caption = f"Validation images after epoch {epoch}; {kept} of {total} patches are kept."
    if normalized:
        caption += " Mean and spread of each removed patch are the image's own: only what remains is predicted."
    return Reconstructions(tuple(strips), caption)
