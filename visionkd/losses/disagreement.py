"""Where two networks disagree, with gradient to both sides: what a learned augmentation is trained by.

D(u, v) = T^2 * mean over images of KL(softmax(u / T) || softmax(v / T))
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class AugmentorLoss(NamedTuple):
    """The augmentor's objective and its two unweighted parts, scalars."""

    loss: Tensor
    disagreement: Tensor
    teacher_consistency: Tensor


def log_probabilities(logits: Sequence[Tensor], *, temperature: float = 1.0) -> Tensor:
    """Return the logarithm of the mean over networks of ``softmax(z / T)``, with gradient.

    Args:
        logits: B x C each.
        temperature: ``T``, above 0.

    Returns:
        B x C in float32.
    """
    found = [F.log_softmax(z.float() / temperature, dim=1) for z in logits]
    return found[0] if len(found) == 1 else torch.logsumexp(torch.stack(found), dim=0) - math.log(len(found))


def divergence(*, teacher_log_probs: Tensor, other_log_probs: Tensor, temperature: float = 1.0) -> Tensor:
    """Return ``T^2 * KL(teacher || other)``, summed over classes and averaged over the batch.

    Gradient flows to both arguments, unlike in :func:`visionkd.losses.distillation.kd_loss`.

    Args:
        teacher_log_probs: B x C at temperature ``T``; a probability of 0 may be minus infinity.
        other_log_probs: B x C at temperature ``T``.
        temperature: ``T``, above 0.
    """
    loss = F.kl_div(other_log_probs, teacher_log_probs, reduction="batchmean", log_target=True)
    return loss * temperature**2


def augmentor_loss(
    *,
    student_logits: Tensor,
    teacher_logits: Sequence[Tensor],
    teacher_clean_probs: Tensor,
    temperature: float = 1.0,
    disagreement_weight: float = 1.0,
    consistency_weight: float = 1.0,
) -> AugmentorLoss:
    """What HARD's augmentor minimises: ``-lambda_s * D(t(x'), s(x')) + lambda_t * D(t(x), t(x'))``.

    The augmented images x' shall make student and teacher disagree, while the teacher's answer stays what it was on the
    clean images x. Reconstructed: no code of the paper was published.

    Args:
        student_logits: B x C, of x'.
        teacher_logits: B x C each, of x', one per teacher.
        teacher_clean_probs: B x C at temperature ``T``, of x, averaged over the teachers; a constant.
        temperature: ``T``, above 0.
        disagreement_weight: ``lambda_s``.
        consistency_weight: ``lambda_t``.

    Reference:
        Nix, Burg and Sinz, "HARD: Hard Augmentations for Robust Distillation", 2023, arXiv 2305.14890.
    """
    augmented = log_probabilities(teacher_logits, temperature=temperature)
    student = log_probabilities([student_logits], temperature=temperature)
    disagreement = divergence(teacher_log_probs=augmented, other_log_probs=student, temperature=temperature)
    clean = teacher_clean_probs.detach().float()
    consistency = F.kl_div(augmented, clean, reduction="batchmean") * temperature**2
    return AugmentorLoss(
        consistency_weight * consistency - disagreement_weight * disagreement, disagreement, consistency
    )
