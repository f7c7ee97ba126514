"""The pixels of regions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from visionkd.teachers.crops import block_crops, object_crops
from visionkd.teachers.regions import block_boxes


@pytest.fixture
def image() -> Image.Image:
    """A ramp: red tells the column, green the row, and blue that there is an image."""
    columns, rows = np.meshgrid(np.arange(200), np.arange(120))
    return Image.fromarray(np.stack([columns, rows, np.full_like(rows, 255)], axis=2).astype(np.uint8))


def test_a_crop_shows_its_square_and_its_mask_the_proposal(image) -> None:
    found = object_crops(image, torch.tensor([[90.0, 50.0, 110.0, 70.0]]), size=56, grid=14)
    assert found.crops.shape == (1, 3, 56, 56) and found.crops.dtype == torch.uint8 and found.kept.tolist() == [0]
    # 20 sqrt(8) = 56.6 pixels around (100, 60): from 71.7 and 31.7 to 128.3 and 88.3
    red, green, blue = found.crops[0].float()
    assert red.mean(0)[0].item() == pytest.approx(72, abs=1) and red.mean(0)[-1].item() == pytest.approx(127, abs=1)
    assert green.mean(1)[0].item() == pytest.approx(32, abs=1) and (blue == 255).all()
    inside = (~found.outside[0]).float()
    assert inside.sum() == 25  # the proposal takes 20 / 56.6 of a side: 5 of 14 cells
    shown = red[::4, ::4][~found.outside[0]]  # the pixels of those cells lie in the proposal
    assert shown.min() >= 88 and shown.max() <= 112


def test_what_lies_outside_the_image_is_black_and_tiny_proposals_have_no_crop(image) -> None:
    proposals = torch.tensor([[5.0, 5.0, 8.0, 50.0], [20.0, 10.0, 120.0, 110.0]])
    found = object_crops(image, proposals, size=32, grid=8)
    assert found.kept.tolist() == [1] and len(found.crops) == len(found.outside) == 1
    blue = found.crops[0, 2]
    # a square of 283 pixels around (70, 60), longer than both sides of the image
    assert (blue[0] == 0).all() and (blue[-1] == 0).all() and blue[16, 16] == 255
    none = object_crops(image, proposals[:1], size=32, grid=8)
    assert none.crops.shape == (0, 3, 32, 32) and none.outside.shape == (0, 8, 8)


def test_blocks_show_their_boxes(image) -> None:
    crops, boxes = block_crops(image, size=48, max_stride=24)
    assert torch.equal(boxes, block_boxes((120, 200), block=48, max_stride=24)) and len(crops) == len(boxes)
    assert crops.shape[1:] == (3, 48, 48)
    for crop, (x1, y1, x2, y2) in zip(crops.float(), boxes.tolist(), strict=True):
        # a ramp's mean is its middle, whatever the scale; levels are cut to whole pixels, which moves them a little
        assert crop[0].mean().item() == pytest.approx((x1 + x2 - 1) / 2, abs=2.5)
        assert crop[1].mean().item() == pytest.approx((y1 + y2 - 1) / 2, abs=2.5)
    assert boxes[0].tolist() == [40, 0, 160, 120]
    exact = np.asarray(image)[0:48, 0:48].transpose(2, 0, 1)
    assert torch.equal(crops[1], torch.from_numpy(exact.copy()))  # the finest level is the image itself


def test_an_image_smaller_than_a_block_is_one_block(image) -> None:
    crops, boxes = block_crops(image, size=224)
    assert crops.shape == (1, 3, 224, 224) and boxes.tolist() == [[40, 0, 160, 120]]
