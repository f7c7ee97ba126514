"""Boxes of novel classes that an image-text encoder finds among proposals, for a detector to learn from.

    score = softmax((cos * scale - bias) / T)^a * objectness^b

The paper writes one exponent, p^g o^(1-g); the authors' code has two and tuned both.

Wang et al., "Object-Aware Distillation Pyramid for Open-Vocabulary Object Detection", CVPR 2023, arXiv 2303.05892.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import batched_nms


@dataclass(frozen=True)
class PseudoLabelOptions:
    """How proposals become boxes.

    Attributes:
        scale: Factor of the cosines.
        bias: Taken off afterwards; it has no effect on a softmax.
        temperature: Softens the softmax.
        top_k: Classes that a proposal may have.
        class_power: Exponent of the class's probability.
        objectness_power: Exponent of the proposal's objectness.
        nms_iou: Overlap above which the lower of two boxes of a class is dropped.
        min_score: Boxes need more than this.
        proposals: How many proposals of an image are looked at, those of the highest objectness.
    """

    scale: float = 20.0
    bias: float = 4.0
    temperature: float = 1.0
    top_k: int = 1
    class_power: float = 0.306
    objectness_power: float = 0.758
    nms_iou: float = 0.497
    min_score: float = 0.5
    proposals: int = 100


@dataclass(frozen=True)
class PseudoLabels:
    """Boxes found in one image.

    Attributes:
        boxes_xyxy: N x 4, the best first.
        labels: N, class indices.
        scores: N.
    """

    boxes_xyxy: Tensor
    labels: Tensor
    scores: Tensor


def pseudo_label_scores(
    embedding: Tensor, objectness: Tensor, texts: Tensor, options: PseudoLabelOptions = PseudoLabelOptions()
) -> Tensor:
    """Return the score of each class for each proposal, ... x P x K; 0 for all but the ``top_k`` classes of each.

    Args:
        embedding: ... x P x D of the proposals, of any length.
        objectness: ... x P, in [0, 1].
        texts: K x D, used as they are.
        options: See :class:`PseudoLabelOptions`.
    """
    cosines = F.normalize(embedding.float(), dim=-1) @ texts.float().T
    probs = ((cosines * options.scale - options.bias) / options.temperature).softmax(-1)
    best, classes = probs.topk(min(options.top_k, probs.shape[-1]), dim=-1)
    scores = best.pow(options.class_power) * objectness.float().pow(options.objectness_power)[..., None]
    return torch.zeros_like(probs).scatter(-1, classes, scores)


def pseudo_labels(
    boxes: Tensor,
    embedding: Tensor,
    objectness: Tensor,
    texts: Tensor,
    *,
    num_base: int,
    options: PseudoLabelOptions = PseudoLabelOptions(),
) -> PseudoLabels:
    """Return the boxes of novel classes among the proposals of one image.

    Base classes compete for a proposal, and those that win it give no box: they are annotated already.

    Args:
        boxes: P x 4 as x1, y1, x2, y2.
        embedding: P x D.
        objectness: P, in [0, 1].
        texts: K x D, base classes first.
        num_base: How many of them are base classes.
        options: See :class:`PseudoLabelOptions`.
    """
    kept = objectness.argsort(descending=True, stable=True)[: options.proposals]
    scores = pseudo_label_scores(embedding[kept], objectness[kept], texts, options)
    scores[:, :num_base] = 0
    rows, labels = (scores > options.min_score).nonzero(as_tuple=True)
    found, chosen = boxes[kept][rows].float(), scores[rows, labels]
    left = batched_nms(found, chosen, labels, options.nms_iou)
    return PseudoLabels(found[left], labels[left], chosen[left])
