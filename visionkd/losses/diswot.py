"""DisWOT's two distances between networks: how samples relate to each other, and how channels do for each class.

Dong, Li and Wei, "DisWOT: Student Architecture Search for Distillation WithOut Training", CVPR 2023, arXiv 2303.15678.

Everything is computed in float32, under autocast too: rows are divided by their norm, or by 1e-12 where that is larger,
and such numbers mean nothing in half precision.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Least norm that a row is divided by.
EPS = 1e-12


def relation_matrix(feature: Tensor) -> Tensor:
    """Return how the samples of a batch relate: the products of all pairs, each row divided by its L2 norm.

    Args:
        feature: B x anything: a map, tokens or a vector for each sample.

    Returns:
        B x B in float32.
    """
    with _full_precision(feature):
        flat = feature.float().flatten(1)
        return unit_rows(flat @ flat.T)


def relation_distance(*, student_map: Tensor, teacher_map: Tensor, detach_teacher: bool = True) -> Tensor:
    """Squared difference of the relation matrices, ``sum (G_t - G_s)^2 / B^2``; between 0 and 4 / B.

    Args:
        student_map: B x C x H x W, or any other shape that begins with B.
        teacher_map: Of the same images; its other axes may differ.
        detach_teacher: Give the teacher no gradient.

    Returns:
        Scalar.
    """
    if len(student_map) != len(teacher_map):
        raise ValueError(f"{len(student_map)} samples of the student and {len(teacher_map)} of the teacher")
    teacher = relation_matrix(teacher_map.detach() if detach_teacher else teacher_map)
    return relation_matrix_distance(student=relation_matrix(student_map), teacher=teacher)


def relation_matrix_distance(*, student: Tensor, teacher: Tensor) -> Tensor:
    """The relation distance from matrices that :func:`relation_matrix` gave, B x B each."""
    return (student - teacher).square().sum() / len(student) ** 2


def semantic_distance(*, student_map: Tensor, teacher_map: Tensor, detach_teacher: bool = True) -> Tensor:
    """Squared difference of the channels' relations, ``sum_n ||E_n^t - E_n^s||_F^2 / (N C)``; between 0 and 4.

    ``E_n`` is ``M M^T`` of ``M``, C x HW, with each row divided by its norm. For each class k, ``M`` is
    the gradient of the cross-entropy with respect to the classifier's weights, g_k, a single column. ``E_k`` has rank
    one then, row i is ``sign(g_ki) g_k / ||g_k||``, and the distance is computed in O(N C) without any C x C matrix:

        sum_i (a_i^s)^2 + (a_i^t)^2 - 2 a_i^s a_i^t cos(g^s, g^t),  a_i = g_i ||g|| / max(|g_i| ||g||, 1e-12)

    A class whose gradient is zero in one network contributes 1, one that is zero in both contributes 0.

    Args:
        student_map: N x C (gradients of the classifier: N classes), or N x C x H x W (maps: N samples).
        teacher_map: The same N and C; height and width may differ.
        detach_teacher: Give the teacher no gradient.

    Returns:
        Scalar.

    Raises:
        ValueError: If N or C differ; :func:`class_relation_distance` compares classifiers of different widths.
    """
    if student_map.shape[:2] != teacher_map.shape[:2]:
        given = f"{tuple(student_map.shape[:2])} of the student and {tuple(teacher_map.shape[:2])} of the teacher"
        raise ValueError(f"rows and channels differ: {given}")
    teacher_map = teacher_map.detach() if detach_teacher else teacher_map
    with _full_precision(student_map):
        student, teacher = _columns(student_map), _columns(teacher_map)
        if student.shape[2] == teacher.shape[2] == 1:
            return _rank_one(student.squeeze(2), teacher.squeeze(2))
        difference = unit_rows(student @ student.transpose(1, 2)) - unit_rows(teacher @ teacher.transpose(1, 2))
    return difference.square().sum() / student.shape[:2].numel()


def class_relation_distance(*, student_grad: Tensor, teacher_grad: Tensor, detach_teacher: bool = True) -> Tensor:
    """The semantic distance's stand-in for classifiers of different widths: K x K relations between classes.

    ``sum ||R_t - R_s||^2 / K`` with ``R = g g^T``, rows divided by their norms; between 0 and 4. It is this project's
    choice where the paper says nothing, and its values are not comparable with :func:`semantic_distance`.

    Args:
        student_grad: K x C_s, gradient of the cross-entropy with respect to the classifier's weights.
        teacher_grad: K x C_t.
        detach_teacher: Give the teacher no gradient.

    Returns:
        Scalar.
    """
    if len(student_grad) != len(teacher_grad):
        raise ValueError(f"{len(student_grad)} classes of the student and {len(teacher_grad)} of the teacher")
    teacher = relation_matrix(teacher_grad.detach() if detach_teacher else teacher_grad)
    return (relation_matrix(student_grad) - teacher).square().sum() / len(student_grad)


def zero_share(grad: Tensor) -> Tensor:
    """Return the share of rows that are too small to say anything: all their products stay below 1e-12.

    Args:
        grad: K x C.
    """
    # the largest norm of a row of g g^T
    largest = grad.float().norm(dim=1) * grad.float().abs().amax(1)
    return (largest < EPS).float().mean()


def unit_rows(matrix: Tensor) -> Tensor:
    """Divide each row (last axis) by its L2 norm, or by 1e-12 where that is larger.

    A row of zeros stays zero and gets no gradient: the quotient has none there, and 1e12 times an arriving gradient
    would be one to ruin a training.
    """
    norm = matrix.norm(dim=-1, keepdim=True)
    return matrix * torch.where(norm > 0, 1.0 / norm.clamp(min=EPS), 0.0)


def _rank_one(student: Tensor, teacher: Tensor) -> Tensor:
    (student_signs, student_rows), (teacher_signs, teacher_rows) = _signs_and_rows(student), _signs_and_rows(teacher)
    cosine = (student_rows * teacher_rows).sum(1)
    products = (student_signs * teacher_signs).sum(1)
    # a row of E is a_i u with |u| = 1, or 0 where the class is zero and so is a_i
    squares = student_signs.square().sum(1) + teacher_signs.square().sum(1)
    return (squares - 2.0 * cosine * products).sum() / student.numel()


def _signs_and_rows(grad: Tensor) -> tuple[Tensor, Tensor]:
    norm = grad.norm(dim=1, keepdim=True)
    whole = grad.abs() * norm >= EPS
    # where the division is by the norm itself the factor is a sign, and has no gradient
    signs = torch.where(whole, grad.detach().sign(), grad * norm / EPS)
    return signs, grad * torch.where(norm > 0, 1.0 / norm.clamp(min=1e-30), 0.0)


def _columns(feature: Tensor) -> Tensor:
    """Return N x C x HW in float32; what has no places has one."""
    return (feature.unsqueeze(2) if feature.ndim == 2 else feature.flatten(2)).float()


def _full_precision(tensor: Tensor) -> torch.autocast:
    return torch.autocast(tensor.device.type, enabled=False)
