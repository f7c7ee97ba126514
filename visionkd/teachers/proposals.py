"""Boxes that may hold an object of any class: what the first stage of a detector says of an image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection.rpn import concat_box_prediction_layers
from torchvision.ops import nms

from visionkd.models.detection.network import DetectionNetwork

#: Overlap above which the lower of two proposals is dropped, whatever maps they were found in.
NMS_IOU = 0.7


@torch.no_grad()
def propose(network: DetectionNetwork, image: Tensor, *, most: int) -> list[tuple[Tensor, Tensor]]:
    """Return boxes, N x 4 in pixels of the view, and objectness, N in [0, 1] and highest first, for each image.

    Args:
        network: A two-stage detector in eval mode; its second stage is not asked.
        image: B x 3 x H x W in [0, 1].
        most: Most boxes of an image.
    """
    net: Any = network.net
    images, _ = net.transform(network.prepare(image))
    maps = list(net.backbone(images.tensors).values())
    objectness, deltas = net.rpn.head(maps)
    anchors = net.rpn.anchor_generator(images, maps)
    counts = [each[0].numel() for each in objectness]
    logits, deltas = concat_box_prediction_layers(objectness, deltas)
    boxes = net.rpn.box_coder.decode(deltas, anchors).view(len(image), -1, 4)
    found = net.rpn.filter_proposals(boxes, logits, images.image_sizes, counts)
    answers = []
    for own, scores in zip(*found, strict=True):
        kept = nms(own, scores, NMS_IOU)[:most]
        answers.append((own[kept], scores[kept]))
    return answers
