"""The parts of LAD: a recoded label map beside the image, the objective of its teacher, the objective of its student.

Qiu, Chen, Li, Wan, Xue and Pu, "Make a Strong Teacher with Label Assistance: A Novel Knowledge Distillation Approach
for Semantic Segmentation", ECCV 2024, arXiv 2407.13254.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from visionkd.losses.cwd import channel_wise_loss
from visionkd.losses.dist import dist_loss
from visionkd.losses.pixel_kd import smoothed_pixel_kl_loss
from visionkd.types import IGNORE

Distance = Literal["cwd", "kl", "dist"]


def fixed_codes(num_classes: int) -> Tensor:
    """Return the label codes that the student's teacher sees, ``C + 1`` values: classes in order, then ignored pixels.

    They are spread evenly from -1.1 to 1.0, which for 21 classes are the authors' ``(k - 11) / 10``.
    """
    return torch.linspace(-1.1, 1.0, num_classes + 1)


def label_channel(
    *, target: Tensor, codes: Tensor, noise: Tensor | None = None, sigma: float = 0.0, gain: float = 1.0,
    ignore: int = IGNORE,
) -> Tensor:  # fmt: skip
    """Return the label map as numbers without a fixed meaning: ``gain * (codes[class] + sigma * noise)``.

    In float32 under autocast too, since the values are large against an image's.

    Args:
        target: B x H x W class indices, ``ignore`` where there is none.
        codes: B x (C + 1), or C + 1 for all images alike; the last one is that of ignored pixels.
        noise: B x 1 x H x W, standard normal; None adds none.
        sigma: Standard deviation of the pixel noise, before the gain.
        gain: Spread of the channel against that of an image channel.
        ignore: Value of ignored pixels.

    Returns:
        B x 1 x H x W in float32.
    """
    target = target.long()
    slots = torch.where(target == ignore, codes.shape[-1] - 1, target)
    codes = codes.float().expand(len(target), -1)
    values = codes.gather(1, slots.flatten(1)).view_as(slots)[:, None]
    if noise is not None:
        values = values + sigma * noise
    return gain * values


def with_label(image: Tensor, channel: Tensor) -> Tensor:
    """Return ``image``, B x 3 x H x W and normalised, with the label channel as its fourth: B x 4 x H x W."""
    return torch.cat([image, channel.to(image.dtype)], dim=1)


def pixel_cross_entropy(*, logits: Tensor, target: Tensor, align_corners: bool = False, ignore: int = IGNORE) -> Tensor:
    """Cross-entropy of logits resized to the labels, the mean over pixels that have one; 0 where none has.

    Args:
        logits: B x C x h x w at any stride.
        target: B x H x W class indices.
        align_corners: How the bilinear resize lays the two grids over each other.
        ignore: Value of pixels that do not count.
    """
    logits, target = logits.float(), target.long()
    if logits.shape[2:] != target.shape[1:]:
        logits = F.interpolate(logits, size=tuple(target.shape[1:]), mode="bilinear", align_corners=align_corners)
    total = F.cross_entropy(logits, target, ignore_index=ignore, reduction="sum")
    return total / (target != ignore).sum().clamp(min=1)


def teacher_terms(
    *,
    logits: tuple[Tensor, Tensor],
    aux: tuple[tuple[Tensor, ...], tuple[Tensor, ...]],
    target: Tensor,
    aux_weight: float = 0.4,
    temperature: float = 4.0,
    align_corners: bool = False,
    ignore: int = IGNORE,
) -> Mapping[str, Tensor]:
    """Return the terms of the teacher's objective from its two paths, unweighted.

        task_loss        = sum over paths of CE(z, y) + aux_weight * sum CE(a, y)
        consistency_loss = CWD(z_1, z_2) + CWD(z_2, z_1)

    Each distance pulls one path towards the other, which is held fixed in it.

    Args:
        logits: Of both paths, B x C x h x w each.
        aux: Logits of each path's auxiliary heads; empty without any.
        target: B x H x W class indices.
        aux_weight: Of the auxiliary heads; the authors' value.
        temperature: Of the channel-wise distance.
        align_corners: See :func:`pixel_cross_entropy`.
        ignore: Value of pixels without a label.
    """
    shared = {"target": target, "align_corners": align_corners, "ignore": ignore}
    first, second = logits
    task = [pixel_cross_entropy(logits=each, **shared) for each in logits]
    task += [aux_weight * pixel_cross_entropy(logits=each, **shared) for path in aux for each in path]
    consistency = channel_wise_loss(student_map=first, teacher_map=second, temperature=temperature)
    consistency = consistency + channel_wise_loss(student_map=second, teacher_map=first, temperature=temperature)
    return {"task_loss": torch.stack(task).sum(), "consistency_loss": consistency}


def student_terms(
    *,
    student_logits: Tensor,
    student_aux: tuple[Tensor, ...],
    teacher_logits: Tensor,
    target: Tensor,
    aux_weight: float = 0.02,
    distance: Distance = "cwd",
    temperature: float = 4.0,
    align_corners: bool = False,
    ignore: int = IGNORE,
) -> Mapping[str, Tensor]:
    """Return the terms of the student's objective, unweighted.

        task_loss    = CE(z, y) + aux_weight * sum CE(a, y)
        distill_loss = distance(z_S, z_T)

    Args:
        student_logits: B x C x h x w.
        student_aux: Logits of its auxiliary heads; empty without any.
        teacher_logits: B x C x h x w, of the privileged teacher; gets no gradient.
        target: B x H x W class indices.
        aux_weight: Of the auxiliary heads; the authors' value, a twentieth of the teacher's.
        distance: ``cwd``, or one of the two that the authors left beside it: ``kl`` over classes at every pixel, and
            ``dist``, which correlates and has no temperature.
        temperature: Of ``cwd`` and ``kl``.
        align_corners: See :func:`pixel_cross_entropy`.
        ignore: Value of pixels without a label.
    """
    shared = {"target": target, "align_corners": align_corners, "ignore": ignore}
    task = [pixel_cross_entropy(logits=student_logits, **shared)]
    task += [aux_weight * pixel_cross_entropy(logits=each, **shared) for each in student_aux]
    if distance == "cwd":
        loss = channel_wise_loss(student_map=student_logits, teacher_map=teacher_logits, temperature=temperature)
    else:
        pair = {"student_logits": student_logits, "teacher_logits": teacher_logits}
        loss = dist_loss(**pair) if distance == "dist" else smoothed_pixel_kl_loss(**pair, temperature=temperature)
    return {"task_loss": torch.stack(task).sum(), "distill_loss": loss}
