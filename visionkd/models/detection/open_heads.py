"""The stages of a detector whose classes are texts: plain modules, built by their arguments alone.

As in Faster R-CNN a region proposal network finds boxes and a head looks at each of them. The head's embedding of a box
is compared with texts, boxes do not depend on classes, and a second head, which only ever sees embeddings of an
image-text encoder, has a say about classes that no box was drawn of.

Wang et al., "Object-Aware Distillation Pyramid for Open-Vocabulary Object Detection", CVPR 2023, arXiv 2303.05892.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import batched_nms, box_area, clip_boxes_to_image

from visionkd.models.detection.pooling import owned, pool_levels
from visionkd.models.open_vocabulary import NormalizedLinear, TextClassifier, calibrated_scores

_POOL = 7
#: A box of so many strides of the finest map, along a side, is looked at in the map above it.
_CANONICAL = 14
#: Boxes with a shorter side, in pixels, are no answer; so says torchvision.
SMALLEST = 1e-2


@dataclass(frozen=True)
class OpenVocabulary:
    """What makes a detector one of open vocabulary; lies among the arguments of its network.

    Attributes:
        dim: Length of the embeddings of boxes and texts.
        base: Which of the classes have boxes in training, K; the others are novel.
        head_convs: Convolutions of each head.
        head_dim: Width of the layer behind them.
        scale: Factor of the cosines in training, 1 / temperature.
        eval_scale: That at inference.
        base_power: Share of the head that learned from boxes in the score of a base class; None leaves the other head
            out.
        novel_power: Its share in that of a novel class; None takes ``1 - base_power``.
        proposals: Boxes that the second stage looks at in an image, in training and at inference.
        rois: Of these, how many it learns from.
        encoder: Name of the image-text encoder that the texts come from.
        identity: Changes with the encoder's weights.
        templates: What the class names were put into.
    """

    dim: int
    base: tuple[bool, ...]
    head_convs: int = 4
    head_dim: int = 1024
    scale: float = 1 / 0.007
    eval_scale: float = 1 / 0.01
    base_power: float | None = 2 / 3
    novel_power: float | None = None
    proposals: tuple[int, int] = (1000, 1000)
    rois: int = 512
    encoder: str = ""
    identity: str = ""
    templates: tuple[str, ...] = ("{}",)

    def to_dict(self) -> dict[str, Any]:
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @property
    def num_base(self) -> int:
        return sum(self.base)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> OpenVocabulary:
        known = {each.name for each in fields(cls)}
        taken = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return cls(**{name: value for name, value in taken.items() if name in known})


class AlignedPool(nn.Module):
    """RoIAlign with pixels counted at their centres and one sample a pixel, in the map that fits a box's size.

    Args:
        strides: Of the maps that are looked at, the finest first; they are called ``0``, ``1``, ...
    """

    def __init__(self, strides: Sequence[int]) -> None:
        super().__init__()
        self.strides = tuple(strides)

    def forward(self, features: Mapping[str, Tensor], boxes: Sequence[Tensor], image_shapes: Any = None) -> Tensor:
        """Return N x C x 7 x 7 for the boxes of all images, N_i x 4 each, one image after the other."""
        return self.of(features, owned(boxes))

    def of(self, features: Mapping[str, Tensor], rois: Tensor) -> Tensor:
        """Return N x C x 7 x 7 for N x 5 boxes, each behind the number of its image."""
        maps = [features[str(number)] for number in range(len(self.strides))]
        side = box_area(rois[:, 1:]).clamp_min(0).sqrt() / (self.strides[0] * _CANONICAL)
        level = (side + 1e-6).log2().floor().clamp(0, len(maps) - 1)
        return pool_levels(
            maps, rois, level, scales=[1 / stride for stride in self.strides], size=(_POOL, _POOL), sampling_ratio=0,
            aligned=True,
        )  # fmt: skip


def conv_head(channels: int, *, convs: int, width: int) -> nn.Sequential:
    """Return what makes a vector of a pooled box: N x channels x 7 x 7 to N x width."""
    layers: list[nn.Module] = []
    for _ in range(convs):
        layers += [nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(True)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * _POOL**2, width), nn.ReLU(True))


class OpenPredictor(nn.Module):
    """Classes of a box by its embedding, and one correction of its sides for all classes."""

    def __init__(self, spec: OpenVocabulary) -> None:
        super().__init__()
        self.embed = NormalizedLinear(spec.head_dim, spec.dim)
        self.classifier = _classifier(spec, background=True)
        self.bbox_pred = nn.Linear(spec.head_dim, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits, N x (K + 1) with the background last, and corrections, N x 4, for N x width."""
        return self.classifier(self.embed(x)), self.bbox_pred(x)


