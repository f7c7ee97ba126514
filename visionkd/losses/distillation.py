"""Losses on the class distributions of a teacher and a student."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def average_probabilities(teacher_logits: Sequence[Tensor], *, temperature: float = 1.0) -> Tensor:
    """Return the mean over teachers of ``softmax(z / T)``, which is not the softmax of their mean logits.

    Args:
        teacher_logits: B x C each.
        temperature: ``T``, above 0.

    Returns:
        B x C in float32, without gradient.
    """
    with torch.no_grad():
        probs = [F.softmax(logits.float() / temperature, dim=1) for logits in teacher_logits]
        return probs[0] if len(probs) == 1 else torch.stack(probs).mean(0)


def soft_cross_entropy(*, student_logits: Tensor, teacher_probs: Tensor, temperature: float = 1.0) -> Tensor:
    """Cross-entropy against a distribution, averaged over the batch: ``-sum_c p_t log softmax(z_s / T)``.

    It differs from KL(p_t || p_s) by the teacher's entropy, which has no gradient. The temperature divides the student
    only, and there is no factor ``T^2``.

    Args:
        student_logits: B x C.
        teacher_probs: B x C; rows sum to 1.
        temperature: ``T``, above 0.

    Returns:
        Scalar.

    Reference:
        Shen and Savvides, "MEAL V2", 2020, arXiv 2009.08453; Shen and Xing, "A Fast Knowledge Distillation Framework
        for Visual Recognition", ECCV 2022, arXiv 2112.01528.
    """
    log_probs = F.log_softmax(student_logits.float() / temperature, dim=1)
    return -(teacher_probs.detach().float() * log_probs).sum(1).mean()


def kd_loss(
    *,
    student_logits: Tensor,
    teacher_logits: Tensor | None = None,
    teacher_probs: Tensor | None = None,
    temperature: float = 4.0,
) -> Tensor:
    """Hinton's distillation loss: ``T^2 * KL(softmax(z_t / T) || softmax(z_s / T))``, averaged over the batch.

    The factor ``T^2`` keeps the size of the gradient when the temperature changes. The sum over classes is in float32
    under autocast too, and no gradient reaches the teacher.

    Args:
        student_logits: B x C.
        teacher_logits: B x C; or
        teacher_probs: B x C, ``softmax(z_t / T)`` of one teacher or averaged over several.
        temperature: ``T``, above 0.

    Returns:
        Scalar.

    Reference:
        Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv 1503.02531.
    """
    if (teacher_logits is None) == (teacher_probs is None):
        raise ValueError("give either teacher_logits or teacher_probs")
    if teacher_probs is None:
        assert teacher_logits is not None
        teacher_probs = average_probabilities([teacher_logits], temperature=temperature)
    student_log_probs = F.log_softmax(student_logits.float() / temperature, dim=1)
    return F.kl_div(student_log_probs, teacher_probs.detach().float(), reduction="batchmean") * temperature**2


def hard_kd_loss(*, student_logits: Tensor, teacher_probs: Tensor) -> Tensor:
    """DeiT's hard-label distillation: cross-entropy of the student against the teacher's most probable class.

    Args:
        student_logits: B x C.
        teacher_probs: B x C probabilities (or logits) of one teacher, or averaged over several.

    Returns:
        Scalar, averaged over the batch.

    Reference:
        Touvron et al., "Training data-efficient image transformers & distillation through attention", 2021,
        arXiv 2012.12877, section 4.
    """
    return F.cross_entropy(student_logits.float(), teacher_probs.detach().argmax(dim=1))
