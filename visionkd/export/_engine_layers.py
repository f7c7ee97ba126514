"""What the engine inspector tells: how many layers compute in INT8, and how many only change formats."""

from __future__ import annotations

import json
from typing import Any


def count_layers(text: str) -> dict[str, int]:
    """Count the layers in the inspector's JSON.

    Returns:
        ``total``; ``int8``, those with an INT8 input or weights; ``reformat``, copies between formats. Empty
        where the text is not understood.
    """
    try:
        layers = list(json.loads(text)["Layers"])
    except (ValueError, KeyError, TypeError):
        return {}
    found = {"total": len(layers), "int8": 0, "reformat": 0}
    for layer in layers:
        if not isinstance(layer, dict):  # names only: the engine was built without detail
            return {"total": len(layers)}
        if str(layer.get("LayerType", "")).lower() == "reformat":
            found["reformat"] += 1
        elif _is_int8(layer):
            found["int8"] += 1
    return found


def _is_int8(layer: dict[str, Any]) -> bool:
    inputs = [str(tensor.get("Format/Datatype", "")).lower() for tensor in layer.get("Inputs", ()) if tensor]
    weights = layer.get("Weights")
    if isinstance(weights, dict):
        inputs.append(str(weights.get("Type", "")).lower())
    return any("int8" in kind for kind in inputs)
