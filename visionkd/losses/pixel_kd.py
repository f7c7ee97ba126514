"""Distillation of every pixel's class distribution, in the three reductions that released code has."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Reduction = Literal["kl_batchmean", "kl_elementmean", "pixel_ce"]


def pixel_kd_loss(
    *,
    student_logits: Tensor,
    teacher_logits: Tensor | None = None,
    teacher_probs: Tensor | None = None,
    temperature: float = 1.0,
    reduction: Reduction = "kl_batchmean",
    valid: Tensor | None = None,
) -> Tensor:
    """Divergence of the student's class distribution from the teacher's at every pixel.

    With ``q, p = softmax over classes of z / T`` and the mean taken over the pixels of all images:

    ==================  ======================================================================================
    ``kl_batchmean``    ``T^2 mean sum_c q log(q / p)``
    ``kl_elementmean``  ``1/C mean sum_c q log(q / p)``, so the first divided by ``C T^2``
    ``pixel_ce``        ``-B mean sum_c q log p``: images are summed, and the teacher's entropy stays in it
    ==================  ======================================================================================

    Args:
        student_logits: B x C x h x w.
        teacher_logits: B x C x h x w; gets no gradient; or
        teacher_probs: B x C x h x w, ``softmax(z_t / T)`` of one teacher or averaged over several.
        temperature: ``T``, above 0.
        reduction: One of the three.
        valid: B x h x w, true at the pixels that count; None counts all of them, as the authors of all three do.

    Returns:
        Scalar; 0 where no pixel counts.

    Reference:
        Liu et al., "Structured Knowledge Distillation for Semantic Segmentation", CVPR 2019 (``pixel_ce``); Yang et
        al., "Cross-Image Relational Knowledge Distillation for Semantic Segmentation", CVPR 2022 (``kl_batchmean``).
    """
    student = F.log_softmax(student_logits.float() / temperature, dim=1)
    if (teacher_logits is None) == (teacher_probs is None):
        raise ValueError("give either teacher_logits or teacher_probs")
    if teacher_probs is None:
        assert teacher_logits is not None
        teacher_probs = F.softmax(teacher_logits.detach().float() / temperature, dim=1)
    teacher = teacher_probs.detach().float()
    per_pixel = -teacher * student if reduction == "pixel_ce" else F.kl_div(student, teacher, reduction="none")
    per_pixel = per_pixel.sum(1)
    mean = per_pixel.mean() if valid is None else (per_pixel * valid).sum() / valid.sum().clamp(min=1)
    if reduction == "pixel_ce":
        return mean * len(student)
    return mean / student.shape[1] if reduction == "kl_elementmean" else mean * temperature**2


def smoothed_pixel_kl_loss(
    *, student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0, eps: float = 1e-5
) -> Tensor:
    """The per-pixel divergence beside CWD in LAD's trainer: ``mean sum_c q (log(q + eps) - log(p + eps))``, no ``T^2``.

    Args:
        student_logits: B x C x h x w.
        teacher_logits: B x C x h x w; gets no gradient.
        temperature: Divides both logits.
        eps: Added to both probabilities inside the logarithm, which bounds the gradient at pixels that are certain.
    """
    student = F.softmax(student_logits.float() / temperature, dim=1)
    teacher = F.softmax(teacher_logits.detach().float() / temperature, dim=1)
    return (teacher * ((teacher + eps).log() - (student + eps).log())).sum(1).mean()
