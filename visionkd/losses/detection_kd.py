"""Distillation of a two-stage detector's answers: objectness of anchors, classes of proposals, and box deltas.

Both networks answer for the same anchors or proposals, with the same classes in the same order; which those are is the
student's choice. No paper defines this floor: the forms are this project's own.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def objectness_loss(*, student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Binary cross-entropy of the student's objectness against the teacher's, times T^2, the mean over anchors.

    Args:
        student_logits: N, of the anchors that the student's own loss samples.
        teacher_logits: N, of the same anchors; get no gradient.
        temperature: T, softens both.

    Returns:
        Scalar; 0 where there is no anchor. Its least value is the entropy of the teacher's answers, not 0.
    """
    student = student_logits.float() / temperature
    if not len(student):
        return student.sum()
    teacher = (teacher_logits.detach().float() / temperature).sigmoid()
    return temperature**2 * F.binary_cross_entropy_with_logits(student, teacher)


def proposal_class_loss(*, student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Divergence of the student's classes from the teacher's, times T^2, the mean over proposals.

    Args:
        student_logits: N x (K + 1), the background among them.
        teacher_logits: N x (K + 1), of the same proposals, pooled from the teacher's own maps; get no gradient.
        temperature: T, softens both.

    Returns:
        Scalar; 0 where the answers agree, and where there is no proposal.
    """
    student = (student_logits.float() / temperature).log_softmax(1)
    if not len(student):
        return student_logits.float().sum()
    teacher = (teacher_logits.detach().float() / temperature).log_softmax(1)
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def delta_loss(*, student_deltas: Tensor, teacher_deltas: Tensor, chosen: Tensor) -> Tensor:
    """Absolute difference of box deltas, summed over the four of a box and averaged over the chosen boxes.

    Args:
        student_deltas: N x 4, in the coder's units.
        teacher_deltas: N x 4, of the same anchors or proposals; get no gradient.
        chosen: N of bool: anchors that the teacher holds for objects, or foreground proposals.

    Returns:
        Scalar; 0 where nothing is chosen.
    """
    difference = (student_deltas.float() - teacher_deltas.detach().float()).abs().sum(1)
    return (difference * chosen).sum() / chosen.sum().clamp_min(1)
