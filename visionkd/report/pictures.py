"""Photographs inside a page."""

from __future__ import annotations

import base64
import io

from PIL import Image


def picture_uri(image: Image.Image, *, quality: int, lossless: bool, without_webp: str = "JPEG") -> str:
    """Return a picture as a data URI.

    Args:
        image: RGB.
        quality: Of WebP, up to 100; how hard to try, where it is ``lossless``.
        lossless: Keep every pixel.
        without_webp: Format where Pillow was built without WebP.
    """
    out = io.BytesIO()
    try:
        image.save(out, "WEBP", quality=quality, lossless=lossless, method=4)
        kind = "webp"
    except (OSError, KeyError):
        out, kind = io.BytesIO(), without_webp.lower()
        image.save(out, without_webp, quality=85)
    return f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}"
