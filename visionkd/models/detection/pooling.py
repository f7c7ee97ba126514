"""What a second stage sees of a proposal: the part of the map that fits its size, for any number of images at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import roi_align


def owned(boxes: Sequence[Tensor]) -> Tensor:
    """Return the boxes of all images, N x 5: the image's number, then the box. Each image has N_i x 4."""
    owner = torch.cat([each.new_full((len(each), 1), number) for number, each in enumerate(boxes)])
    return torch.cat([owner, torch.cat(list(boxes))], dim=1)


def pool_levels(
    maps: Sequence[Tensor], rois: Tensor, levels: Tensor, *, scales: Sequence[float], size: tuple[int, int],
    sampling_ratio: int, aligned: bool,
) -> Tensor:  # fmt: skip
    """Pool each box from the map of its level.

    Args:
        maps: Of the levels, B x C x h x w.
        rois: N x 5 as :func:`owned` gives them.
        levels: N, the map of each.
        scales: Pixels of each map for one of the image.
        size: Height and width of what is pooled.
        sampling_ratio: As ``torchvision.ops.roi_align`` takes it, and so ``aligned``.

    Returns:
        N x C x height x width.
    """
    pooled = maps[0].new_zeros(rois.shape[0], maps[0].shape[1], *size)
    for number, (own, scale) in enumerate(zip(maps, scales, strict=True)):
        chosen = (levels == number).nonzero()[:, 0]
        found = roi_align(own, rois[chosen].to(own), size, scale, sampling_ratio=sampling_ratio, aligned=aligned)
        pooled = pooled.index_put((chosen,), found.to(pooled))
    return pooled
