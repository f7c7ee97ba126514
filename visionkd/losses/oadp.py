"""Losses of OADP: object, block and global embeddings, their relations, image-level labels, and the weights in time.

    object    256 mean |e - t|
    block     128 mean |e - t| + 8 mean (e e^T - t t^T)^2 + 16 ASL
    global    0.5 sum (e - t)^2 + 4 ASL

with e the student's and t the cached embeddings, both of length 1.

Wang, Liu, Du, Ding, Liao, Qi, Chen and Liu, "Object-Aware Distillation Pyramid for Open-Vocabulary Object Detection",
CVPR 2023, arXiv 2303.05892.

Ridnik, Ben-Baruch, Zamir, Noy, Friedman, Protter and Zelnik-Manor, "Asymmetric Loss For Multi-Label Classification",
ICCV 2021, arXiv 2009.14119.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from visionkd.losses.full_precision import product


def embedding_loss(*, student_embedding: Tensor, teacher_embedding: Tensor) -> Tensor:
    """Mean absolute difference of embeddings: the loss of objects, and the first one of blocks.

    Args:
        student_embedding: N x D, of length 1.
        teacher_embedding: N x D, of length 1; gets no gradient.

    Returns:
        Scalar; 0 where there is nothing to compare, so that a batch without objects has a gradient too.
    """
    student, teacher = student_embedding.float(), teacher_embedding.detach().float()
    return F.l1_loss(student, teacher) if len(student) else student.sum()


def relation_loss(*, student_embedding: Tensor, teacher_embedding: Tensor) -> Tensor:
    """Mean squared difference of the two matrices of products between embeddings; their order does not matter.

    Args:
        student_embedding: M x D, of length 1: every block of every image of the batch.
        teacher_embedding: M x D, of length 1; gets no gradient.
    """
    student, teacher = student_embedding.float(), teacher_embedding.detach().float()
    return F.mse_loss(product(student, student.T), product(teacher, teacher.T)) if len(student) else student.sum()


def global_loss(*, student_embedding: Tensor, teacher_embedding: Tensor) -> Tensor:
    """Squared difference of embeddings of whole images, **summed** over images and channels as in the authors' code.

    Its size therefore follows the number of images a device; divide by it to compare runs of other batch sizes.

    Args:
        student_embedding: B x D, of length 1.
        teacher_embedding: B x D, of length 1; gets no gradient.
    """
    return (student_embedding.float() - teacher_embedding.detach().float()).square().sum()


def asymmetric_loss(
    *,
    student_logits: Tensor,
    target: Tensor,
    gamma_positive: float = 0.0,
    gamma_negative: float = 4.0,
    margin: float = 0.05,
    eps: float = 1e-8,
) -> Tensor:
    """Multi-label cross-entropy that forgives easy negatives, the mean over all N x K cells.

    A negative below ``margin`` costs nothing, and every cell is damped by ``(1 - p_t) ^ gamma``, which has no gradient.
    Logits of minus infinity, of classes that may not be seen in training, cost nothing and count in the divisor.

    Args:
        student_logits: N x K, before the sigmoid.
        target: N x K, bool.
        gamma_positive: Damping of cells whose label is present.
        gamma_negative: Damping of the others.
        margin: Probability that is taken off a negative.
        eps: Least probability whose logarithm is taken.

    Returns:
        Scalar; 0 where there is no row.
    """
    present = student_logits.float().sigmoid()
    if not len(present):
        return present.sum()
    right = torch.where(target, present, (1 - present + margin).clamp_max(1))
    gamma = torch.where(target, gamma_positive, gamma_negative)
    with torch.no_grad():
        damping = (1 - right).pow(gamma)
    return -(damping * right.clamp_min(eps).log()).mean()


@dataclass(frozen=True)
class Weight:
    """A weight that grows linearly from the first step on.

    Attributes:
        gain: Its final value.
        warmup_steps: The step at which it is reached; steps count from 1.
        stuck: Nothing advances it in the released trainer, where it stays what it is at step 1.
    """

    gain: float
    warmup_steps: int
    stuck: bool = False

    def at(self, step: int, *, released: bool = False) -> float:
        """Return the weight at ``step``, counted from 1; ``released`` keeps a stuck one at its first value."""
        return self.gain * min((1 if released and self.stuck else step) / self.warmup_steps, 1.0)


#: Weights of the paper's run, by the names of the terms.
WEIGHTS: Mapping[str, Weight] = MappingProxyType(
    {
        "object_loss": Weight(256.0, 200),
        "block_loss": Weight(128.0, 200),
        "block_relation_loss": Weight(8.0, 200),
        "block_label_loss": Weight(16.0, 1000, stuck=True),
        "global_loss": Weight(0.5, 200),
        "global_label_loss": Weight(4.0, 2000, stuck=True),
    }
)
