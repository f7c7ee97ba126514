"""Pictures of what a learned augmentation does, kept over the training: ``augmentations/step_<step>.png``.

The upper row holds clean training images, always the same ones, the lower row the same images augmented, always with
the same noise. The file's text entry ``augmentation`` holds the step, the parameters learned by then and what the
networks answer to each picture, as JSON; the report shows all of it.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from visionkd.files import write_bytes
from visionkd.methods._optimizer import Budget

FOLDER = "augmentations"
TEXT_KEY = "augmentation"
_IMAGES = 8
_TIMES = 8
_LARGEST = 96  # pixels of a picture's longer side


class Pictures:
    """When to take pictures, and of what.

    Args:
        budget: Length of the training: pictures are taken at its start, its end, and evenly between.
    """

    def __init__(self, budget: Budget) -> None:
        self.steps_per_epoch = budget.steps_per_epoch
        total = budget.steps_per_epoch * budget.epochs
        self.moments = frozenset(round(total * number / _TIMES) for number in range(_TIMES + 1))
        #: uint8, N x 3 x H x W on the CPU: the first images of the run.
        self.images: Tensor | None = None

    def keep(self, image: Tensor) -> None:
        """Remember the first images that come, B x 3 x H x W in [0, 1]."""
        if self.images is None:
            self.images = (image[:_IMAGES].detach().float() * 255.0).round().to("cpu", torch.uint8).contiguous()

    def path(self, directory: Path, step: int) -> Path:
        return directory / FOLDER / f"step_{step:07d}.png"

    def write(self, directory: Path, step: int, augmented: Tensor, facts: Mapping[str, Any]) -> None:
        """Write the strip of a step.

        Args:
            directory: The run's.
            step: Optimiser steps done.
            augmented: The kept images, augmented, N x 3 x H x W in [0, 1].
            facts: What else to say, ready for JSON.
        """
        assert self.images is not None
        rows = [_row(self.images.float() / 255.0), _row(augmented.detach().float().cpu())]
        strip = (torch.cat(rows, dim=1).clamp(0, 1) * 255.0).round().to(torch.uint8)
        text = PngInfo()
        count = len(self.images)
        content = {"step": step, "epoch": step / self.steps_per_epoch, "images": count, **facts}
        text.add_itxt(TEXT_KEY, json.dumps(content))
        out = io.BytesIO()
        Image.fromarray(strip.permute(1, 2, 0).numpy()).save(out, "PNG", pnginfo=text)
        write_bytes(self.path(directory, step), out.getvalue())


def _row(images: Tensor) -> Tensor:
    """Return images side by side, 3 x H x (N * W), at most so large as a strip wants them."""
    longer = max(images.shape[-2:])
    if longer > _LARGEST:
        size = [max(1, round(side * _LARGEST / longer)) for side in images.shape[-2:]]
        images = F.interpolate(images, size=size, mode="bilinear", antialias=True, align_corners=False)
    return torch.cat(list(images), dim=2)
