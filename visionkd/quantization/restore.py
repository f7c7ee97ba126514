"""Rebuild a quantised network from what its package says."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from visionkd.errors import DataError
from visionkd.models.network import Network
from visionkd.quantization.fold import fold_quantized
from visionkd.quantization.insert import Int8Scheme, freeze, int8_layers, quantize_network


def restore(network: Network, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Network:
    """Return ``network`` quantised as ``spec`` says, with the tensors of its package.

    Args:
        network: Of the same architecture, in float; its weights are replaced.
        spec: Entry ``quantization`` of ``model.json``.
        tensors: All tensors of the package by name.

    Raises:
        DataError: If the package does not fit, or comes from a newer version.
    """
    kind = spec.get("kind")
    if kind == "packed":
        return importlib.import_module("visionkd.quantization.packing").restore(network, spec, tensors)
    if kind != "int8":
        raise DataError(
            f"This model is quantised as '{kind}', which this version does not know",
            hint="Update visionkd: pip install --upgrade visionkd",
        )
    quantized = quantize_network(network, scheme=Int8Scheme.from_dict(spec["scheme"]))
    if spec.get("folded"):
        quantized = fold_quantized(quantized)  # for its layers: all values are replaced below
    missing, unexpected = quantized.net.load_state_dict(dict(tensors), strict=False)
    if missing or unexpected:
        words = [f"lacks {missing[0]}" if missing else "", f"holds {unexpected[0]}" if unexpected else ""]
        raise DataError(
            f"The quantised '{network.architecture}' of this package {' and '.join(filter(None, words))}",
            hint="It was made by another version of timm or torchvision; quantise the float model again.",
        )
    for name, tensor in tensors.items():
        if name.endswith("scale") and "quantizer" in name and not bool((tensor.isfinite() & (tensor > 0)).all()):
            raise DataError(f"The scale '{name}' of this package is no positive number", hint="Quantise it again.")
    for layer in int8_layers(quantized).values():
        layer.weight_quantizer.frozen = True
    freeze(quantized)
    return quantized
