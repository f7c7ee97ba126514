"""The loss of OFA-KD: a cross-entropy against the teacher in which the labelled class weighs more."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def ofa_loss(
    *,
    student_logits: Tensor,
    teacher_probs: Tensor,
    target: Tensor,
    exponent: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """Return ``-sum_c w_c log p_c``, averaged over the batch, with ``p = softmax(z_s / T)``.

    With the teacher's probabilities ``q`` and the labelled class ``y`` the weights are ``(1 + q_y)^g - 1`` for ``y``
    and ``q_c^g`` for every other class: an exponent above 1 strengthens the label where the teacher agrees with it, and
    damps the other classes. They sum to 1 only for ``g = 1``, where the loss is the cross-entropy against the teacher
    and the label plays no part. There is no factor ``T^2``. The sum is in float32, and finite for every finite logit.

    Args:
        student_logits: B x C, of the network or of an exit.
        teacher_probs: B x C, ``softmax(z_t / T)`` of one teacher or averaged over several; without gradient.
        target: Class indices, B, or probabilities, B x C, of which the most probable class counts as the label.
        exponent: ``g``, above 0.
        temperature: ``T`` of the student, above 0; that of the teacher is in its probabilities.

    Returns:
        Scalar.

    Reference:
        Hao et al., "One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge Distillation",
        NeurIPS 2023, arXiv 2310.19444.
    """
    log_probs = F.log_softmax(student_logits.float() / temperature, dim=1)
    weights = teacher_probs.detach().float()
    if exponent != 1.0:
        label = (target.argmax(dim=1) if target.ndim == 2 else target)[:, None]
        # (1 + q)^g - 1, exact for a small q too
        strengthened = torch.expm1(exponent * torch.log1p(weights.gather(1, label)))
        weights = weights.pow(exponent).scatter(1, label, strengthened)
    return -(weights * log_probs).sum(dim=1).mean()
