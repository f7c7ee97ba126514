"""Proposals: what the first stage of a detector says, with its scores."""

from __future__ import annotations

import torch
from torchvision.ops import box_iou

from tests.methods.detection_contract import SIZE, detector
from visionkd.teachers.proposals import NMS_IOU, propose


def test_they_are_those_of_torchvision_with_their_scores_and_thinned_over_all_maps() -> None:
    network = detector("fasterrcnn_test_resnet", seed=0).eval()
    image = torch.rand(2, 3, *SIZE)
    with torch.no_grad():
        images, _ = network.net.transform(network.prepare(image))
        expected, _ = network.net.rpn(images, network.net.backbone(images.tensors))
    found = propose(network, image, most=7)
    assert len(found) == 2
    for (boxes, objectness), theirs in zip(found, expected, strict=True):
        assert 1 <= len(boxes) <= 7 and boxes.shape[1] == 4
        assert (objectness[:-1] >= objectness[1:]).all() and ((objectness > 0) & (objectness < 1)).all()
        assert torch.equal(boxes[0], theirs[0])
        assert all((theirs == box).all(1).any() for box in boxes)
        overlap = box_iou(boxes, boxes).fill_diagonal_(0)
        assert overlap.max() <= NMS_IOU
        assert not boxes.requires_grad
