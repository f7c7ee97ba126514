"""DIST: agreement in relations between classes and between samples, by Pearson's correlation."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

EPS = 1e-8


def dist_loss(
    *,
    student_logits: Tensor,
    teacher_logits: Tensor,
    inter_weight: float = 1.0,
    intra_weight: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """One minus the mean correlation of the rows, and of the columns, of the N x C matrix of probabilities.

    Args:
        student_logits: B x C, or B x C x h x w, where every pixel is a sample: N = B h w.
        teacher_logits: The same shape; gets no gradient.
        inter_weight: Of the term over the classes of each sample.
        intra_weight: Of the term over the samples of each class.
        temperature: Divides both logits; the loss is multiplied by its square.

    Returns:
        Scalar.

    Reference:
        Huang, You, Wang, Qian and Xu, "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022, arXiv 2205.10536.
    """
    student, teacher = _matrix(student_logits, temperature), _matrix(teacher_logits.detach(), temperature)
    inter = 1.0 - _correlations(student, teacher).mean()
    intra = 1.0 - _correlations(student.T, teacher.T).mean()
    return temperature**2 * (inter_weight * inter + intra_weight * intra)


def _matrix(logits: Tensor, temperature: float) -> Tensor:
    """Return the probabilities, N x C."""
    probs = F.softmax(logits.float() / temperature, dim=1)
    return probs.movedim(1, -1).flatten(0, -2)


def _correlations(first: Tensor, second: Tensor) -> Tensor:
    """Return Pearson's correlation of each pair of rows."""
    first, second = first - first.mean(1, keepdim=True), second - second.mean(1, keepdim=True)
    return (first * second).sum(1) / (first.norm(dim=1) * second.norm(dim=1) + EPS)
