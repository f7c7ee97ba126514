"""``zoo:`` names, where a device runs what they stand for."""

from __future__ import annotations

import os
from typing import Literal

from visionkd import registry

PREFIX = "zoo:"


def is_zoo_name(model: str) -> bool:
    """Tell whether a MODEL is a ``zoo:`` name."""
    return os.fspath(model).strip().startswith(PREFIX)


def local_model(model: str, *, use: Literal["torch", "onnx", "any"] = "any") -> str:
    """Return the MODEL that a ``zoo:`` name stands for, fetched if it is not here; other MODELs as they are.

    Args:
        model: Any MODEL.
        use: Whether the caller runs networks in torch, ONNX files, or either.

    Raises:
        RequestError: If the zoo has no such model, or it cannot be used so.
        DownloadError: If it is not to be had.
    """
    if not is_zoo_name(model):
        return model
    return registry.load("visionkd.hub", "pull", key="zoo").resolve(model, use=use)  # by name, as hub/ stands above
