from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from visionkd.config.schema import AugmentConfig
from visionkd.data.transforms import EvalTransform, TrainTransform, _random_box, to_array, to_pil
from visionkd.runtime.preprocess import preprocess
from visionkd.types import InputSpec


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def as_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


EVERYTHING = AugmentConfig(color_jitter=0.4, randaugment_ops=2, random_erasing=1.0)


@pytest.mark.parametrize("crop", ["resized", "padded", "none"])
@pytest.mark.parametrize("size", [(40, 60), (32, 32), (20, 100), (1, 7)])
def test_output_is_a_tensor_of_the_asked_size(crop, size):
    for augment in (AugmentConfig(crop=crop), EVERYTHING.model_copy(update={"crop": crop})):
        for img_size in (32, (24, 48)):
            out = TrainTransform(augment, img_size)(noise(*size))
            assert out.dtype == torch.uint8 and out.permute(1, 2, 0).is_contiguous()
            assert tuple(out.shape) == (3, *((32, 32) if img_size == 32 else img_size))


@pytest.mark.parametrize("crop", ["resized", "padded", "none"])
def test_cached_tensors_and_images_give_the_same_views(crop):
    transform = TrainTransform(EVERYTHING.model_copy(update={"crop": crop}), 32)
    for seed in range(20):
        image = noise(32 + seed % 2, 40, seed)
        torch.manual_seed(seed)
        first = transform(image)
        torch.manual_seed(seed)
        assert torch.equal(first, transform(as_tensor(image)))


def test_views_follow_the_default_generator():
    transform, image = TrainTransform(EVERYTHING, 32), noise(32, 32)
    views = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        views.append(transform(image))
    assert torch.equal(views[0], views[1]) and not torch.equal(views[0], views[2])


def test_input_is_not_written_to():
    image = as_tensor(noise(32, 32))
    before = image.clone()
    for crop in ("padded", "none", "resized"):
        TrainTransform(EVERYTHING.model_copy(update={"crop": crop}), 32)(image)
    assert torch.equal(image, before)


def test_crop_is_chosen_by_size():
    assert (
        TrainTransform(AugmentConfig(), 64).crop == "padded" and TrainTransform(AugmentConfig(), 65).crop == "resized"
    )
    assert (
        TrainTransform(AugmentConfig(), 32).padding == 4 and TrainTransform(AugmentConfig(padding=1), 32).padding == 1
    )


def test_padded_crop_is_a_shift_with_black_borders():
    """Every view is a window of the padded image, all windows and both flips occur, and equally often."""
    image = noise(8, 8)
    padded = np.pad(np.asarray(image), ((1, 1), (1, 1), (0, 0)))
    windows = {
        (side[top : top + 8, left : left + 8]).tobytes(): (top, left, flip)
        for flip, side in enumerate((padded, padded[:, ::-1]))
        for top in range(3)
        for left in range(3)
    }
    transform = TrainTransform(AugmentConfig(padding=1), 8)
    torch.manual_seed(0)
    seen = [windows[transform(image).permute(1, 2, 0).numpy().tobytes()] for _ in range(7200)]
    counts = np.array([seen.count(window) for window in windows.values()])
    assert counts.min() > 320 and counts.max() < 480  # 400 expected, standard deviation 20


def test_padding_beyond_the_image_leaves_some_of_it():
    transform = TrainTransform(AugmentConfig(padding=100), 8)
    white = Image.new("RGB", (8, 8), "white")
    torch.manual_seed(0)
    assert all(transform(white).any() for _ in range(500))


@pytest.mark.parametrize("hflip, expected", [(0.0, 0), (0.5, 500), (1.0, 1000)])
def test_flips(hflip, expected):
    image = noise(8, 8)
    transform = TrainTransform(AugmentConfig(crop="none", hflip=hflip), 8)
    torch.manual_seed(0)
    flipped = sum(not np.array_equal(transform(image).permute(1, 2, 0), image) for _ in range(1000))
    assert abs(flipped - expected) < 60


def test_random_boxes_have_the_asked_areas_and_aspects():
    torch.manual_seed(0)
    boxes = np.array([_random_box(400, 600, (0.08, 1.0)) for _ in range(4000)], dtype=float)
    left, top, width, height = boxes.T
    assert left.min() >= 0 and top.min() >= 0 and (left + width).max() <= 600 and (top + height).max() <= 400
    area, aspect = width * height / 240_000, width / height
    assert 0.078 < area.min() < 0.1 and 0.85 < area.max() < 0.9
    assert 0.74 < aspect.min() < 0.78 and 1.28 < aspect.max() < 1.35
    # The same distribution as torchvision's.
    theirs = np.array(
        [v2.RandomResizedCrop.make_params(v2.RandomResizedCrop(1), [Image.new("RGB", (600, 400))]) for _ in range(4000)]
    )
    their_area = np.array([box["width"] * box["height"] / 240_000 for box in theirs])
    np.testing.assert_allclose(np.quantile(area, [0.1, 0.5, 0.9]), np.quantile(their_area, [0.1, 0.5, 0.9]), atol=0.04)


def test_box_of_an_extreme_image_is_the_middle():
    left, top, width, height = _random_box(1000, 10, (0.9, 1.0))
    assert (left, width) == (0, 10) and height == 13 and top == 493


def test_resized_crop_of_the_whole_is_a_resize():
    transform = TrainTransform(AugmentConfig(crop="resized", scale=(1.0, 1.0), hflip=0.0), 20, "bicubic")
    image = noise(40, 40)
    torch.manual_seed(0)
    views = [transform(image).permute(1, 2, 0).numpy() for _ in range(60)]
    whole = np.asarray(image.resize((20, 20), Image.Resampling.BICUBIC))
    assert any(np.array_equal(view, whole) for view in views)


def test_erasing_covers_a_share_of_the_image():
    transform = TrainTransform(AugmentConfig(crop="none", hflip=0.0, random_erasing=1.0), 64)
    torch.manual_seed(0)
    shares = [float((transform(Image.new("RGB", (64, 64))).amax(0) > 0).float().mean()) for _ in range(200)]
    assert 0.01 < min(shares) < 0.06 and 0.25 < max(shares) < 0.37


def test_conversions():
    image = noise(5, 7)
    assert to_array(as_tensor(image)).tobytes() == image.tobytes() == to_pil(as_tensor(image)).tobytes()
    assert to_pil(image) is image


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
@pytest.mark.parametrize("size", [(300, 400), (400, 301), (224, 224), (50, 70), (333, 333)])
@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 0.95, 1.0])
def test_eval_equals_the_device_and_torchvision_to_the_bit(interpolation, size, crop_pct):
    spec = InputSpec(img_size=(96, 96), interpolation=interpolation, crop_pct=crop_pct)
    image = noise(*size)
    ours = EvalTransform(spec)(image)
    np.testing.assert_array_equal(ours.permute(1, 2, 0).numpy(), preprocess(image, spec))
    theirs = v2.Compose(
        [v2.Resize(int(96 / crop_pct), v2.InterpolationMode(interpolation)), v2.CenterCrop(96), v2.PILToTensor()]
    )
    assert torch.equal(ours, theirs(image))
    assert torch.equal(ours, EvalTransform(spec)(as_tensor(image)))


def test_eval_of_an_image_that_fits_changes_nothing():
    image = noise(32, 32)
    assert torch.equal(EvalTransform(InputSpec(img_size=(32, 32), crop_pct=1.0))(image), as_tensor(image))
