from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def picture(seed: int, size: tuple[int, int] = (20, 16)) -> Image.Image:
    """A picture of random pixels: no two seeds give the same file."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def make_folder(root: Path, layout: dict[str, int], *, size: tuple[int, int] = (20, 16)) -> Path:
    """Write ``count`` PNGs below ``root/<folder>`` for each entry of ``layout``."""
    seed = 0
    for folder, count in layout.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            picture(seed, size).save(root / folder / f"{number:03d}.png")
            seed += 1
    return root


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "pets", {"cat": 10, "dog": 20})


@pytest.fixture
def split(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "pets", {"train/cat": 6, "train/dog": 7, "val/cat": 2, "val/dog": 3})
