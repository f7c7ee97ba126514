"""Picture and map are seen through the same window, whatever is drawn; and batches of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from visionkd.config.schema import AugmentConfig
from visionkd.config.segmentation import SegmentationConfig
from visionkd.data.cache import build_cache, estimate_bytes
from visionkd.data.dense_transforms import DenseEvalTransform, DenseTrainTransform
from visionkd.data.loader import eval_loader, train_loader
from visionkd.errors import DataError, UnreadableImageError
from visionkd.types import IGNORE, InputSpec


def scene(seed: int = 0, size: tuple[int, int] = (48, 64)) -> tuple[Image.Image, np.ndarray]:
    """A picture whose red channel is 40 times the class of the pixel, in blocks of 8 pixels."""
    rng = np.random.default_rng(seed)
    target = np.kron(rng.integers(0, 6, (size[0] // 8, size[1] // 8)), np.ones((8, 8))).astype(np.uint8)
    pixels = np.stack([target * 40, rng.integers(0, 256, size), rng.integers(0, 256, size)], -1).astype(np.uint8)
    return Image.fromarray(pixels), target


class Scenes:
    """Pictures of several sizes, with maps; some cannot be read."""

    maps = True
    sizes = ((48, 64), (32, 40), (48, 64))

    def __init__(self, count: int = 9, bad: tuple[int, ...] = (), wrong: tuple[int, ...] = ()) -> None:
        self.count, self.bad, self.wrong = count, bad, wrong
        self.decoded = 0

    def __len__(self):
        return self.count

    def load(self, index):
        if index in self.bad:
            raise UnreadableImageError(f"cannot read '{index}'")
        return scene(index, self.sizes[index % 3])[0]

    def target(self, index):
        self.decoded += 1
        target = scene(index, self.sizes[index % 3])[1]
        return target[1:] if index in self.wrong else target

    def name(self, index):
        return f"images/{index}.png"


def view(settings: SegmentationConfig, seed: int, given=None, interpolation="nearest", **augment):
    image, target = given or scene()
    torch.manual_seed(seed)
    return DenseTrainTransform(AugmentConfig(**augment), settings, (48, 64), interpolation)(image, target)


@pytest.mark.parametrize("seed", range(8))
def test_each_pixel_keeps_its_class(seed: int) -> None:
    image, target = view(SegmentationConfig(crop_size=(40, 56)), seed)
    assert image.shape == (3, 40, 56) and target.shape == (40, 56) and image.dtype == target.dtype == torch.uint8
    known = target != IGNORE
    assert known.any() and (image[0][known] == target[known] * 40).all()
    assert (image[:, ~known].unique(dim=1) == torch.tensor([[124], [116], [104]])).all()


def test_a_crop_is_a_part_of_the_whole_picture_as_resized() -> None:
    image, target = scene()
    for seed in range(6):
        torch.manual_seed(seed)
        share, across, down, _ = torch.rand(4, dtype=torch.float64).tolist()
        size = [round(side * (1.0 + share)) for side in (48, 64)]
        whole = np.asarray(image.resize(size[::-1], Image.Resampling.BILINEAR))
        top, left = int(down * (size[0] - 31)), int(across * (size[1] - 31))
        settings = SegmentationConfig(crop_size=32, scale=(1.0, 2.0))
        found = view(settings, seed, interpolation="bilinear", hflip=0.0)[0].permute(1, 2, 0).numpy()
        difference = np.abs(found.astype(int) - whole[top : top + 32, left : left + 32])
        assert difference.max() <= 2 and (difference > 0).mean() < 0.05


def test_small_pictures_lie_anywhere_in_the_crop() -> None:
    settings = SegmentationConfig(scale=(0.5, 0.5))
    places = set()
    for seed in range(12):
        known = view(settings, seed, hflip=0.0)[1] != IGNORE
        assert known.sum() == 24 * 32
        rows, columns = torch.where(known)
        places.add((int(rows.min()), int(columns.min())))
    assert len(places) > 8 and max(place[0] for place in places) <= 24 and max(place[1] for place in places) <= 32


def test_both_are_mirrored_or_none() -> None:
    settings = SegmentationConfig(scale=(1.0, 1.0))
    plain, mirrored = view(settings, 0, hflip=0.0), view(settings, 0, hflip=1.0)
    assert all(torch.equal(left, right.flip(-1)) for left, right in zip(plain, mirrored, strict=True))
    assert torch.equal(plain[1], torch.from_numpy(scene()[1]))


def test_colours_change_in_the_picture_alone() -> None:
    settings = SegmentationConfig()
    plain, changed = view(settings, 3), view(settings, 3, color_jitter=0.8)
    assert torch.equal(plain[1], changed[1]) and not torch.equal(plain[0], changed[0])


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
def test_cached_pixels_give_the_same_view(interpolation: str) -> None:
    image, target = scene()
    cached = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    for seed in range(5):
        first = view(SegmentationConfig(), seed, (image, target), interpolation, color_jitter=0.3)
        second = view(SegmentationConfig(), seed, (cached, target), interpolation, color_jitter=0.3)
        assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_a_factor_is_against_the_size_that_evaluation_takes() -> None:
    given = scene(0, (96, 128))
    resized = view(SegmentationConfig(scale=(1.0, 1.0)), 0, given, hflip=0.0)[1]
    native = view(SegmentationConfig(scale=(1.0, 1.0), evaluation="slide"), 0, given, hflip=0.0)[1]
    assert torch.equal(resized, torch.from_numpy(given[1][1::2, 1::2]))
    rows = {bytes(row) for row in given[1].astype(np.uint8)[:, None].repeat(1, 1)[:, 0]}
    assert resized.shape == native.shape and any(bytes(native[0].numpy()) in row for row in rows)


def test_evaluation_leaves_the_map_alone() -> None:
    image, target = scene()
    spec = InputSpec(img_size=(32, 32))
    small, kept = DenseEvalTransform(spec)(image, target)
    assert small.shape == (3, 32, 32) and torch.equal(kept, torch.from_numpy(target))
    assert (small.permute(1, 2, 0).numpy() == np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR))).all()
    whole, _ = DenseEvalTransform(spec, "slide")(image, target)
    assert (whole.permute(1, 2, 0).numpy() == np.asarray(image)).all()


# Batches --------------------------------------------------------------------------------------------------------------


def batches(source, cache="none", workers=0):
    transform = DenseTrainTransform(AugmentConfig(), SegmentationConfig(crop_size=32), (48, 64))
    return list(train_loader(source, transform, batch_size=3, seed=1, workers=workers, cache=cache))


def test_training_batches() -> None:
    plain, kept, spread = batches(Scenes()), batches(Scenes(), "ram"), batches(Scenes(), workers=2)
    assert plain[0]["image"].shape == (3, 3, 32, 32) and plain[0]["target"].shape == (3, 32, 32)
    assert plain[0]["target"].dtype == torch.uint8
    for first, *others in zip(plain, kept, spread, strict=True):
        for other in others:
            assert first.keys() == other.keys() and all(torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_batches_hold_a_list_of_maps(workers: int) -> None:
    transform = DenseEvalTransform(InputSpec(img_size=(32, 32)))
    source = Scenes(bad=(4,))
    found = list(eval_loader(source, transform, batch_size=4, workers=workers))
    assert [len(batch["target"]) for batch in found] == [4, 3, 1] and found[1]["unreadable"].tolist() == [4]
    indices = [int(index) for batch in found for index in batch["index"]]
    maps = [target for batch in found for target in batch["target"]]
    assert indices == [0, 1, 2, 3, 5, 6, 7, 8]
    for index, target in zip(indices, maps, strict=True):
        assert target.dtype == torch.uint8 and torch.equal(target, torch.from_numpy(Scenes().target(index)))


def test_native_pictures_come_one_by_one() -> None:
    transform = DenseEvalTransform(InputSpec(img_size=(32, 32)), "native")
    shapes = [batch["image"].shape for batch in eval_loader(Scenes(), transform, batch_size=4, workers=0)]
    assert len(shapes) == 9 and {tuple(shape) for shape in shapes} == {(1, 3, 48, 64), (1, 3, 32, 40)}


def test_an_evaluation_batch_may_be_empty() -> None:
    transform = DenseEvalTransform(InputSpec(img_size=(32, 32)))
    (batch,) = eval_loader(Scenes(1, bad=(0,)), transform, batch_size=4, workers=0)
    assert batch["image"].shape == (0, 3, 32, 32) and batch["target"] == []


def test_maps_are_decoded_once_where_images_are_kept() -> None:
    source = Scenes(bad=(1,))
    assert estimate_bytes(source) == pytest.approx(
        4 * sum(48 * 64 if n % 3 != 1 else 32 * 40 for n in range(9)), rel=0.2
    )
    kept = build_cache(source)
    before = source.decoded
    for index in (0, 2, 8):
        assert (kept.target(index) == scene(index, Scenes.sizes[index % 3])[1]).all()
        assert (kept.load(index).permute(1, 2, 0).numpy() == np.asarray(source.load(index))).all()
    assert source.decoded == before
    with pytest.raises(UnreadableImageError, match="cannot read"):
        kept.target(1)


@pytest.mark.parametrize("cache", ["none", "ram"])
def test_different_sizes_are_named_with_the_file(cache: str) -> None:
    with pytest.raises(DataError, match=r"'images/5.png' and its map of classes differ in size: 64 x 48 and 64 x 47"):
        batches(Scenes(wrong=(5,)), cache)
