"""Crops around proposals, masks on patches, the block pyramid and its labels."""

from __future__ import annotations

import math

import pytest
import torch

from visionkd.teachers.regions import (
    block_boxes,
    block_labels,
    expand_boxes,
    in_crops,
    outside_masks,
    partition,
    pyramid,
    whole_image_box,
)

SIZE = (480, 640)


def boxes(*rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)


def test_a_square_in_the_middle_keeps_its_centre_and_grows_to_root_eight_sides() -> None:
    crop = expand_boxes(boxes([300, 200, 340, 240]), image_size=SIZE)[0]
    assert torch.allclose(crop[2:] - crop[:2], torch.full((2,), 40 * math.sqrt(8)))
    assert torch.allclose((crop[:2] + crop[2:]) / 2, torch.tensor([320.0, 220.0]))


def test_at_the_border_the_side_stays_and_the_crop_moves_in() -> None:
    crops = expand_boxes(boxes([0, 0, 40, 40], [600, 440, 640, 480]), image_size=SIZE)
    assert torch.allclose(crops[:, 2:] - crops[:, :2], torch.full((2, 2), 40 * math.sqrt(8)), atol=1e-4)
    assert torch.allclose(crops[0, :2], torch.zeros(2), atol=1e-4)
    assert torch.allclose(crops[1, 2:], torch.tensor([640.0, 480.0]), atol=1e-4)


def test_an_axis_shorter_than_the_crop_is_left_alone() -> None:
    crop = expand_boxes(boxes([0, 100, 200, 300]), image_size=SIZE)[0]  # a side of 566: more than 480, less than 640
    assert crop[0] == 0 and crop[1] < 0 and crop[3] > 480
    assert (crop[1] + crop[3]).item() / 2 == pytest.approx(200)


def test_a_thin_proposal_may_be_covered() -> None:
    thin = boxes([100, 100, 104, 300])
    released = expand_boxes(thin, image_size=SIZE)[0]
    assert (released[3] - released[1]).item() == pytest.approx(math.sqrt(8 * 4 * 200))
    own = in_crops(thin, released[None])[0]
    assert own[1] < 0
    covered = expand_boxes(thin, image_size=SIZE, cover=True)
    own = in_crops(thin, covered)[0]
    assert (covered[0, 3] - covered[0, 1]).item() == pytest.approx(200)
    assert own[1].item() == pytest.approx(0, abs=1e-3) and own[3].item() == pytest.approx(200, abs=1e-3)


def test_masks_are_false_inside_and_find_rows_and_columns() -> None:
    proposal, crop = boxes([10, 20, 30, 40]), boxes([0, 0, 80, 80])
    outside = outside_masks(proposal, crop, 8)[0]
    rows, columns = (~outside).nonzero(as_tuple=True)
    # the pixels looked at are 0, 10, ..., 70
    assert rows.unique().tolist() == [2, 3, 4] and columns.unique().tolist() == [1, 2, 3]
    assert not outside_masks(crop, crop, 8).any()
    assert outside_masks(boxes([11, 11, 12, 12]), crop, 8).all()  # between all pixels that are looked at
    assert outside_masks(boxes(), boxes(), 8).shape == (0, 8, 8)


@pytest.mark.parametrize("length", [224, 225, 336, 337, 640, 1001])
def test_blocks_cover_an_axis_evenly(length) -> None:
    starts = partition(length)
    gaps = [b - a for a, b in zip(starts, starts[1:], strict=False)]
    assert starts[0] == 0 and starts[-1] == length - 224
    assert all(0 < gap <= 112 for gap in gaps) and (not gaps or max(gaps) - min(gaps) <= 1)


def test_a_short_axis_has_no_blocks() -> None:
    assert partition(223) == []
    assert pyramid((200, 500)) == [] and block_boxes((200, 500)).tolist() == [[150, 0, 350, 200]]


def test_the_pyramid_goes_from_fine_to_whole_and_its_blocks_stay_near_the_image() -> None:
    sizes = [size for size, _ in pyramid(SIZE)]
    assert sizes == [(480, 640), (320, 426)]
    found = block_boxes(SIZE)
    assert len(found) == 1 + sum(len(corners) for _, corners in pyramid(SIZE))
    assert found[0].tolist() == whole_image_box(SIZE).tolist() == [80, 0, 560, 480]
    assert (found[:, :2] >= 0).all() and (found[:, 2] <= 640 + 1.5).all() and (found[:, 3] <= 480 + 1.5).all()
    assert found[-1].tolist() == [(426 - 224) * 1.5, (320 - 224) * 1.5, 426 * 1.5, 480]


def test_labels_of_blocks_need_a_positive_overlap() -> None:
    blocks = boxes([0, 0, 10, 10], [10, 0, 20, 10])
    found = block_labels(blocks, boxes([5, 5, 10, 8], [10, 10, 12, 12], [9, 1, 11, 2]), torch.tensor([0, 1, 7]), 3)
    assert found.tolist() == [[True, False, False], [False, False, False]]  # touching is not overlapping, 7 is no class
    assert block_labels(blocks, boxes(), torch.zeros(0, dtype=torch.long), 3).tolist() == [[False] * 3] * 2
