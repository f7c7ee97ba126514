"""Losses on the class distributions of a teacher and a student."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def kd_loss(*, student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0) -> Tensor:
    """Hinton's distillation loss: ``T^2 * KL(softmax(z_t / T) || softmax(z_s / T))``, averaged over the batch.

    The factor ``T^2`` keeps the size of the gradient when the temperature changes. The sum over classes is in float32
    under autocast too, and no gradient reaches the teacher.

    Args:
        student_logits: B x C.
        teacher_logits: B x C.
        temperature: ``T``, above 0.

    Returns:
        Scalar.

    Reference:
        Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv 1503.02531.
    """
    student_log_probs = F.log_softmax(student_logits.float() / temperature, dim=1)
    teacher_log_probs = F.log_softmax(teacher_logits.detach().float() / temperature, dim=1)
    return F.kl_div(student_log_probs, teacher_log_probs, reduction="batchmean", log_target=True) * temperature**2


def hard_kd_loss(*, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """DeiT's hard-label distillation: cross-entropy of the student against the teacher's most probable class.

    Args:
        student_logits: B x C.
        teacher_logits: B x C.

    Returns:
        Scalar, averaged over the batch.

    Reference:
        Touvron et al., "Training data-efficient image transformers & distillation through attention", 2021,
        arXiv 2012.12877, section 4.
    """
    return F.cross_entropy(student_logits.float(), teacher_logits.detach().argmax(dim=1))
