"""Views of a picture together with its boxes.

As in :mod:`visionkd.data.transforms`, pictures may be PIL images or uint8 tensors from the memory cache, with the same
result to the bit, and all randomness comes from torch's default generator, which the loader sets anew for each sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from visionkd.config.detection import DetectionConfig
from visionkd.config.schema import AugmentConfig
from visionkd.data.dense_transforms import _resized_part
from visionkd.data.transforms import _size_of, _to_tensor, to_pil
from visionkd.runtime.preprocess import fill_colour, letterbox
from visionkd.types import InputSpec

#: Least side of a box in a view, in pixels: less cannot be told from nothing.
_LEAST_SIDE = 1.0


class BoxTrainTransform:
    """The random view of a training picture and its boxes: a part, scale, colour jitter, flip, in this order.

    The picture lies at the upper left of the view; what it does not cover shows the network's mean colour, as
    :func:`visionkd.runtime.preprocess.letterbox` does at evaluation. Only what is shown is resized.

    Args:
        augment: ``hflip`` and ``color_jitter`` are used here.
        settings: How parts and sizes are drawn, and which boxes are left in a part.
        spec: The network's input; ``img_size`` is that of the views.
        img_size: Another height and width of the views.
    """

    #: Called with a picture and its boxes, and answers with a target that has ``geometry``.
    boxed = True

    def __init__(
        self,
        augment: AugmentConfig,
        settings: DetectionConfig,
        spec: InputSpec,
        img_size: tuple[int, int] | None = None,
    ) -> None:
        #: Height and width of the views.
        self.img_size = (int((img_size or spec.img_size)[0]), int((img_size or spec.img_size)[1]))
        self.settings = settings
        self.hflip = augment.hflip
        self.interpolation = spec.interpolation
        self._blank = np.broadcast_to(fill_colour(spec), (*self.img_size, 3))
        strength = augment.color_jitter
        self.colour = v2.ColorJitter(brightness=strength, contrast=strength, saturation=strength) if strength else None
        self._part = v2.RandomIoUCrop() if settings.iou_crop else None

    def __call__(self, image: Image.Image | Tensor, target: Mapping[str, np.ndarray]) -> tuple[Tensor, dict[str, Any]]:
        """Draw a view.

        Args:
            image: RGB picture of any size.
            target: ``boxes``, N x 4 in pixels of the picture, ``labels``, N, and ``crowd``, N.

        Returns:
            A uint8 tensor 3 x H x W, and the target of the view: ``boxes``, n x 4 of float32 in its pixels, ``labels``
            and ``crowd`` of those that it shows, and ``geometry``, 4 of float32: factor and shift of what lies across,
            then of what lies down, which bring pixels of the picture to those of the view.
        """
        # Always five numbers, used or not: a view then does not change when another option is turned off.
        zoom, across, down, flip, part = torch.rand(5, dtype=torch.float64).tolist()
        boxes = torch.from_numpy(np.array(target["boxes"], np.float32).reshape(-1, 4))
        height, width = _size_of(image)
        left, top, right, bottom = 0, 0, width, height
        if self._part is not None and len(boxes) and part < self.settings.iou_crop:
            left, top, right, bottom = self._drawn_part(boxes, (height, width))
        low, high = self.settings.scale
        fit = min(self.img_size[0] / (bottom - top), self.img_size[1] / (right - left))
        factor = fit * (low + zoom * (high - low))
        full = [max(1, round((bottom - top) * factor)), max(1, round((right - left) * factor))]
        rows, columns = (
            _window(whole, most, chance)
            for whole, most, chance in zip(full, self.img_size, (down, across), strict=True)
        )
        # Pixels of the view for each pixel of the picture; whole numbers of pixels make the two differ a little.
        scale_y, scale_x = full[0] / (bottom - top), full[1] / (right - left)
        shown = (columns[1] - columns[0], rows[1] - rows[0])
        box = (
            left + columns[0] / scale_x,
            top + rows[0] / scale_y,
            min(left + columns[1] / scale_x, right),
            min(top + rows[1] / scale_y, bottom),
        )
        view = _resized_part(image, box, shown, self.interpolation)
        if self.colour is not None:
            view = self.colour(view)
        shift_x, shift_y = -left * scale_x - columns[0], -top * scale_y - rows[0]
        if flip < self.hflip:
            view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            scale_x, shift_x = -scale_x, shown[0] - shift_x
        pixels = self._blank.copy()
        pixels[: shown[1], : shown[0]] = np.asarray(view)
        geometry = torch.tensor([scale_x, shift_x, scale_y, shift_y], dtype=torch.float32)
        return torch.from_numpy(pixels).permute(2, 0, 1), {
            **_shown_boxes(boxes, target, geometry, shown, self.settings.min_visible),
            "geometry": geometry,
        }

    def _drawn_part(self, boxes: Tensor, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Return left, top, right and bottom of a part that overlaps a box, as SSD draws it."""
        whole = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size)
        assert self._part is not None
        found = self._part.make_params([torch.empty(3, *size, device="meta"), whole])
        if not found:  # no part is wanted this time
            return 0, 0, size[1], size[0]
        return found["left"], found["top"], found["left"] + found["width"], found["top"] + found["height"]


