"""How operators of visionkd's own are written in ONNX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from visionkd.models.detection.two_stages import NONE


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return for each operator what writes it, as ``torch.onnx.export`` takes it."""
    return {torch.ops.visionkd.uncovered.default: _uncovered}


def _uncovered(boxes: Any, scores: Any, threshold: float, most: int) -> Any:
    """Boxes are B x N x 4, scores B x N: those that are kept are put where they were, in a row of :data:`NONE`."""
    from onnxscript.onnx_opset import opset18 as op

    found = op.NonMaxSuppression(  # rows of image, class, box
        boxes,
        op.Unsqueeze(scores, op.Constant(value_ints=[1])),
        op.Constant(value_ints=[most]),
        op.Constant(value_floats=[threshold]),
        op.Constant(value_floats=[NONE / 2]),
    )
    places = op.Gather(found, op.Constant(value_ints=[0, 2]), axis=1)
    none = op.Expand(op.Constant(value_floats=[NONE]), op.Shape(scores))
    return op.ScatterND(none, places, op.GatherND(scores, places))
