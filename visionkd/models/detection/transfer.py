"""A detector that begins with the neck and the heads of another one."""

from __future__ import annotations

import torch

from visionkd.models.classes import align_classes
from visionkd.models.detection.network import DetectionNetwork

_NECK = "backbone.fpn."
_HEADS = ("rpn.", "roi_heads.", "head.")


@torch.no_grad()
def take_neck_and_heads(
    student: DetectionNetwork, teacher: DetectionNetwork, *, same_levels: bool
) -> tuple[int, int]:
    """Copy what has the same name and shape in both networks, apart from their backbones.

    Layers that stand for classes are copied only where both have the same classes in the same order, by name.

    Args:
        student: Is changed.
        teacher: Stays as it is.
        same_levels: Whether equal numbers mean equal strides in both pyramids; the neck is left out where they do not.

    Returns:
        How many of the student's tensors were copied, and how many its neck and heads have.
    """
    parts = (_NECK, *_HEADS)
    own = {name: value for name, value in student.net.state_dict().items() if name.startswith(parts)}
    named = student.classes is not None and teacher.classes is not None
    same_classes = named and align_classes(teacher.classes, student.classes, teacher.num_classes).identity
    left_out = () if same_classes else tuple(f"{name}." for name in student.class_layers())
    if not same_levels:
        left_out += (_NECK,)
    given = teacher.net.state_dict()
    taken = [
        name for name, value in own.items()
        if not name.startswith(left_out) and name in given and given[name].shape == value.shape
    ]  # fmt: skip
    for name in taken:
        own[name].copy_(given[name])
    return len(taken), len(own)
