"""Views of a picture together with its map of classes.

As in :mod:`visionkd.data.transforms`, pictures may be PIL images or uint8 tensors from the memory cache, with the same
result to the bit, and all randomness comes from torch's default generator, which the loader sets anew for each sample.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from visionkd.config.schema import AugmentConfig
from visionkd.config.segmentation import SegmentationConfig
from visionkd.data.transforms import RESAMPLING, _size_of, _to_tensor, to_array, to_pil
from visionkd.runtime.preprocess import stretch
from visionkd.types import IGNORE, IMAGENET_MEAN, InputSpec

#: Pixels that the filters reach to each side of a place, in pixels of the coarser picture.
_REACH = {"nearest": 1.0, "bilinear": 1.0, "bicubic": 2.0, "lanczos": 3.0}
_FILL = tuple(round(255 * channel) for channel in IMAGENET_MEAN)


class DenseTrainTransform:
    """The random view of a training picture and its map: scale, crop, flip, colour jitter, in this order.

    A crop that reaches over the edge shows the mean colour there, and no label. Only the part of the picture that the
    crop shows is resized, with the same result, up to rounding, as if all of it were.

    Args:
        augment: ``hflip`` and ``color_jitter`` are used here.
        settings: Crop size and scale.
        img_size: The network's input, height and width in pixels.
        interpolation: Filter for the picture; the map takes nearest neighbours.
    """

    #: Called with a picture and its map.
    joint = True

    def __init__(
        self,
        augment: AugmentConfig,
        settings: SegmentationConfig,
        img_size: int | tuple[int, int],
        interpolation: str = "bilinear",
    ) -> None:
        img_size = _pair(img_size)
        #: Height and width of the views.
        self.img_size = img_size if settings.crop_size is None else _pair(settings.crop_size)
        #: Size that a factor of 1 stands for; None is each picture's own.
        self.base = img_size if settings.evaluation == "resize" else None
        self.scale = settings.scale
        self.hflip = augment.hflip
        self.interpolation = interpolation
        strength = augment.color_jitter
        # What a crop shows where there is no picture, and its map.
        colour = np.broadcast_to(np.array(_FILL, dtype=np.uint8), (*self.img_size, 3))
        self._blank = (colour.copy(), np.full(self.img_size, IGNORE, dtype=np.uint8))
        self.colour = v2.ColorJitter(brightness=strength, contrast=strength, saturation=strength) if strength else None

    def __call__(self, image: Image.Image | Tensor, target: np.ndarray) -> tuple[Tensor, Tensor]:
        """Draw a view.

        Args:
            image: RGB picture of any size.
            target: Its map of classes, uint8 H x W.

        Returns:
            uint8 tensors 3 x H x W and H x W, of the crop's size.
        """
        # Always four numbers, used or not: a view then does not change when another option is turned off.
        share, across, down, flip = torch.rand(4, dtype=torch.float64).tolist()
        size = _size_of(image)
        factor = self.scale[0] + share * (self.scale[1] - self.scale[0])
        full = [max(1, round(side * factor)) for side in self.base or size]
        rows, columns = (
            _window(whole, crop, chance)
            for whole, crop, chance in zip(full, self.img_size, (down, across), strict=True)
        )
        # The part that is seen, in pixels of the picture as it is.
        box = _box(size, full, rows, columns)
        shown = (columns[1] - columns[0], rows[1] - rows[0])
        view = _resized_part(image, box, shown, self.interpolation)
        labels = _resized_part(target, box, shown, "nearest")
        top, left = rows[0] - rows[2], columns[0] - columns[2]
        if self.colour is not None:
            view = self.colour(view)
        if flip < self.hflip:
            view, labels = (each.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for each in (view, labels))
            left = self.img_size[1] - left - shown[0]
        outside = shown != self.img_size[::-1]
        pixels, classes = (
            _padded(each, blank, top, left) if outside else np.array(each)
            for each, blank in zip((view, labels), self._blank, strict=True)
        )
        return torch.from_numpy(pixels).permute(2, 0, 1), torch.from_numpy(classes)


class DenseEvalTransform:
    """The one view of a picture at evaluation; its map stays as it is.

    Args:
        spec: The network's input.
        evaluation: ``resize`` brings the picture to the network's input size as a whole, as
            :func:`visionkd.runtime.preprocess.stretch` does on a device; ``native`` and ``slide`` leave it as it is.
    """

    joint = True

    def __init__(self, spec: InputSpec, evaluation: str = "resize") -> None:
        self.spec = spec
        self.img_size = tuple(spec.img_size)
        #: Whether pictures come in batches of one, each of its own size.
        self.native = evaluation != "resize"

    def __call__(self, image: Image.Image | Tensor, target: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return picture and map as uint8 tensors, 3 x H x W and, at the picture's own size, H x W."""
        pixels = to_array(image) if self.native else stretch(to_pil(image), self.spec)
        return _to_tensor(pixels), torch.from_numpy(np.array(target, order="C"))


def _padded(part: Image.Image, blank: np.ndarray, top: int, left: int) -> np.ndarray:
    out = blank.copy()
    out[top : top + part.height, left : left + part.width] = np.asarray(part)
    return out


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _window(whole: int, crop: int, chance: float) -> tuple[int, int, int]:
    """First and last place that a crop shows of a side, and where the crop begins, which may lie outside."""
    spare = whole - crop
    start = int(chance * (spare + 1)) if spare >= 0 else -int(chance * (1 - spare))
    return max(start, 0), min(start + crop, whole), start


def _box(
    size: tuple[int, int], full: list[int], rows: tuple[int, ...], columns: tuple[int, ...]
) -> tuple[float, float, float, float]:
    """Left, top, right and bottom, in pixels of a picture of ``size``, of a part of it as resized to ``full``."""
    down, across = size[0] / full[0], size[1] / full[1]
    return columns[0] * across, rows[0] * down, min(columns[1] * across, size[1]), min(rows[1] * down, size[0])


def _resized_part(
    picture: Image.Image | Tensor | np.ndarray, box: tuple[float, ...], shown: tuple[int, int], interpolation: str
) -> Image.Image:
    """Resize a part of a picture to ``shown``, width and height; the filter sees what lies around the part."""
    left, top, right, bottom = box
    reach_x, reach_y = (
        1 + math.ceil(_REACH[interpolation] * max(1.0, length / pixels))
        for length, pixels in ((right - left, shown[0]), (bottom - top, shown[1]))
    )
    if isinstance(picture, Tensor):
        picture = picture.permute(1, 2, 0).numpy()
    height, width = picture.shape[:2] if isinstance(picture, np.ndarray) else (picture.height, picture.width)
    x0, y0 = max(0, math.floor(left) - reach_x), max(0, math.floor(top) - reach_y)
    x1, y1 = min(width, math.ceil(right) + reach_x), min(height, math.ceil(bottom) + reach_y)
    if isinstance(picture, np.ndarray):
        part = Image.fromarray(np.ascontiguousarray(picture[y0:y1, x0:x1]))
    else:
        part = picture.crop((x0, y0, x1, y1))
    return part.resize(shown, RESAMPLING[interpolation], box=(left - x0, top - y0, right - x0, bottom - y0))
