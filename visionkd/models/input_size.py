"""The input that a network was published with, and the same at another size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from visionkd.types import InputSpec

# Images this small are the whole picture already: there is no margin to crop away.
_NO_CROP_UP_TO_PX = 64


def timm_input(cfg: Mapping[str, Any], img_size: int | None) -> InputSpec:
    """Return what timm says about a network's input, at ``img_size`` where one is given."""
    interpolation = cfg.get("interpolation") or "bicubic"
    spec = InputSpec(
        img_size=tuple(cfg["input_size"][-2:]),
        mean=tuple(cfg["mean"]),
        std=tuple(cfg["std"]),
        interpolation=interpolation if interpolation in ("bilinear", "bicubic", "nearest") else "bicubic",
        crop_pct=float(cfg.get("crop_pct") or 0.875),
    )
    return spec if img_size is None else with_size(spec, (img_size, img_size))


def with_size(spec: InputSpec, img_size: tuple[int, int]) -> InputSpec:
    """Return an input at another size; small images are not cropped."""
    crop_pct = 1.0 if max(img_size) <= _NO_CROP_UP_TO_PX else spec.crop_pct
    return InputSpec(img_size, spec.mean, spec.std, spec.interpolation, crop_pct)
