"""Latency of a candidate, measured on this machine."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

from visionkd.benchmark.latency import measure, ort_runner
from visionkd.benchmark.torch_runner import torch_runner
from visionkd.export.onnx import export_onnx
from visionkd.models.network import Network

BACKENDS = ("torch", "onnxruntime", "onnxruntime-int8")
_ROUNDS = 5


def latency_ms(network: Network, backend: str, image: Tensor) -> float:
    """Return the median latency of one image on one thread in milliseconds.

    Args:
        network: Its weights may be random: they take as long as others.
        backend: One of :data:`BACKENDS`. ``onnxruntime-int8`` quantises the network first.
        image: B x 3 x H x W in [0, 1], which ranges of activations are taken from.

    Raises:
        WorkError: If the network cannot be exported or quantised.
    """
    network.eval()
    if backend == "torch":
        return measure([torch_runner(network, name="candidate")], rounds=_ROUNDS)[0].latency_ms
    rewrite = None
    if backend == "onnxruntime-int8":
        network, rewrite = _int8(network, image)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "candidate.onnx"
        export_onnx(network, file, task="classification", classes=None, metrics={}, rewrite=rewrite)
        return measure([ort_runner(file, name="candidate")], rounds=_ROUNDS)[0].latency_ms


def _int8(network: Network, image: Tensor) -> tuple[Network, Any]:
    """Return the network in INT8, and what makes its graph one that processors are fast at."""
    from visionkd.export.qdq import float_results, to_target
    from visionkd.export.ranges import measure_ranges
    from visionkd.models.normalize import resize
    from visionkd.quantization.calibration import calibrate
    from visionkd.quantization.insert import Int8Scheme, quantize_network

    quantized = quantize_network(network, scheme=Int8Scheme())
    calibrate(quantized, [image], min_images=len(image))
    own_size = resize(image, network.input.img_size, network.input.interpolation).numpy()

    def rewrite(model: Any) -> None:
        to_target(model, "cpu", measure_ranges(model, float_results(model), [own_size]))

    return quantized, rewrite
