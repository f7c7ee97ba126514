"""A single-stage detector in two parts: what computes, and what makes losses and boxes of that.

The first part, backbone and heads, is a plain graph: it is what quantisation and model files are about. The second has
no weights: it matches anchors with boxes, and chooses among candidates.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.ssd import SSD
from torchvision.ops import clip_boxes_to_image

from visionkd.runtime.boxes import BoxRule

#: Layers whose results are sides of boxes, not votes about them: eight bits are too coarse for these.
PRECISE = ("head.regression_head.bbox_*", "head.regression_head.module_list.*.1")


class Core(nn.Module):
    """Backbone and heads under the names that they have in the detector.

    Args:
        net: A single-stage detector; its modules are used as they are.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.backbone = net.backbone
        self.head = net.head

    def forward(self, image: Tensor) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Return what the heads say, B x N x channels by name, and the maps of the pyramid, the finest first."""
        maps = list(self.backbone(image).values())
        return self.head(maps), maps


class Shell(nn.Module):
    """A detector without layers, for what a :class:`Core` computed.

    Args:
        net: The detector; only what has no weights is kept of it.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        shell = copy.copy(net)
        shell._modules = dict(net._modules)  # a copy of a module shares these with it
        shell.backbone, shell.head = _Given(), _GivenHead(net.head)
        self.net = copy.deepcopy(shell)
        self.net.train(net.training)

    def forward(self, image: Tensor, answers: Mapping[str, Tensor], maps: Sequence[Tensor], target: Any) -> Any:
        """Return losses in train mode and boxes in eval mode, as torchvision's detectors give them."""
        self.net.backbone.value = OrderedDict((str(level), each) for level, each in enumerate(maps))
        self.net.head.value = dict(answers)
        try:
            return self.net(image, target)
        finally:
            self.net.backbone.value = self.net.head.value = None


class _Given(nn.Module):
    """Gives what it was given, whatever it is asked."""

    value: Any = None

    def forward(self, *_: Any) -> Any:
        return self.value


class _GivenHead(_Given):
    """The same with the losses of a head, whose layers are taken away.

    Args:
        head: The head; it is left as it is.
    """

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.rest = copy.deepcopy(head)
        for module in list(self.rest.modules()):
            for name, child in list(module.named_children()):
                if not list(child.children()) and next(child.parameters(), None) is not None:
                    setattr(module, name, nn.Identity())

    def compute_loss(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return self.rest.compute_loss(*args, **kwargs)


def anchors_of(net: nn.Module, maps: Sequence[tuple[int, int]], img_size: tuple[int, int]) -> list[Tensor]:
    """Return the anchors of an image for each level, N x 4.

    Args:
        net: The detector.
        maps: Height and width of each level.
        img_size: Height and width of the image.
    """
    blanks = [torch.empty(1, 1, *size) for size in maps]
    own = net.rpn.anchor_generator if hasattr(net, "rpn") else net.anchor_generator
    generator = copy.deepcopy(own).cpu()
    anchors = generator(ImageList(torch.empty(1, 3, *img_size), [img_size]), blanks)[0]
    per_place = own.num_anchors_per_location()
    return list(anchors.split([h * w * count for (h, w), count in zip(maps, per_place, strict=True)]))


def candidates(
    net: nn.Module, answers: Mapping[str, Tensor], anchors: Tensor, img_size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Return every box with its scores, before any choice among them.

    Args:
        net: The detector that the answers are of.
        answers: What its heads say.
        anchors: N x 4.
        img_size: Height and width of the image, at whose edges the boxes are cut.

    Returns:
        Boxes, B x N x 4, and scores from 0 to 1, B x N x K.
    """
    logits, codes = answers["cls_logits"], answers["bbox_regression"]
    if "bbox_ctrness" in answers:  # FCOS: the geometric mean of class and centre
        scores = torch.sqrt(torch.sigmoid(logits) * torch.sigmoid(answers["bbox_ctrness"]))
        boxes = net.box_coder.decode(codes, anchors)
    else:
        scores = torch.softmax(logits, -1)[..., 1:] if isinstance(net, SSD) else torch.sigmoid(logits)
        flat = anchors.expand(codes.shape[0], *anchors.shape).reshape(-1, 4)
        boxes = net.box_coder.decode_single(codes.reshape(-1, 4), flat).reshape(codes.shape)
    return clip_boxes_to_image(boxes, img_size), scores


def rule_of(net: nn.Module, anchors: Sequence[Tensor]) -> BoxRule:
    """Return how a detector chooses among its candidates.

    Args:
        net: The detector.
        anchors: For each level, N x 4.
    """
    by_class = isinstance(net, SSD)
    return BoxRule(
        score_threshold=float(net.score_thresh),
        nms_threshold=float(net.nms_thresh),
        max_detections=int(net.detections_per_img),
        candidates=int(net.topk_candidates),
        per="class" if by_class else "level",
        levels=() if by_class else tuple(len(each) for each in anchors),
    )
