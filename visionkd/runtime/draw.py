"""Draw predictions on pictures."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_SHORTEST_PX = 256  # small pictures are enlarged, so that there is room for words


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
    canvas = Image.new("RGB", (image.width, image.height + line * len(labels) + margin), (24, 24, 27))
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


def _fitting(text: str, draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont, width: float) -> str:
    while len(text) > 1 and draw.textlength(text, font=font) > width:
        text = f"{text[:-2]}…"
    return text
