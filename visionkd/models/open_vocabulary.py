"""What lets a detector name classes that it never saw: heads in the space of a text encoder.

Wang et al., "Object-Aware Distillation Pyramid for Open-Vocabulary Object Detection", CVPR 2023, arXiv 2303.05892.

Gu, Lin, Kuo and Cui, "Open-vocabulary Object Detection via Vision and Language Knowledge Distillation", ICLR 2022,
arXiv 2104.13921: ViLD, whose classifier and ensemble of two heads it builds on.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionkd.losses.full_precision import product


class NormalizedLinear(nn.Linear):
    """A linear layer whose outputs have length 1."""

    def forward(self, x: Tensor) -> Tensor:
        """Return N x D of length 1, in float32; ``x`` is N x in."""
        return F.normalize(super().forward(x).float(), dim=-1)


class TextClassifier(nn.Module):
    """Logits of embeddings by the cosine with each class's text: ``cos * scale - bias``.

    Classes are ordered base, novel, background. In training mode novel columns are minus infinity, so that no gradient
    depends on their texts. Other classes are other rows of ``texts``; nothing needs training for them.

    Args:
        texts: K x D, embeddings of the class names; used as they are, without another normalisation.
        num_base: How many of the first classes are base classes.
        scale: Factor of the cosine in training, 1 / temperature.
        eval_scale: That in eval mode; None takes ``scale``.
        bias: Taken off every logit.
        background: Whether a learned vector stands for "none of them", as the last column.
    """

    texts: Tensor

    def __init__(
        self,
        texts: Tensor,
        *,
        num_base: int,
        scale: float,
        eval_scale: float | None = None,
        bias: float = 0.0,
        background: bool = True,
    ) -> None:
        super().__init__()
        if not 0 <= num_base <= len(texts):
            raise ValueError(f"{num_base} base classes among {len(texts)}")
        self.num_base = num_base
        self.scale = scale
        self.eval_scale = scale if eval_scale is None else eval_scale
        self.bias = bias
        self.register_buffer("texts", texts.detach().float().clone())
        self.background = nn.Parameter(torch.empty(1, texts.shape[1])) if background else None
        if self.background is not None:
            nn.init.xavier_uniform_(self.background)

    @property
    def num_classes(self) -> int:
        """Columns without that of the background."""
        return len(self.texts)

    def set_classes(self, texts: Tensor, *, num_base: int) -> None:
        """Answer for other classes from here on, K x D, the first ``num_base`` of which are base classes."""
        if texts.ndim != 2 or texts.shape[1] != self.texts.shape[1]:
            raise ValueError(f"texts of shape {tuple(texts.shape)} for embeddings of {self.texts.shape[1]}")
        self.texts = texts.detach().to(self.texts).clone()
        self.num_base = num_base

    def forward(self, embedding: Tensor) -> Tensor:
        """Return logits, N x K or, with a background, N x (K + 1); ``embedding`` is N x D of length 1."""
        rows = self.texts
        if self.background is not None:
            rows = torch.cat([rows, F.normalize(self.background, dim=-1)])
        logits = product(embedding, rows.T) * (self.scale if self.training else self.eval_scale) - self.bias
        if self.training and self.num_base < self.num_classes:
            novel = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
            novel[self.num_base : self.num_classes] = True
            logits = logits.masked_fill(novel, float("-inf"))
        return logits


def calibrated_scores(
    box_logits: Tensor,
    object_logits: Tensor,
    *,
    num_base: int,
    base_power: float = 2 / 3,
    novel_power: float | None = None,
) -> Tensor:
    """Return the scores of classes by two heads, N x K: ``p^a q^(1-a)``, with a ``base_power`` for base classes.

    The head that learned from boxes is trusted more for base classes, the one that learned from embeddings more for
    novel ones. Scores of a row may sum to more than 1, for the powers differ: rank with them as they are. The released
    code sets the background to 1 less their sum, takes its logarithm and loses such a row.

    Args:
        box_logits: N x (K + 1), the background last; p is its softmax.
        object_logits: N x K, or N x (K + 1) whose last column is left out; q is its softmax.
        num_base: How many of the first classes are base classes.
        base_power: Share of p for base classes, in [0, 1].
        novel_power: Share of p for novel classes; None takes ``1 - base_power``.
    """
    num_classes = box_logits.shape[1] - 1
    p = box_logits.float().softmax(1)[:, :num_classes]
    q = object_logits.float()[:, :num_classes].softmax(1)
    novel_power = 1 - base_power if novel_power is None else novel_power
    power = p.new_tensor([base_power] * num_base + [novel_power] * (num_classes - num_base))
    return p.pow(power) * q.pow(1 - power)
