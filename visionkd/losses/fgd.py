"""Focal and global distillation of one level of a detector's pyramid.

    L = alpha L_fg + beta L_bg + gamma L_att + lambda L_rel

with the squared difference of features weighed by the teacher's attention over positions and channels, apart for cells
inside and outside boxes; the difference of both networks' attention; and the distance of features to each of which a
block of its own has added the context of the whole map (:class:`visionkd.models.context.ContextBlock`).

Yang, Li, Jiang, Gong, Yuan, Zhao and Yuan, "Focal and Global Knowledge Distillation for Detectors", CVPR 2022,
arXiv 2111.11837.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FGDTerms:
    """Unweighted terms of one level, scalars.

    Attributes:
        foreground: Features in the cells of boxes.
        background: Features in all other cells.
        attention: Attention over positions and over channels.
    """

    foreground: Tensor
    background: Tensor
    attention: Tensor


def spatial_attention(features: Tensor, temperature: float = 0.5) -> Tensor:
    """Return how much each position matters, B x H x W with mean 1; ``features`` are B x C x H x W."""
    strength = features.abs().mean(1)
    return (strength.flatten(1) / temperature).softmax(1).view_as(strength) * strength[0].numel()


def channel_attention(features: Tensor, temperature: float = 0.5) -> Tensor:
    """Return how much each channel matters, B x C with mean 1; ``features`` are B x C x H x W."""
    return (features.abs().mean((2, 3)) / temperature).softmax(1) * features.shape[1]


def box_masks(
    boxes: Sequence[Tensor], *, image_size: tuple[int, int], map_size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Return the weights of cells inside boxes and of those outside, each B x H x W.

    A box weighs 1 over the number of cells it covers, the smallest box decides where several do; the edge that the
    ceiling names is included, as in the authors' code. Cells outside all boxes of an image share a weight of 1.

    Args:
        boxes: For each image, N x 4 as x1, y1, x2, y2 in pixels of the padded batch.
        image_size: Height and width of the padded batch in pixels. The authors divide by the unpadded size and
            multiply by the padded map, which stretches the masks of padded images.
        map_size: H and W.
    """
    (height, width), (rows, columns) = image_size, map_size
    inside = []
    for own in boxes:
        own = own.float()
        first = (own[:, :2] / own.new_tensor([width, height]) * own.new_tensor([columns, rows])).floor()
        last = (own[:, 2:] / own.new_tensor([width, height]) * own.new_tensor([columns, rows])).ceil()
        across, down = (torch.arange(size, device=own.device) for size in (columns, rows))
        covers_x = (across >= first[:, :1]) & (across <= last[:, :1])
        covers_y = (down >= first[:, 1:]) & (down <= last[:, 1:])
        weight = (last + 1 - first).prod(1).reciprocal()
        covered = (covers_y[:, :, None] & covers_x[:, None]) * weight[:, None, None]
        inside.append(torch.cat([covered.new_zeros(1, rows, columns), covered]).amax(0))
    foreground = torch.stack(inside)
    outside = (foreground == 0).float()
    return foreground, outside / outside.sum((1, 2), keepdim=True).clamp_min(1)


def fgd_terms(
    *,
    student_map: Tensor,
    teacher_map: Tensor,
    boxes: Sequence[Tensor],
    image_size: tuple[int, int],
    temperature: float = 0.5,
) -> FGDTerms:
    """Return the focal terms and the attention term of one level, each summed over cells and averaged over images.

    Args:
        student_map: B x C x H x W, brought to the teacher's channels.
        teacher_map: B x C x H x W; gets no gradient.
        boxes: See :func:`box_masks`.
        image_size: See :func:`box_masks`.
        temperature: Softens the attention.
    """
    student, teacher = student_map.float(), teacher_map.detach().float()
    foreground, background = box_masks(boxes, image_size=image_size, map_size=tuple(student.shape[2:]))
    of_cells, of_channels = spatial_attention(teacher, temperature), channel_attention(teacher, temperature)
    error = ((student - teacher).square() * of_channels[:, :, None, None]).sum(1) * of_cells
    of_attention = (spatial_attention(student, temperature) - of_cells).abs().sum()
    of_attention = of_attention + (channel_attention(student, temperature) - of_channels).abs().sum()
    batch = len(student)
    return FGDTerms((error * foreground).sum() / batch, (error * background).sum() / batch, of_attention / batch)


def context_loss(*, student_context: Tensor, teacher_context: Tensor) -> Tensor:
    """Squared distance of features with their context added, summed over a map and averaged over images.

    Gradients reach both blocks, for the teacher's is trained too; the teacher's own features come detached.

    Args:
        student_context: B x C x H x W, what the student's block makes of its features.
        teacher_context: B x C x H x W, what the teacher's block makes of the teacher's.
    """
    return (student_context.float() - teacher_context.float()).square().sum() / len(student_context)
