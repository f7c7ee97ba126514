"""From a decoded image to the tensor that a batch is made of.

Transforms take a PIL image or, from the memory cache, a uint8 tensor C x H x W, and do the same arithmetic on both, so
that caching changes no pixel. All randomness comes from torch's default generator, which the loader sets anew for each
sample.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from visionkd.config.schema import AugmentConfig
from visionkd.runtime.preprocess import preprocess
from visionkd.types import InputSpec

RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_SMALL = 64
_ASPECT = (math.log(3 / 4), math.log(4 / 3))
_ERASED_AREA = (0.02, 0.33)
_ERASED_ASPECT = (math.log(0.3), math.log(3.3))
_TRIES = 10


def to_pil(image: Image.Image | Tensor) -> Image.Image:
    """Return a PIL image, from one or from a uint8 tensor 3 x H x W."""
    return image if isinstance(image, Image.Image) else Image.fromarray(to_array(image))


def to_array(image: Image.Image | Tensor) -> np.ndarray:
    """Return a uint8 array H x W x 3, from a PIL image or a uint8 tensor 3 x H x W."""
    return np.asarray(image) if isinstance(image, Image.Image) else image.permute(1, 2, 0).numpy()


def _size_of(image: Image.Image | Tensor) -> tuple[int, int]:
    """Height and width in pixels."""
    return (image.height, image.width) if isinstance(image, Image.Image) else (image.shape[1], image.shape[2])


def _to_tensor(array: np.ndarray) -> Tensor:
    """3 x H x W in channels-last memory: no transposition here, and none before a convolution."""
    return torch.from_numpy(np.array(array, order="C")).permute(2, 0, 1)


def resized_crop(
    image: Image.Image, box: tuple[int, int, int, int], *, img_size: tuple[int, int], resample: Image.Resampling
) -> Image.Image:
    """Cut out a part and resize it; nothing outside of the part takes part in the resampling.

    Args:
        image: RGB image.
        box: Left, top, width and height in pixels.
        img_size: Height and width of the result.
        resample: Filter.
    """
    left, top, width, height = box
    part = image.crop((left, top, left + width, top + height))
    return part.resize((img_size[1], img_size[0]), resample)


def pixel_box(fractions: tuple[float, float, float, float], *, height: int, width: int) -> tuple[int, int, int, int]:
    """Return left, top, width and height in pixels of a box whose top, left, height and width are shares of an image.

    FKD stores its views in this form (Shen and Xing, ECCV 2022, arXiv 2112.01528).
    """
    top, left, box_height, box_width = fractions
    return round(left * width), round(top * height), round(box_width * width), round(box_height * height)


class TrainTransform:
    """The random view of a training image: crop, flip, RandAugment, colour jitter, erasing, in this order.

    Args:
        augment: What to draw.
        img_size: Height and width in pixels, or one number for both.
        interpolation: ``bilinear``, ``bicubic`` or ``nearest``.
    """

    def __init__(
        self, augment: AugmentConfig, img_size: int | tuple[int, int], interpolation: str = "bilinear"
    ) -> None:
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        self.crop = augment.crop or ("padded" if max(self.img_size) <= _SMALL else "resized")
        self.scale = augment.scale
        self.hflip = augment.hflip
        self.padding = min(self.img_size) // 8 if augment.padding is None else augment.padding
        # A window further out than its own size would see padding only.
        self.padding = min(self.padding, min(self.img_size) - 1) if self.crop == "padded" else 0
        self.random_erasing = augment.random_erasing
        self.resample = RESAMPLING[interpolation]
        colour: list[v2.Transform] = []
        if augment.randaugment_ops:
            colour.append(
                v2.RandAugment(
                    num_ops=augment.randaugment_ops,
                    magnitude=augment.randaugment_magnitude,
                    interpolation=v2.InterpolationMode.BILINEAR,
                )
            )
        if augment.color_jitter:
            strength = augment.color_jitter
            colour.append(v2.ColorJitter(brightness=strength, contrast=strength, saturation=strength))
        self.colour = tuple(colour)

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        """Draw a view.

        Args:
            image: RGB image of any size.

        Returns:
            uint8 tensor 3 x H x W.
        """
        # Always four numbers, used or not: a view then does not change when another option is turned off.
        across, down, flip, erase = torch.rand(4, dtype=torch.float64).tolist()
        array = self._resized(image) if self.crop == "resized" else self._shifted(image, across, down)
        if flip < self.hflip:
            array = array[:, ::-1]
        if self.colour:
            view = Image.fromarray(np.ascontiguousarray(array))
            for transform in self.colour:
                view = transform(view)
            array = np.asarray(view)
        out = _to_tensor(array)
        if erase < self.random_erasing:
            _erase(out)
        return out

    def _resized(self, image: Image.Image | Tensor) -> np.ndarray:
        height, width = _size_of(image)
        box = _random_box(height, width, self.scale)
        return np.asarray(resized_crop(to_pil(image), box, img_size=self.img_size, resample=self.resample))

    def _shifted(self, image: Image.Image | Tensor, across: float, down: float) -> np.ndarray:
        """Resize until the image covers the output, then take a window, at random where there is padding."""
        height, width = _size_of(image)
        out_height, out_width = self.img_size
        ratio = max(out_height / height, out_width / width)
        if ratio != 1.0:
            height, width = max(out_height, round(height * ratio)), max(out_width, round(width * ratio))
            image = to_pil(image).resize((width, height), self.resample)
        array = to_array(image)
        pad = self.padding
        if not pad:
            top, left = (height - out_height) // 2, (width - out_width) // 2
            return array[top : top + out_height, left : left + out_width]
        top = int(down * (height - out_height + 2 * pad + 1)) - pad
        left = int(across * (width - out_width + 2 * pad + 1)) - pad
        out = np.zeros((out_height, out_width, 3), dtype=np.uint8)
        y0, y1 = max(top, 0), min(top + out_height, height)
        x0, x1 = max(left, 0), min(left + out_width, width)
        out[y0 - top : y1 - top, x0 - left : x1 - left] = array[y0:y1, x0:x1]
        return out


def _random_box(height: int, width: int, scale: tuple[float, float]) -> tuple[int, int, int, int]:
    """Left, top, width and height of a random part of the image, as in Szegedy et al. (2015)."""
    draws = torch.rand(_TRIES, 4, dtype=torch.float64).tolist()
    for share, aspect, across, down in draws:
        area = height * width * (scale[0] + share * (scale[1] - scale[0]))
        ratio = math.exp(_ASPECT[0] + aspect * (_ASPECT[1] - _ASPECT[0]))
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left, top = int(across * (width - crop_width + 1)), int(down * (height - crop_height + 1))
            return left, top, crop_width, crop_height
    # The largest part of an allowed shape, in the middle.
    crop_width = min(width, max(1, round(height * math.exp(_ASPECT[1]))))
    crop_height = min(height, max(1, round(width / math.exp(_ASPECT[0]))))
    return (width - crop_width) // 2, (height - crop_height) // 2, crop_width, crop_height


def _erase(image: Tensor) -> None:
    """Fill a random rectangle with noise, in place (Zhong et al., 2017)."""
    _, height, width = image.shape
    for share, aspect, across, down in torch.rand(_TRIES, 4, dtype=torch.float64).tolist():
        area = height * width * (_ERASED_AREA[0] + share * (_ERASED_AREA[1] - _ERASED_AREA[0]))
        ratio = math.exp(_ERASED_ASPECT[0] + aspect * (_ERASED_ASPECT[1] - _ERASED_ASPECT[0]))
        rows, columns = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < rows < height and 0 < columns < width:
            top, left = int(down * (height - rows + 1)), int(across * (width - columns + 1))
            noise = torch.randint(0, 256, (image.shape[0], rows, columns), dtype=torch.uint8)
            image[:, top : top + rows, left : left + columns] = noise
            return


class EvalTransform:
    """The one view of an image at evaluation, equal to :func:`visionkd.runtime.preprocess.preprocess` to the bit.

    Args:
        spec: The network's input; only size, interpolation and crop are used here.
    """

    def __init__(self, spec: InputSpec) -> None:
        self.spec = spec
        self.img_size = tuple(spec.img_size)

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        """Resize and crop.

        Args:
            image: RGB image of any size.

        Returns:
            uint8 tensor 3 x H x W.
        """
        return _to_tensor(preprocess(to_pil(image), self.spec))
