"""What learns from blocks and whole images beside a detector, and is dropped when it has learnt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from visionkd.models.detection.open_heads import AlignedPool, base_first
from visionkd.models.detection.open_network import OpenVocabularyDetector
from visionkd.models.open_vocabulary import NormalizedLinear, TextClassifier

_POOL = 7


class BlockHead(nn.Module):
    """Embeddings of blocks, by two linear layers.

    Args:
        channels: Of the maps.
        strides: Of the maps.
        width: Of the layers.
        dim: Length of an embedding.
    """

    def __init__(self, channels: int, strides: Sequence[int], *, width: int, dim: int) -> None:
        super().__init__()
        self.pool = AlignedPool(strides)
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(channels * _POOL**2, width), nn.ReLU(True), nn.Linear(width, width), nn.ReLU(True)
        )
        self.embed = NormalizedLinear(width, dim)

    def forward(self, maps: Mapping[str, Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """Return M x dim of length 1 for the blocks of all images."""
        return self.embed(self.layers(self.pool(maps, boxes)))


class WholeHead(nn.Module):
    """Embeddings of whole images: the mean of the coarsest map, and one linear layer."""

    def __init__(self, channels: int, *, dim: int) -> None:
        super().__init__()
        self.embed = NormalizedLinear(channels, dim)

    def forward(self, maps: Mapping[str, Tensor]) -> Tensor:
        """Return B x dim of length 1; the mean includes what fills up a view."""
        return self.embed(list(maps.values())[-1].mean((2, 3)))


def region_heads(
    student: OpenVocabularyDetector,
    *,
    block: bool,
    whole: bool,
    label_scale: float,
    label_bias: float,
    learn_novel: bool,
) -> nn.ModuleDict:
    """Return the heads, as many as are wanted, and ``labels``, which says what classes an embedding shows.

    Args:
        student: The detector.
        block: Whether blocks are learnt from.
        whole: Whether whole images are.
        label_scale: Factor of the cosines with texts.
        label_bias: Taken off the logits.
        learn_novel: Whether novel classes have boxes too.
    """
    backbone, spec = student.net.backbone, student.spec
    heads = nn.ModuleDict()
    if block:
        strides = backbone.strides[: len(backbone.taken)]
        heads["block"] = BlockHead(backbone.out_channels, strides, width=spec.head_dim, dim=spec.dim)
    if whole:
        heads["whole"] = WholeHead(backbone.out_channels, dim=spec.dim)
    if block or whole:
        texts = student.texts[base_first(spec.base)]
        heads["labels"] = TextClassifier(
            texts, num_base=len(texts) if learn_novel else spec.num_base, scale=label_scale, bias=label_bias,
            background=False,
        )  # fmt: skip
    return heads


def labels_shown(labels: Tensor, num_classes: int) -> Tensor:
    """Return which classes an image shows, K of bool, for the classes of its boxes, N."""
    return (labels[:, None] == torch.arange(num_classes, device=labels.device)).any(0)
