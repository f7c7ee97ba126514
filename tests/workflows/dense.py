"""A folder of scenes with a class for each pixel, and runs of a second on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("ground", "red", "blue")
_COLORS = np.array([[60, 60, 60], [220, 40, 40], [40, 60, 220]])
#: Settings of a run of a second.
TINY = ("data.workers=0", "training.batch_size=4", "optimizer.lr=0.004")


def write_scenes(root: Path, *, train: int = 12, val: int = 7, classes: tuple[str, ...] = CLASSES) -> Path:
    """Write pictures of different sizes with a red and a blue box each, and a strip without labels."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for kind in ("images", "labels"):
            (root / split / kind).mkdir(parents=True)
        for number in range(count):
            height, width = rng.integers(40, 70, 2)
            label = np.zeros((height, width), np.uint8)
            for value in (1, 2):
                y, x = rng.integers(0, height - 16), rng.integers(0, width - 16)
                label[y : y + rng.integers(10, 25), x : x + rng.integers(10, 25)] = value
            pixels = np.clip(_COLORS[label] + rng.normal(0, 25, (height, width, 3)), 0, 255).astype(np.uint8)
            label[:2] = 255
            Image.fromarray(pixels).save(root / split / "images" / f"{number}.png")
            Image.fromarray(label).save(root / split / "labels" / f"{number}.png")
    (root / "classes.txt").write_text("\n".join(classes) + "\n")
    return root