def _classifier(spec: OpenVocabulary, *, background: bool) -> TextClassifier:
    return TextClassifier(
        torch.zeros(len(spec.base), spec.dim), num_base=spec.num_base, scale=spec.scale, eval_scale=spec.eval_scale,
        background=background,
    )  # fmt: skip


class OpenRoIHeads(RoIHeads):
    """The second stage: torchvision's sampling of boxes, with scores by texts.

    Labels that come in and go out count from 1, as torchvision's do; 0 is the background. Its classifiers have the base
    classes first; nobody outside sees that.

    Args:
        spec: See :class:`OpenVocabulary`.
        channels: Of the maps.
        strides: Of the maps.
    """

    place: Tensor

    def __init__(self, spec: OpenVocabulary, *, channels: int, strides: Sequence[int]) -> None:
        super().__init__(
            AlignedPool(strides),
            conv_head(channels, convs=spec.head_convs, width=spec.head_dim),
            OpenPredictor(spec),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=spec.rois,
            positive_fraction=0.25,
            bbox_reg_weights=None,
            score_thresh=0.0,
            nms_thresh=0.5,
            detections_per_img=300,
        )
        #: Column of each class in the classifiers.
        self.register_buffer("place", torch.empty(0, dtype=torch.int64), persistent=False)
        self.base_power, self.novel_power = spec.base_power, spec.novel_power
        self.object_head = conv_head(channels, convs=spec.head_convs, width=spec.head_dim)
        self.object_embed = NormalizedLinear(spec.head_dim, spec.dim)
        self.object_classifier = _classifier(spec, background=False)
        self._settle(spec.base)

    def _settle(self, base: Sequence[bool]) -> None:
        self.num_base = sum(base)
        order = torch.tensor(base_first(base), dtype=torch.int64, device=self.place.device)
        self.place = order.argsort()

    @property
    def classifiers(self) -> tuple[TextClassifier, TextClassifier]:
        """That of the head that learns from boxes, and that of the one that learns from embeddings."""
        return self.box_predictor.classifier, self.object_classifier

    def set_classes(self, texts: Tensor, base: Sequence[bool]) -> None:
        """Take other classes: their texts, K x dim, and which of them have boxes in training, K."""
        for classifier in self.classifiers:
            classifier.set_classes(texts[base_first(base)], num_base=sum(base))
        self._settle(base)

    def forward(
        self,
        features: Mapping[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Return the boxes found in each image, or in train mode the losses; see torchvision's ``RoIHeads``."""
        if self.training:
            proposals, _, labels, regression = self.select_training_samples(proposals, targets)
            logits, deltas = self.box_predictor(self.box_head(self.box_roi_pool(features, proposals)))
            return [], self.losses(logits, deltas, torch.cat(labels), torch.cat(regression))
        pooled = self.box_roi_pool(features, proposals)
        logits, deltas = self.box_predictor(self.box_head(pooled))
        scores = self.scores(logits, pooled)
        boxes = self.box_coder.decode(deltas, proposals)[:, 0]
        counts = [len(each) for each in proposals]
        parts = zip(boxes.split(counts), scores.split(counts), image_shapes, strict=True)
        return [self._found(*part) for part in parts], {}

    def losses(self, logits: Tensor, deltas: Tensor, labels: Tensor, regression: Tensor) -> dict[str, Tensor]:
        """Cross-entropy over K + 1 classes, and the L1 distance of the boxes of objects over all boxes.

        Args:
            logits: N x (K + 1).
            deltas: N x 4.
            labels: N, 0 for the background, 1 + class otherwise.
            regression: N x 4, what the corrections should be.
        """
        if not len(labels):
            return {"loss_classifier": deltas.sum(), "loss_box_reg": deltas.sum()}
        of_object = labels > 0
        wanted = torch.where(of_object, self.place[(labels - 1).clamp(min=0)], logits.shape[1] - 1)
        box_loss = F.l1_loss(deltas[of_object], regression[of_object], reduction="sum") / labels.numel()
        return {"loss_classifier": F.cross_entropy(logits, wanted), "loss_box_reg": box_loss}

    def scores(self, logits: Tensor, pooled: Tensor) -> Tensor:
        """Return the scores of classes, N x K, for the logits of boxes and what was pooled of them."""
        if self.base_power is None:
            return logits.float().softmax(1)[:, self.place]
        other = self.object_classifier(self.object_embed(self.object_head(pooled)))
        found = calibrated_scores(
            logits, other, num_base=self.num_base, base_power=self.base_power, novel_power=self.novel_power
        )
        return found[:, self.place]

    def object_embeddings(self, features: Mapping[str, Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """Return embeddings of boxes by the head that learns from an encoder, N x dim of length 1."""
        return self.object_embed(self.object_head(self.box_roi_pool(features, boxes)))

    def _found(self, boxes: Tensor, scores: Tensor, image_shape: tuple[int, int]) -> dict[str, Tensor]:
        boxes = clip_boxes_to_image(boxes, image_shape)
        whole = ((boxes[:, 2:] - boxes[:, :2]) >= SMALLEST).all(1)
        places, labels = ((scores > self.score_thresh) & whole[:, None]).nonzero(as_tuple=True)
        found, chosen = boxes[places], scores[places, labels]
        kept = batched_nms(found, chosen, labels, self.nms_thresh)[: self.detections_per_img]
        return {"boxes": found[kept], "scores": chosen[kept], "labels": labels[kept] + 1}


class PlainProposals(RegionProposalNetwork):
    """torchvision's first stage with the L1 distance of boxes in place of its smoothed one."""

    def compute_loss(
        self,
        objectness: Tensor,
        pred_bbox_deltas: Tensor,
        labels: list[Tensor],
        regression_targets: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Return the losses of objectness and of boxes over the anchors that are sampled."""
        positive, negative = (torch.cat(each).nonzero()[:, 0] for each in self.fg_bg_sampler(labels))
        sampled = torch.cat([positive, negative])
        wanted, targets = torch.cat(labels), torch.cat(regression_targets)
        boxes = F.l1_loss(pred_bbox_deltas[positive], targets[positive], reduction="sum") / max(1, len(sampled))
        found = objectness.flatten()[sampled]
        return F.binary_cross_entropy_with_logits(found, wanted[sampled]), boxes


def base_first(base: Sequence[bool]) -> list[int]:
    """Return the indices of base classes, and then of novel ones."""
    return sorted(range(len(base)), key=lambda number: not base[number])


def open_faster_rcnn(pyramid: nn.Module, anchors: AnchorGenerator, spec: OpenVocabulary) -> GeneralizedRCNN:
    """Return the whole network; its texts begin at zero.

    Args:
        pyramid: Backbone with ``out_channels``, ``strides`` of its levels and ``taken``, as many of which the second
            stage looks at.
        anchors: Of the first stage.
        spec: See :class:`OpenVocabulary`.
    """
    channels: Any = pyramid.out_channels
    strides: Any = pyramid.strides
    in_training, at_inference = spec.proposals
    first = PlainProposals(
        anchors,
        RPNHead(channels, anchors.num_anchors_per_location()[0]),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_top_n={"training": 2 * in_training, "testing": at_inference},  # of each level
        post_nms_top_n={"training": in_training, "testing": at_inference},
        nms_thresh=0.7,
    )
    taken: Any = pyramid.taken
    second = OpenRoIHeads(spec, channels=channels, strides=strides[: len(taken)])
    return GeneralizedRCNN(pyramid, first, second, nn.Identity())
