"""Channel-wise distillation of maps: each channel's distribution over the positions of the image.

    L = T^2 / (B C) sum_{b, c} sum_i -q_{b,c,i} log p_{b,c,i}      with p, q = softmax over i of z / T

Shu, Liu, Gao, Yan and Shen, "Channel-wise Knowledge Distillation for Dense Prediction", ICCV 2021, arXiv 2011.13256.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor


def channel_wise_loss(
    *,
    student_map: Tensor,
    teacher_map: Tensor,
    temperature: float = 1.0,
    divergence: Literal["kl", "cross_entropy"] = "kl",
) -> Tensor:
    """Divergence of the student's channels from the teacher's, the mean over samples and channels.

    Args:
        student_map: B x C x H x W.
        teacher_map: B x C x H x W; gets no gradient.
        temperature: Softens both distributions; the loss is multiplied by its square.
        divergence: ``kl``, or ``cross_entropy``, which has the same gradient and is not 0 where both agree.
    """
    batch, channels = student_map.shape[:2]
    student = (student_map.float() / temperature).flatten(2).log_softmax(2)
    teacher = (teacher_map.detach().float() / temperature).flatten(2)
    if divergence == "kl":
        total = F.kl_div(student, teacher.log_softmax(2), reduction="sum", log_target=True)
    else:
        total = -(teacher.softmax(2) * student).sum()
    return temperature**2 * total / (batch * channels)