class BoxEvalTransform:
    """The one view of a picture at evaluation, the same as on a device; its boxes stay in pixels of the picture.

    Args:
        spec: The network's input.
    """

    boxed = True

    def __init__(self, spec: InputSpec) -> None:
        self.spec = spec
        self.img_size = tuple(spec.img_size)

    def __call__(self, image: Image.Image | Tensor, target: Mapping[str, np.ndarray]) -> tuple[Tensor, dict[str, Any]]:
        """Return the picture as a uint8 tensor 3 x H x W, and its target with ``scale``, pixels of the view for each
        pixel of the picture, and ``size``, height and width of the picture."""
        array, scale = letterbox(to_pil(image), self.spec)
        tensors = {name: torch.from_numpy(np.array(target[name])) for name in ("boxes", "labels", "crowd")}
        return _to_tensor(array), {
            **tensors,
            "scale": torch.tensor(scale, dtype=torch.float64),
            "size": torch.tensor(_size_of(image)),
        }


def moved_boxes(boxes: Tensor, geometry: Tensor) -> Tensor:
    """Bring boxes from pixels of a picture to those of a view.

    Args:
        boxes: N x 4: left, top, right, bottom.
        geometry: As a training target has it, 4.

    Returns:
        N x 4, which may reach outside of the view.
    """
    scale_x, shift_x, scale_y, shift_y = geometry.to(boxes).unbind()
    left, top, right, bottom = boxes.unbind(-1)
    across = torch.stack([left * scale_x + shift_x, right * scale_x + shift_x], -1).sort(-1).values
    down = torch.stack([top, bottom], -1) * scale_y + shift_y
    return torch.stack([across[..., 0], down[..., 0], across[..., 1], down[..., 1]], -1)


def _shown_boxes(
    boxes: Tensor, target: Mapping[str, np.ndarray], geometry: Tensor, shown: tuple[int, int], min_visible: float
) -> dict[str, Tensor]:
    """Return the boxes of which a view shows enough, cut at its edge."""
    moved = tv_tensors.BoundingBoxes(moved_boxes(boxes, geometry), format="XYXY", canvas_size=(shown[1], shown[0]))
    cut = F.clamp_bounding_boxes(moved).as_subclass(Tensor)
    before, after = (
        (each[:, 2:] - each[:, :2]).clamp(min=0).prod(1) for each in (moved.as_subclass(Tensor), cut)
    )
    sides = cut[:, 2:] - cut[:, :2]
    # A box that was too small from the first goes as well.
    kept = (after >= min_visible * before) & (sides >= _LEAST_SIDE).all(1)
    rest = {name: torch.from_numpy(np.array(target[name]))[kept] for name in ("labels", "crowd")}
    return {"boxes": cut[kept], **rest}


def _window(whole: int, most: int, chance: float) -> tuple[int, int]:
    """First and last place that is shown of a side; all of it where it is short enough."""
    start = int(chance * (max(0, whole - most) + 1))
    return start, min(start + most, whole)
