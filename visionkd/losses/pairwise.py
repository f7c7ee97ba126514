"""Pair-wise distillation: how alike any two places of an image look to the student, and to the teacher."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: Added to the length of a column before it divides.
EPS = 1e-8


def pairwise_loss(*, student_map: Tensor, teacher_map: Tensor, scale: float = 0.5, detach_norm: bool = True) -> Tensor:
    """Mean squared difference between the cosine similarities of all pairs of places.

        L = 1/B sum_b 1/n^2 sum_{i,j} (A_S[b,i,j] - A_T[b,i,j])^2,   A[b,i,j] = f_i . f_j / (|f_i| |f_j|)

    over the n places that are left after max pooling with kernel and stride ``int(scale * size)``. The channels of the
    two maps need not agree, so no layer has to be trained between them.

    Args:
        student_map: B x C_s x h x w.
        teacher_map: B x C_t x h x w; gets no gradient.
        scale: Side of a pooled place as a share of the map's; one that gives no whole pixel pools nothing. 0.5 leaves
            2 x 2 places.
        detach_norm: Treat the student's lengths as constants, as the authors do; False differentiates them as well.

    Returns:
        Scalar in [0, 4].

    Reference:
        Liu, Chen, Liu, Qin, Luo and Wang, "Structured Knowledge Distillation for Semantic Segmentation", CVPR 2019.
    """
    kernel = tuple(max(1, int(scale * size)) for size in teacher_map.shape[2:])
    student = _similarities(student_map.float(), kernel, detach_norm=detach_norm)
    with torch.no_grad():
        teacher = _similarities(teacher_map.float(), kernel, detach_norm=True)
    return F.mse_loss(student, teacher)


def _similarities(feature: Tensor, kernel: tuple[int, ...], *, detach_norm: bool) -> Tensor:
    """Return the cosine similarity of all pairs of pooled places, B x n x n."""
    columns = F.max_pool2d(feature, kernel, kernel, ceil_mode=True).flatten(2)
    norm = columns.square().sum(1, keepdim=True).sqrt() if detach_norm else columns.norm(dim=1, keepdim=True)
    columns = columns / ((norm.detach() if detach_norm else norm) + EPS)
    return columns.transpose(1, 2) @ columns
