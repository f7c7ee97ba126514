"""Symmetric KL divergence of SSLD, which its texts call JS, and the terms of its relatives DML and UDML."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

#: What SSLD's authors add to both probabilities inside the logarithm: no log ratio exceeds 27.6.
EPS = 1e-12
_DISTANCES = {"l2": F.mse_loss, "l1": F.l1_loss, "smooth_l1": F.smooth_l1_loss}


def symmetric_kl_loss(
    *,
    student_logits: Tensor,
    teacher_logits: Tensor | None = None,
    teacher_probs: Tensor | None = None,
    eps: float = EPS,
    detach_teacher: bool = True,
) -> Tensor:
    """Half the sum of both KL divergences, ``1/2 [KL(p_t || p_s) + KL(p_s || p_t)]``, averaged over the batch.

    Both directions together are ``1/2 sum_c (p_t - p_s) log((p_t + eps) / (p_s + eps))``, which is how they are
    computed here: no term is negative, and equal distributions give zero to the bit. Unlike the Jensen-Shannon
    divergence, which goes through the mixture and stays below ln 2, it is limited by ``eps`` alone. The sum over
    classes is in float32, where adding 1e-12 to a probability means something; in half precision it would not.

    Args:
        student_logits: B x C.
        teacher_logits: B x C; or
        teacher_probs: B x C, which need not come from logits: averaged over several teachers, or stored.
        eps: Added to the probabilities inside the logarithm; 0 for the plain divergence.
        detach_teacher: Give the teacher no gradient. False is for two networks that learn from each other (DML).

    Returns:
        Scalar.

    Reference:
        Cui et al., "Beyond Self-Supervision: A Simple Yet Effective Network Distillation Alternative to Improve
        Backbones", 2021, arXiv 2103.05959.
    """
    if (teacher_logits is None) == (teacher_probs is None):
        raise ValueError("give either teacher_logits or teacher_probs")
    teacher = teacher_logits if teacher_probs is None else teacher_probs
    assert teacher is not None
    teacher = teacher.detach().float() if detach_teacher else teacher.float()
    student_log = F.log_softmax(student_logits.float(), dim=1)
    if teacher_probs is None:
        teacher_log = F.log_softmax(teacher, dim=1)
        teacher, teacher_log = teacher_log.exp(), _log_plus(teacher_log, eps)
    else:
        teacher_log = (teacher + eps).log() if eps else teacher.clamp(min=torch.finfo(torch.float32).tiny).log()
    difference = (teacher - student_log.exp()) * (teacher_log - _log_plus(student_log, eps))
    return 0.5 * difference.sum(1).mean()


def multilabel_symmetric_kl_loss(
    *, student_logits: Tensor, teacher_logits: Tensor, eps: float = EPS, detach_teacher: bool = True
) -> Tensor:
    """The same for classes that do not exclude each other: sigmoid outputs, summed over classes, mean over the batch.

    As in SKL-UGI it compares the probabilities that a class is present and not those that it is absent, so it is half
    of a divergence between Bernoulli distributions.

    Args:
        student_logits: B x C.
        teacher_logits: B x C.
        eps: Added to the probabilities inside the logarithm.
        detach_teacher: Give the teacher no gradient.

    Returns:
        Scalar.
    """
    teacher = teacher_logits.detach().float() if detach_teacher else teacher_logits.float()
    student_log, teacher_log = F.logsigmoid(student_logits.float()), F.logsigmoid(teacher)
    difference = (teacher_log.exp() - student_log.exp()) * (_log_plus(teacher_log, eps) - _log_plus(student_log, eps))
    return 0.5 * difference.sum(1).mean()


def feature_distance_loss(
    *,
    student_feature: Tensor,
    teacher_feature: Tensor,
    mode: Literal["l2", "l1", "smooth_l1"] = "l2",
    detach_teacher: bool = True,
) -> Tensor:
    """Distance of two maps, averaged over all their elements; ``l2`` is the term that UDML adds to DML.

    Args:
        student_feature: Any shape.
        teacher_feature: The same shape.
        mode: Squared, absolute or smooth absolute difference.
        detach_teacher: Give the teacher no gradient.

    Returns:
        Scalar.
    """
    if student_feature.shape != teacher_feature.shape:
        raise ValueError(f"{tuple(student_feature.shape)} and {tuple(teacher_feature.shape)} are not one shape")
    teacher = teacher_feature.detach().float() if detach_teacher else teacher_feature.float()
    return _DISTANCES[mode](student_feature.float(), teacher)


def _log_plus(log_probs: Tensor, eps: float) -> Tensor:
    """Return ``log(p + eps)`` from ``log p``, exact where p is far below eps and where it is close to 1."""
    if not eps:
        return log_probs
    return torch.logaddexp(log_probs, log_probs.new_tensor(math.log(eps)))
