from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from visionkd.data.duplicates import SIGNATURE, find_copies, signatures
from visionkd.data.shapes import ShapesSource
from visionkd.errors import UnreadableImageError


class Pictures:
    """Images in memory; None cannot be read."""

    def __init__(self, images) -> None:
        self.images = list(images)

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int) -> Image.Image:
        if self.images[index] is None:
            raise UnreadableImageError("broken")
        return self.images[index]

    def target(self, index: int) -> int:
        return -1

    def name(self, index: int) -> str:
        return f"{index}.png"


def texture(seed: int, size: tuple[int, int] = (96, 72)) -> Image.Image:
    """Noise with the spectrum of a natural image: clouds at all scales, coloured."""
    width, height = size
    rng = np.random.default_rng(seed)
    radius = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.rfftfreq(width) * width)
    noise = [
        np.fft.irfft2(np.fft.rfft2(rng.normal(size=(height, width))) / np.maximum(radius, 1) ** 1.2) for _ in "rgb"
    ]
    pixels = np.stack([noise[0] + 0.4 * plane for plane in noise], axis=-1)
    pixels = (pixels - pixels.mean()) / pixels.std() * 50 + 128
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return Image.open(stream).convert("RGB")


def trimmed(image: Image.Image, share: float, x: float = 0.5, y: float = 0.5) -> Image.Image:
    width, height = round(image.width * share), round(image.height * share)
    left, top = round((image.width - width) * x), round((image.height - height) * y)
    return image.crop((left, top, left + width, top + height)).resize(image.size)


COPIES = {
    "exact": lambda image: image.copy(),
    "jpeg": lambda image: jpeg(image, 40),
    "smaller": lambda image: image.resize((image.width // 2, image.height // 2)),
    "larger": lambda image: image.resize((image.width * 2, image.height * 2)),
    "stretched": lambda image: image.resize((round(image.width * 1.2), image.height)),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.25),
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.6),
    "contrast": lambda image: ImageEnhance.Contrast(image).enhance(1.3),
    "grey": lambda image: image.convert("L").convert("RGB"),
    "trimmed": lambda image: trimmed(image, 0.95),
    "trimmed at a corner": lambda image: trimmed(image, 0.96, 0, 1),
    "mirrored": ImageOps.mirror,
    "everything": lambda image: jpeg(ImageEnhance.Brightness(trimmed(image, 0.96, 0.3, 0.6)).enhance(1.1), 60),
}


@pytest.fixture(scope="module")
def originals() -> list[Image.Image]:
    return [texture(seed) for seed in range(24)]


@pytest.fixture(scope="module")
def known(originals) -> np.ndarray:
    return signatures(Pictures(originals))


@pytest.mark.parametrize("kind", COPIES)
def test_an_edited_copy_is_found_and_told_whose_copy_it_is(originals, known, kind):
    copies = signatures(Pictures([COPIES[kind](image) for image in originals]))
    assert find_copies(copies, known).tolist() == list(range(len(originals)))


def test_small_pictures_are_compared_as_well():
    small = [texture(seed, (32, 32)) for seed in range(16)]
    for kind in ("jpeg", "brighter", "trimmed", "mirrored"):
        copies = signatures(Pictures([COPIES[kind](image) for image in small]))
        assert find_copies(copies, signatures(Pictures(small))).tolist() == list(range(16)), kind


def test_other_pictures_are_not_copies(known):
    assert (find_copies(signatures(Pictures([texture(seed) for seed in range(100, 180)])), known) == -1).all()


def test_scenes_of_the_same_few_shapes_are_told_apart():
    scenes = signatures(ShapesSource(0, 120, 48))
    found = find_copies(scenes, signatures(ShapesSource(0, 120, 48, first=1 << 40)))
    assert (found >= 0).mean() < 0.03


def test_mirrored_copies_only_where_they_are_looked_for(originals, known):
    mirrored = signatures(Pictures([ImageOps.mirror(image) for image in originals]))
    assert (find_copies(mirrored, known, mirrored=False) == -1).all()


def test_the_most_similar_original_is_named(originals):
    twins = signatures(Pictures([jpeg(originals[0], 30), originals[1], originals[0]]))
    assert find_copies(signatures(Pictures([jpeg(originals[0], 90)])), twins).tolist() == [2]


def test_plain_and_unreadable_pictures_are_like_no_other_but_plain_copies_are_found():
    plain = [Image.new("RGB", (40, 40), color) for color in ("black", "white", "red")]
    known = signatures(Pictures([*plain, None]))
    pool = signatures(Pictures([Image.new("RGB", (40, 40), "blue"), None, plain[2].copy(), jpeg(plain[0], 50)]))
    assert find_copies(pool, known).tolist() == [-1, -1, 2, 0]  # a JPEG of plain black is black to the pixel
    assert pool["digest"][1] == 0 and (pool["digest"][[0, 2]] != 0).all()


def test_a_part_has_the_signatures_of_the_whole(originals, known):
    source = Pictures(originals)
    parts = [signatures(source, 0, 10), signatures(source, 10, 11), signatures(source, 11)]
    assert np.array_equal(np.concatenate(parts), known)
    assert signatures(source, 5, 5).dtype == SIGNATURE and not len(signatures(source, 5, 5))


def test_nothing_to_compare_with(known):
    assert (find_copies(known, known[:0]) == -1).all() and not len(find_copies(known[:0], known))


def test_signatures_are_small():
    assert SIGNATURE.itemsize < 1300
