"""Losses of masked pre-training and of its distillation: pixels, aligned features, hidden features, two-headed labels.

He, Chen, Xie, Li, Dollar and Girshick, "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022, arXiv 2111.06377.

Bai, Wang, Xiao, Wei, Wang, Yuille, Zhou and Xie, "Masked Autoencoders Enable Efficient Knowledge Distillers",
CVPR 2023, arXiv 2208.12256.

Huang, Peng, Dong, Wei, Jiao and Ye, "Generic-to-Specific Distillation of Masked Autoencoders", CVPR 2023,
arXiv 2302.14771.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

_EPS = 1e-6


def patchify(image: Tensor, patch: int | tuple[int, int]) -> Tensor:
    """Cut an image into patches: B x 3 x H x W becomes B x L x (p * p * 3).

    Patches follow each other row by row; within one the order is (row, column, channel).

    Args:
        image: B x C x H x W, with H and W multiples of the patch.
        patch: Side of a patch in pixels, or its height and width.
    """
    height, width = (patch, patch) if isinstance(patch, int) else patch
    batch, channels, rows, columns = image.shape
    cut = image.reshape(batch, channels, rows // height, height, columns // width, width)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, height * width * channels)


def unpatchify(patches: Tensor, *, grid: tuple[int, int], patch: tuple[int, int]) -> Tensor:
    """Undo :func:`patchify`: B x L x (p * p * C) becomes B x C x H x W.

    Args:
        patches: B x L x (p * p * C).
        grid: Rows and columns of patches, L = rows * columns.
        patch: Height and width of a patch in pixels.
    """
    batch, (rows, columns), (height, width) = len(patches), grid, patch
    cut = patches.reshape(batch, rows, columns, height, width, -1)
    return cut.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, rows * height, columns * width)


def normalized_patches(patches: Tensor) -> Tensor:
    """Standardise each patch by its own mean and its unbiased variance, B x L x q."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) / (variance + _EPS).sqrt()


def masked_pixel_loss(*, student_pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error of removed patches: the mean within each, then over all removed patches of the batch.

    Args:
        student_pred: B x L x q.
        target: B x L x q, see :func:`patchify` and :func:`normalized_patches`.
        mask: B x L, 1 where a patch was removed.
    """
    error = (student_pred.float() - target.float()).square().mean(-1)
    return (error * mask).sum() / mask.sum()


def alignment_loss(
    *, student_feature: Tensor, teacher_feature: Tensor, distance: Literal["l1", "l2"] = "l1", normalize: bool = True
) -> Tensor:
    """Distance of projected student features from the teacher's, the mean over samples, tokens and channels.

    Args:
        student_feature: B x N x D, projected to the teacher's width.
        teacher_feature: B x N x D; gets no gradient.
        distance: ``l1`` or squared ``l2``.
        normalize: Give every token length 1 first.
    """
    student, teacher = student_feature.float(), teacher_feature.detach().float()
    if normalize:
        student, teacher = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    return F.l1_loss(student, teacher) if distance == "l1" else F.mse_loss(student, teacher)


def hidden_feature_loss(*, student_pred: Tensor, teacher_hidden: Tensor, beta: float = 2.0) -> Tensor:
    """Smooth L1 distance from the teacher's hidden features, each token of which is standardised.

    Args:
        student_pred: B x N x D.
        teacher_hidden: B x N x D; gets no gradient.
        beta: Error below which the loss is quadratic.
    """
    hidden = teacher_hidden.detach().float()
    target = F.layer_norm(hidden, hidden.shape[-1:], eps=_EPS)
    return F.smooth_l1_loss(student_pred.float(), target, beta=beta)


def hard_label_loss(*, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Cross-entropy against the class that the teacher names; B x C each."""
    return F.cross_entropy(student_logits.float(), teacher_logits.argmax(1))


def nkd_loss(
    *, student_logits: Tensor, teacher_logits: Tensor, target: Tensor, temperature: float = 1.0, alpha: float = 1.0
) -> Tensor:
    """Normalised knowledge distillation: the teacher's confidence in the target, and its distribution over the rest.

        L = -mean q_y log p_y - alpha T^2 mean sum_{c != y} qhat_c log phat_c

    where hats are softened distributions that are normalised over the classes other than y.

    Args:
        student_logits: B x C.
        teacher_logits: B x C; get no gradient.
        target: Class indices, B, or probabilities, B x C, whose largest counts.
        temperature: Softens both distributions over the other classes.
        alpha: Weight of the second term.
    """
    label = target if target.ndim == 1 else target.argmax(1)
    student, teacher = student_logits.float(), teacher_logits.detach().float()
    confidence = teacher.softmax(1).gather(1, label[:, None])
    first = -(confidence * student.log_softmax(1).gather(1, label[:, None])).mean()
    own = F.one_hot(label, student.shape[1]).bool()
    count = (len(student), student.shape[1] - 1)
    rest_student, rest_teacher = student[~own].view(count), teacher[~own].view(count)
    rest = (rest_teacher / temperature).softmax(1) * (rest_student / temperature).log_softmax(1)
    return first - alpha * temperature**2 * rest.sum(1).mean()
