"""The pixels of regions: enlarged crops of proposals with what is no object, and the blocks of an image's pyramid.

Wang et al., "Object-Aware Distillation Pyramid for Open-Vocabulary Object Detection", CVPR 2023, arXiv 2303.05892.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from visionkd.teachers.regions import AREA_RATIO, BLOCK, MAX_STRIDE, RESCALE, expand_boxes, outside_masks, pyramid
from visionkd.teachers.regions import block_boxes as boxes_of_blocks

#: Proposals with a shorter side, in pixels, are left out.
MIN_SIDE = 4.0
_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@dataclass(frozen=True)
class ObjectCrops:
    """Crops around the proposals of one image.

    Attributes:
        kept: N, which proposals they belong to; smaller ones have none.
        crops: N x 3 x size x size, uint8; black outside the image.
        outside: N x grid x grid, of bool: what of a crop is not the proposal.
    """

    kept: Tensor
    crops: Tensor
    outside: Tensor


def object_crops(
    image: Image.Image,
    proposals: Tensor,
    *,
    size: int,
    grid: int,
    interpolation: str = "bicubic",
    area_ratio: float = AREA_RATIO,
    side: float | None = None,
    cover: bool = False,
) -> ObjectCrops:
    """Cut a square around each proposal, see :func:`visionkd.teachers.regions.expand_boxes`.

    Args:
        image: RGB.
        proposals: P x 4 as x1, y1, x2, y2 in pixels of the image.
        size: Side of a crop in pixels, as the encoder takes it.
        grid: Cells of a mask along a side.
        interpolation: ``bilinear`` or ``bicubic``.
        area_ratio: Area of a crop in areas of its proposal.
        side: Side of every crop in pixels of the image, in place of the ratio.
        cover: Make no side shorter than the proposal's longest.
    """
    extent = proposals[:, 2:] - proposals[:, :2]
    kept = (extent >= MIN_SIDE).all(1).nonzero()[:, 0]
    own = proposals[kept].float()
    boxes = expand_boxes(
        own, image_size=(image.height, image.width), area_ratio=area_ratio, side=side, cover=cover
    )  # fmt: skip
    # pillow rounds to whole pixels, and fills what lies outside with black
    cut = [image.crop(tuple(round(edge) for edge in box)) for box in boxes.tolist()]
    return ObjectCrops(kept, _stacked(cut, size, interpolation), outside_masks(own, boxes, grid))


def block_crops(
    image: Image.Image,
    *,
    size: int = BLOCK,
    max_stride: int = MAX_STRIDE,
    rescale: float = RESCALE,
    interpolation: str = "bicubic",
) -> tuple[Tensor, Tensor]:
    """Cut the blocks of an image: the whole one, then windows of ``size`` pixels on each level of the pyramid.

    Args:
        image: RGB.
        size: Side of a block, as the encoder takes it.
        max_stride: Most pixels from one window to the next.
        rescale: Ratio of the sides of one level and the next.
        interpolation: ``bilinear`` or ``bicubic``.

    Returns:
        M x 3 x size x size, uint8, and their boxes in pixels of the image, M x 4.
    """
    settings = {"block": size, "max_stride": max_stride, "rescale": rescale}
    sizes = (image.height, image.width)
    short = min(sizes)
    resized = image.resize(
        (int(image.width * size / short), int(image.height * size / short)), _RESAMPLING[interpolation]
    )
    left, top = round((resized.width - size) / 2), round((resized.height - size) / 2)
    cut = [resized.crop((left, top, left + size, top + size))]
    level = image
    for (height, width), corners in pyramid(sizes, **settings):
        if level.size != (width, height):  # each from the one before it
            level = level.resize((width, height), _RESAMPLING[interpolation])
        cut += [level.crop((x, y, x + size, y + size)) for x, y in corners]
    return _stacked(cut, size, interpolation), boxes_of_blocks(sizes, **settings)


def _stacked(images: list[Image.Image], size: int, interpolation: str) -> Tensor:
    """Resize square pictures to one size and stack them, N x 3 x size x size of uint8."""
    if not images:
        return torch.empty(0, 3, size, size, dtype=torch.uint8)
    resampling = _RESAMPLING[interpolation]
    pixels = [np.asarray(one if one.size == (size, size) else one.resize((size, size), resampling)) for one in images]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
