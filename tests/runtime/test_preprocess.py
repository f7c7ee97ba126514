from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from visionkd.errors import RequestError
from visionkd.runtime.preprocess import preprocess, to_batch
from visionkd.types import InputSpec


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (97, 97), (32, 32), (20, 50), (33, 32)])
@pytest.mark.parametrize(
    ("img_size", "crop_pct", "interpolation"),
    [(32, 1.0, "bilinear"), (64, 0.875, "bicubic"), (56, 56 / 58, "bilinear")],
)
def test_it_is_torchvisions_evaluation_to_the_bit(
    size: tuple[int, int], img_size: int, crop_pct: float, interpolation: str
) -> None:
    image = picture(*size)
    spec = InputSpec(img_size=(img_size, img_size), interpolation=interpolation, crop_pct=crop_pct)
    resized = int(img_size / crop_pct + 1e-9)
    steps = [v2.Resize(resized, InterpolationMode(interpolation), antialias=True), v2.CenterCrop(img_size)]
    expected = np.asarray(v2.Compose(steps)(image))
    assert np.array_equal(preprocess(image, spec), expected)


def test_sizes_that_are_not_square() -> None:
    spec = InputSpec(img_size=(32, 64), crop_pct=1.0)
    assert preprocess(picture(100, 100), spec).shape == (32, 64, 3)
    assert preprocess(picture(300, 40), spec).shape == (32, 64, 3)


def test_the_batch_is_what_training_sees() -> None:
    arrays = [np.asarray(picture(8, 6)), np.asarray(picture(8, 6))]
    batch = to_batch(arrays)
    expected = torch.stack([torch.from_numpy(a.transpose(2, 0, 1).copy()) for a in arrays]).float().div_(255.0)
    assert batch.dtype == np.float32 and batch.flags.c_contiguous and np.array_equal(batch, expected.numpy())


def test_an_unknown_interpolation_is_named() -> None:
    with pytest.raises(RequestError, match="'sinc'.*bicubic"):
        preprocess(picture(8, 8), InputSpec(interpolation="sinc"))
