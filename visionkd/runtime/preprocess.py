"""The one view of an image at evaluation, in Pillow and numpy: training's evaluation and a device share it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from visionkd.errors import RequestError
from visionkd.types import InputSpec

RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def preprocess(image: Image.Image, spec: InputSpec) -> np.ndarray:
    """Resize the shorter side to ``floor(size / crop_pct)`` and cut out the centre (timm's rule).

    Args:
        image: RGB image of any size.
        spec: The network's input.

    Returns:
        uint8 array H x W x 3.
    """
    if spec.interpolation not in RESAMPLING:
        raise RequestError(f"unknown interpolation '{spec.interpolation}'; known: {', '.join(RESAMPLING)}")
    height, width = spec.img_size
    size = _resized_size(image.width, image.height, spec)
    if size != image.size:
        # Pillow widens its filter when it shrinks an image: this is what torchvision calls antialias.
        image = image.resize(size, RESAMPLING[spec.interpolation])
    array = np.asarray(image)
    if array.shape[:2] == (height, width):
        return array
    pad_y, pad_x = max(height - array.shape[0], 0), max(width - array.shape[1], 0)
    if pad_y or pad_x:
        before_y, before_x = pad_y // 2, pad_x // 2
        array = np.pad(array, ((before_y, pad_y - before_y), (before_x, pad_x - before_x), (0, 0)))
    # Rounded to even at halves, as torchvision's centre crop does.
    top, left = round((array.shape[0] - height) / 2.0), round((array.shape[1] - width) / 2.0)
    return array[top : top + height, left : left + width]


def stretch(image: Image.Image, spec: InputSpec) -> np.ndarray:
    """Resize an image to the network's input as a whole: every pixel of it is asked about, none is cut off.

    Args:
        image: RGB image of any size.
        spec: The network's input; ``crop_pct`` does not matter.

    Returns:
        uint8 array H x W x 3.
    """
    if spec.interpolation not in RESAMPLING:
        raise RequestError(f"unknown interpolation '{spec.interpolation}'; known: {', '.join(RESAMPLING)}")
    height, width = spec.img_size
    if image.size != (width, height):
        image = image.resize((width, height), RESAMPLING[spec.interpolation])
    return np.asarray(image)


def letterbox(image: Image.Image, spec: InputSpec) -> tuple[np.ndarray, float]:
    """Resize an image so that all of it fits the network's input, and fill up with the network's mean colour.

    The picture lies at the upper left and keeps its proportions; what is filled up is about 0 once the network has
    normalised it.

    Args:
        image: RGB image of any size.
        spec: The network's input; ``crop_pct`` does not matter.

    Returns:
        uint8 array H x W x 3, and how many pixels of it a pixel of the image became: a box in the array, divided by
        this, is a box in the image.
    """
    if spec.interpolation not in RESAMPLING:
        raise RequestError(f"unknown interpolation '{spec.interpolation}'; known: {', '.join(RESAMPLING)}")
    height, width = spec.img_size
    scale = min(height / image.height, width / image.width)
    size = (min(width, max(1, round(image.width * scale))), min(height, max(1, round(image.height * scale))))
    if size != image.size:
        image = image.resize(size, RESAMPLING[spec.interpolation])
    array = np.empty((height, width, 3), np.uint8)
    array[:] = fill_colour(spec)
    array[: size[1], : size[0]] = np.asarray(image)
    return array, scale


def fill_colour(spec: InputSpec) -> np.ndarray:
    """Return the colour that a letterbox is filled up with, uint8 of 3: the mean that the network takes off."""
    return np.array([round(255.0 * value) for value in spec.mean[:3]], np.uint8)


def _resized_size(image_width: int, image_height: int, spec: InputSpec) -> tuple[int, int]:
    """Width and height after resizing."""
    height, width = (math.floor(side / spec.crop_pct) for side in spec.img_size)
    if height == width:
        short, long = sorted((image_width, image_height))
        longer = int(height * long / short)
        return (height, longer) if image_width <= image_height else (longer, height)
    ratio = min(image_height / height, image_width / width)
    return round(image_width / ratio), round(image_height / ratio)


def to_batch(images: Sequence[np.ndarray]) -> np.ndarray:
    """Return float32 N x 3 x H x W in [0, 1] from uint8 arrays H x W x 3."""
    return np.stack(images).transpose(0, 3, 1, 2).astype(np.float32, order="C") / np.float32(255.0)
