"""What methods on maps of logits share: maps of one size, and the pixels that count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from visionkd.types import IGNORE, Output


def sized(map_: Tensor, size: Sequence[int]) -> Tensor:
    """Return a teacher's map, B x C x h x w, at the size of the student's; one that has it stays as it is."""
    if tuple(map_.shape[2:]) == tuple(size):
        return map_
    return F.interpolate(map_, size=tuple(size), mode="bilinear", align_corners=False)


def of_one_size(teachers: tuple[Output, ...], size: Sequence[int]) -> tuple[Output, ...]:
    """Return the teachers' answers, logits or stored probabilities, at one size."""

    def resized(map_: Tensor | None) -> Tensor | None:
        return None if map_ is None else sized(map_, size)

    return tuple(replace(each, logits=resized(each.logits), probs=resized(each.probs)) for each in teachers)


def labels_at(target: Tensor, size: Sequence[int]) -> Tensor:
    """Return labels, B x H x W, at another size, B x h x w: each pixel takes the nearest one's."""
    if tuple(target.shape[1:]) == tuple(size):
        return target
    return F.interpolate(target[:, None].float(), size=tuple(size), mode="nearest-exact")[:, 0].to(target.dtype)


def labelled(target: Tensor, size: Sequence[int]) -> Tensor:
    """Return where a map of this size has labels: B x h x w, boolean."""
    return labels_at(target, size) != IGNORE


def stacked_labels(targets: Tensor | Sequence[Tensor], size: Sequence[int]) -> Tensor:
    """Return the labels of a batch at one size, B x h x w: a tensor, or one map for each image at its own size."""
    if isinstance(targets, Tensor):
        return labels_at(targets, size)
    return torch.cat([labels_at(each[None], size) for each in targets])
