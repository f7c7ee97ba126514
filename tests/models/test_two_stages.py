"""Detectors of two stages as one graph: what is chosen of their candidates is what torchvision answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.models.two_stage_nets import SIZE, open_two_stages, plain_two_stages
from tests.quantization.dense_nets import pictures
from visionkd.models.detection import two_stages
from visionkd.models.detection.network import DetectionNetwork
from visionkd.models.detection.two_stages import NONE, uncovered
from visionkd.runtime.boxes import choose_boxes

IMAGES = pictures(3, seed=4)


def check(network: DetectionNetwork, images: torch.Tensor) -> list[int]:
    """Compare, and return how many proposals each image has."""
    with torch.no_grad():
        boxes, scores = network.candidates(images)
        expected = network(images).boxes
    rule = network.rule()
    assert scores.shape == (len(images), network.num_candidates, network.num_classes)
    assert boxes.shape == (*scores.shape[: 3 if rule.own_boxes else 2], 4)
    assert 0.0 <= float(scores.min()) <= float(scores.max()) <= 1.0
    for given, values, wanted in zip(boxes, scores, expected, strict=True):
        found = choose_boxes(given.numpy(), values.numpy(), rule)
        assert len(found) == len(wanted.scores) > 5
        np.testing.assert_allclose(found.scores, wanted.scores.numpy(), rtol=1e-6)
        np.testing.assert_allclose(found.boxes, wanted.boxes.numpy(), atol=1e-4)
        np.testing.assert_array_equal(found.labels, wanted.labels.numpy())
    counts = (scores > 0).any(2).sum(1).tolist()
    for given, values, count in zip(boxes, scores, counts, strict=True):
        assert not given[count:].any() and not values[count:].any(), "what is not found is behind"
    return counts


def test_few_proposals_are_all_found() -> None:
    assert check(plain_two_stages(boxes=(40, 20)), IMAGES) == [20, 20, 20]


def test_where_fewer_are_found_than_there_is_room_for_the_rest_counts_for_nothing() -> None:
    counts = check(plain_two_stages(), IMAGES)
    assert all(20 < count < 1000 for count in counts) and len(set(counts)) > 1


def test_torchvisions_own_numbers_are_kept() -> None:
    """A first stage that wants a least objectness, and has two maps of one size."""
    network = plain_two_stages("fasterrcnn_mobilenet_v3_large_320_fpn", img_size=64)
    assert network.num_candidates == 135 and network.net.rpn.score_thresh == 0.05
    check(network, torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("power", [2 / 3, None])
def test_open_vocabulary_has_one_box_for_all_classes(power: float | None) -> None:
    network = open_two_stages()
    network.calibrate(power)
    assert max(check(network, IMAGES)) == network.num_candidates == 40 and not network.rule().own_boxes


def test_other_sizes_have_their_own_anchors() -> None:
    network = plain_two_stages(boxes=(40, 20))
    check(network, torch.rand(1, 3, 96, 64, generator=torch.Generator().manual_seed(1)))
    assert network.anchors() is network.anchors(SIZE) and network.anchors((96, 64)) is not network.anchors()


def test_a_small_image_has_no_more_proposals_than_anchors() -> None:
    network = plain_two_stages(img_size=32)
    levels = [len(each) for each in network.anchors()]
    assert network.num_candidates == sum(levels) == 3 * (64 + 16 + 4 + 1 + 1)
    assert two_stages.count(network.net, [2000, 100]) == 1000


def test_the_surest_boxes_that_nothing_covers_keep_their_scores() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [20, 20, 30, 30], [40, 40, 50, 50]])
    scores = torch.tensor([[0.5, 0.6, 0.3, NONE], [0.9, 0.1, 0.0, 0.2]])
    kept = uncovered(boxes.expand(2, -1, -1).contiguous(), scores, 0.5, 2)
    assert (kept > NONE).tolist() == [[False, True, True, False], [True, False, False, True]]
    assert torch.equal(kept[kept > NONE], scores[kept > NONE])
    torch.library.opcheck(uncovered, (boxes[None], scores[:1], 0.5, 2))
