from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def _picture(seed: int, size: tuple[int, int] = (20, 16)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def _make_folder(root: Path, layout: dict[str, int], *, size: tuple[int, int] = (20, 16)) -> Path:
    seed = 0
    for folder, count in layout.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            _picture(seed, size).save(root / folder / f"{number:03d}.png")
            seed += 1
    return root


@pytest.fixture
def picture() -> Callable[..., Image.Image]:
    """A function from a seed to a picture of random pixels."""
    return _picture


@pytest.fixture
def make_folder() -> Callable[..., Path]:
    """A function that writes so many PNGs, all different, to each of some folders below a root."""
    return _make_folder


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    return _make_folder(tmp_path / "pets", {"cat": 10, "dog": 20})


@pytest.fixture
def split(tmp_path: Path) -> Path:
    return _make_folder(tmp_path / "pets", {"train/cat": 6, "train/dog": 7, "val/cat": 2, "val/dog": 3})
