"""Which regions of an image an image-text encoder looks at: enlarged crops of proposals, and a pyramid of blocks.

All boxes are x1, y1, x2, y2 in pixels of the original image, float32.

Wang et al., "Object-Aware Distillation Pyramid for Open-Vocabulary Object Detection", CVPR 2023, arXiv 2303.05892.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Area of a crop in areas of its proposal.
AREA_RATIO = 8.0
#: Side of a block, in pixels of its level of the pyramid.
BLOCK = 224
MAX_STRIDE = 112
#: Ratio of the sides of one level and the next.
RESCALE = 1.5


def expand_boxes(
    proposals: Tensor,
    *,
    image_size: tuple[int, int],
    area_ratio: float = AREA_RATIO,
    side: float | None = None,
    cover: bool = False,
) -> Tensor:
    """Return the square crop around each proposal, N x 4.

    Its side is ``sqrt(area_ratio * w * h)``. On each axis a square no longer than the image is moved inside it; a
    longer one stays centred, and what lies outside the image is black in the crop.

    Args:
        proposals: N x 4, with an area.
        image_size: Height and width.
        area_ratio: Area of a crop in areas of its proposal.
        side: Side of every crop in pixels, in place of the ratio.
        cover: Make no side shorter than the proposal's longest. The authors do not, so the ends of a proposal more than
            8 times longer than wide stick out of its crop.
    """
    proposals = proposals.float()
    extent = proposals[:, 2:] - proposals[:, :2]
    if side is None:
        length = (extent.prod(1, keepdim=True) * area_ratio).sqrt()
    else:
        length = extent.new_full((len(proposals), 1), side)
    if cover and len(proposals):
        length = torch.maximum(length, extent.amax(1, keepdim=True))
    size = length.expand(-1, 2)
    centre = (proposals[:, :2] + proposals[:, 2:]) / 2
    low, high = centre - size / 2, centre + size / 2
    limit = proposals.new_tensor([image_size[1], image_size[0]])
    shift = torch.where(low < 0, -low, 0.0)
    shift = torch.where(high > limit, limit - high, shift)
    shift = torch.where(size <= limit, shift, 0.0)
    moved = centre + shift
    return torch.cat([moved - size / 2, moved + size / 2], dim=1)


def in_crops(proposals: Tensor, crops: Tensor) -> Tensor:
    """Return proposals in the coordinates of their crops, N x 4 each."""
    return proposals.float() - crops[:, [0, 1, 0, 1]]


def outside_masks(proposals: Tensor, crops: Tensor, grid: int) -> Tensor:
    """Return which cells of each crop lie outside its proposal, N x grid x grid of bool.

    A cell is judged by the one pixel that nearest resizing takes for it, both ends of the proposal included.

    Args:
        proposals: N x 4 in pixels of the image.
        crops: N x 4, see :func:`expand_boxes`.
        grid: Patches along a side.
    """
    own = in_crops(proposals, crops)
    pixels = (crops[:, 2:] - crops[:, :2]).ceil()
    cells = torch.arange(grid, device=crops.device, dtype=torch.float32)
    taken = torch.minimum((cells * (pixels / grid)[:, :, None]).floor(), pixels[:, :, None] - 1)
    inside = (taken >= own[:, :2, None]) & (taken <= own[:, 2:, None])
    return ~(inside[:, 1, :, None] & inside[:, 0, None, :])


def partition(length: int, *, block: int = BLOCK, max_stride: int = MAX_STRIDE) -> list[int]:
    """Return where blocks begin along an axis of ``length`` pixels, as even as pixels allow; none if it is short."""
    if length < block:
        return []
    steps = -(-(length - block) // max_stride)
    starts = [0]
    for number in range(steps):
        stride, longer = divmod(length - block, steps)
        starts.append(starts[-1] + stride + (number < longer))
    return starts


def whole_image_box(image_size: tuple[int, int]) -> Tensor:
    """Return the centred square that the crop of a whole image covers, 4; ``image_size`` is height and width.

    The released code wrote its corner and its side where readers expect two corners; this is the box that it meant.
    """
    height, width = image_size
    side = min(height, width)
    left, top = (width - side) / 2, (height - side) / 2
    return torch.tensor([left, top, left + side, top + side])


def pyramid(
    image_size: tuple[int, int], *, block: int = BLOCK, max_stride: int = MAX_STRIDE, rescale: float = RESCALE
) -> list[tuple[tuple[int, int], list[tuple[int, int]]]]:
    """Return the levels of the block pyramid: the size (height, width) of each, and the corners (x, y) of its blocks.

    Columns of blocks follow each other from left to right, each from the top down. A level has blocks only where both
    sides are at least ``block``, and the last such level is the last.
    """
    height, width = image_size
    levels = []
    while min(height, width) >= block:
        across = partition(width, block=block, max_stride=max_stride)
        down = partition(height, block=block, max_stride=max_stride)
        levels.append(((height, width), [(x, y) for x in across for y in down]))
        height, width = int(height / rescale), int(width / rescale)
    return levels


def block_boxes(
    image_size: tuple[int, int], *, block: int = BLOCK, max_stride: int = MAX_STRIDE, rescale: float = RESCALE
) -> Tensor:
    """Return the boxes of all blocks of an image, M x 4: the whole image, then the pyramid from its finest level on."""
    boxes = [whole_image_box(image_size).tolist()]
    scale = 1.0
    for _, corners in pyramid(image_size, block=block, max_stride=max_stride, rescale=rescale):
        boxes += [[x * scale, y * scale, (x + block) * scale, (y + block) * scale] for x, y in corners]
        scale *= rescale
    return torch.tensor(boxes, dtype=torch.float32)


def block_labels(blocks: Tensor, boxes: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Return which classes each block holds, M x K of bool: those of boxes that it overlaps by a positive area.

    Args:
        blocks: M x 4.
        boxes: N x 4, ground truth.
        labels: N, their classes; those of ``num_classes`` and above are left out.
        num_classes: K.
    """
    low = torch.maximum(blocks[:, None, :2], boxes[None, :, :2])
    high = torch.minimum(blocks[:, None, 2:], boxes[None, :, 2:])
    overlaps = (high > low).all(2)  # M x N
    of_class = labels[:, None] == torch.arange(num_classes, device=labels.device)
    return (overlaps[:, :, None] & of_class[None]).any(1)
