"""Export to INT8: quantised where it is not yet, gated, compared with PyTorch, timed beside its float twin."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from visionkd.benchmark.latency import measure, ort_runner
from visionkd.config.int8 import Int8Config
from visionkd.data.subset import stratified_subset
from visionkd.errors import Problem, RequestError
from visionkd.export import gate
from visionkd.export.accuracy import Truth
from visionkd.export.answers import difference
from visionkd.export.int8_graph import is_int8
from visionkd.export.onnx import export_onnx, portable
from visionkd.export.qdq import MIN_OPSET, Target, float_results, to_target
from visionkd.export.ranges import measure_ranges
from visionkd.export.verify import Verification, verify_int8
from visionkd.models.network import Network
from visionkd.quantization.insert import float_layers, float_network
from visionkd.types import Listener, Source
from visionkd.workflows._export_onnx import accuracies, of_pixels, record, verification_images
from visionkd.workflows._int8 import quantize_student
from visionkd.workflows._networks import image_batches
from visionkd.workflows.results import ExportResult

#: Names of INT8 files by target.
INT8_FILES = {"cpu": "model.int8.onnx", "tensorrt": "model.int8.tensorrt.onnx"}
_ROUNDS = 10
_RANGE_IMAGES = 128
_SENSITIVITY_IMAGES = 32
_SHOWN = 5


def export_int8(
    network: Network,
    path: Path,
    *,
    target: Target,
    source: Source | None,
    calibration: Source | None,
    verify_images: int,
    columns: Any = None,
    opset: int | None = None,
    max_drop: float = gate.MAX_DROP,
    min_speedup: float = gate.MIN_SPEEDUP,
    int8: Int8Config | None = None,
    reference: Network | None = None,
    metrics: Mapping[str, float] | None = None,
    listener: Listener,
) -> ExportResult:
    """Write ``network`` as INT8 for ``target``, or nothing where it does not pass the gate.

    Args:
        network: In float, and quantised here then (post-training); or quantised to INT8 already.
        path: File to write.
        target: ``cpu`` or ``tensorrt``.
        source: Images to compare and to measure accuracy on; None takes random ones.
        calibration: Images to find ranges on.
        verify_images: Images of ``source`` to use.
        columns: Output of each class of ``source``; None where they are the same.
        opset: ONNX operator set.
        max_drop: Largest loss of accuracy (top-1, mIoU or AP) against the float twin, in points.
        min_speedup: Least speed-up against the float twin; ``cpu`` alone is timed.
        int8: Settings of the quantisation.
        reference: Float network that the loss of accuracy is against; None takes ``network`` without its quantisers.
        metrics: Measured values to write into the file.
        listener: Is told what happens.

    Raises:
        RequestError: If there are no images to calibrate on, or the operator set is too old.
        WorkError: If the file differs from PyTorch; ``gate.Refused`` if it does not pass the gate.
        DataError: If the images give no usable ranges.
    """
    _check(network, calibration, opset)
    plain = portable(float_network(network) if is_int8(network) else network)
    quantized = network
    if not is_int8(network):
        quantized = quantize_student(
            portable(network), calibration, int8 or Int8Config(), device=torch.device("cpu"), listener=listener
        )  # fmt: skip
    quantized = portable(quantized)
    images, truth = verification_images(quantized, source, verify_images, listener, columns=columns)
    expected = gate.logits_of(plain, images)
    accuracy = None
    if truth is not None:
        against = expected if reference is None else gate.logits_of(portable(reference), images)
        accuracy = gate.accuracy(plain, against, truth)
    else:
        listener.message("Without labels the loss of accuracy is not known, and --max-drop not looked at", "warning")
    quantized, left_float, ranked = _accurate(quantized, images, expected, truth, accuracy, max_drop, listener)
    own_error = difference(quantized, gate.logits_of(quantized, images), expected)
    found: list[Verification] = []
    times: list[tuple[float, float]] = []

    with tempfile.TemporaryDirectory() as folder:

        def rewrite(model: ir.Model) -> None:
            to_target(model, "tensorrt")
            if target == "cpu":
                signed = Path(folder) / "signed.onnx"
                ir.save(model, signed)
                verify_int8(quantized, signed, images, truth, own_error=own_error, rounds_results=False)
                batches = _batches(calibration, quantized, images)
                to_target(model, "cpu", measure_ranges(model, float_results(model), batches))

        def check(file: Path) -> None:
            found.append(
                verify_int8(quantized, file, images, truth, own_error=own_error, rounds_results=target == "cpu")
            )
            exported = found[0].exported
            if truth is not None and accuracy - exported > max_drop:
                raise gate.Refused(
                    f"the INT8 file loses {accuracy - exported:.2f} points of {truth.title} against the float network"
                    f" ({max_drop:g} are allowed by --max-drop), and PyTorch"
                    f" {accuracy - found[0].torch:.2f}; no file was left",
                    hint="Train with the quantisers on: visionkd quantize MODEL --data DATA --epochs 5",
                )
            if target == "cpu":
                twin = Path(folder) / "float.onnx"
                export_onnx(plain, twin, task=plain.task, classes=plain.classes, metrics={}, opset=opset)
                rows = measure([ort_runner(twin, name="float"), ort_runner(file, name="int8")], rounds=_ROUNDS)
                times.append((rows[0].latency_ms, rows[1].latency_ms))
                gate.check_speed(*times[0], min_speedup=min_speedup)

        rest = float_layers(quantized)
        written = export_onnx(
            quantized, path, task=quantized.task, classes=quantized.classes, metrics=metrics or {}, opset=opset,
            check=check, rewrite=rewrite,
            extra_metadata={"precision": "int8", "target": target, "float_layers": json.dumps(sorted(rest))},
        )  # fmt: skip
    result = ExportResult(
        path, written.size_mb, found[0].max_abs_diff, None, None, len(images),
        speedup=times[0][0] / times[0][1] if times else None, left_float=left_float or None,
    )  # fmt: skip
    named = accuracies(truth, torch=found[0].torch, exported=found[0].exported, float=accuracy)
    result = replace(result, **named)
    for text in _said(result, found[0], truth, accuracy, target, of_pixels(quantized)):
        listener.message(text)
    details = {
        "target": target,
        "top1_float": None,
        **named,
        "agreement": found[0].agreement,
        "rms_diff": found[0].rms_diff,
        "float_latency_ms": times[0][0] if times else None,
        "latency_ms": times[0][1] if times else None,
        "speedup": result.speedup,
        "left_float": list(left_float),
        "float_layers": rest,
        "sensitivity": {row.name: row.divergence for row in ranked},
    }
    record(path, result, details)
    return result


def _check(network: Network, calibration: Source | None, opset: int | None) -> None:
    if network.quantization is not None and not is_int8(network):
        kind = network.quantization.get("kind")
        raise RequestError(
            Problem("--int8", f"'{network.architecture}' is stored with few bits ({kind})", "Name its float model.")
        )
    if opset is not None and opset < MIN_OPSET:
        raise RequestError(
            Problem("--opset", f"{opset} is too old for INT8, which needs {MIN_OPSET} or above", "Leave it out.")
        )
    if calibration is None and not is_int8(network):
        raise RequestError(
            Problem("--data", "is required: ranges of a float model are found on images", "Example: --data images/")
        )


def _accurate(
    quantized: Network,
    images: torch.Tensor,
    expected: torch.Tensor,
    truth: Truth | None,
    accuracy: float | None,
    max_drop: float,
    listener: Listener,
) -> tuple[Network, tuple[str, ...], tuple[gate.LayerSensitivity, ...]]:
    """Return the network, repaired if it loses too much; the layers left in float for that; and what was measured."""
    if truth is None or accuracy is None:
        return quantized, (), ()

    def drop_of(candidate: Network) -> float:
        return accuracy - gate.accuracy(candidate, gate.logits_of(candidate, images), truth)

    drop = drop_of(quantized)
    if drop <= max_drop:
        return quantized, (), ()
    listener.message(
        f"INT8 loses {drop:.2f} points of {truth.title}, and {max_drop:g} are allowed: looking for the layers that cost"
        " it",
        level="warning",
    )
    some = slice(None, _SENSITIVITY_IMAGES)
    ranked = gate.sensitivity(quantized, images[some], reference=expected[some])
    repaired, names = gate.repair(quantized, ranked, drop_of, max_drop=max_drop, title=truth.title)
    listener.message(f"Left in float: {', '.join(names)}", level="warning")
    return portable(repaired), names, ranked


def _batches(calibration: Source | None, network: Network, images: torch.Tensor) -> Iterator[np.ndarray]:
    if calibration is None:
        for batch in images[:_RANGE_IMAGES].split(16):
            yield (batch.float() / 255.0 if batch.dtype == torch.uint8 else batch).numpy()
        return
    chosen = stratified_subset(calibration, _RANGE_IMAGES, seed=0)
    for batch, _ in image_batches(chosen, network, batch_size=16, workers=0):
        yield batch.numpy()


def _said(
    result: ExportResult, check: Verification, truth: Truth | None, accuracy: float | None, target: Target, pixels: str
) -> Iterator[str]:
    text = f"{result.file} has the class of PyTorch's INT8 network on {check.agreement:.1f} %{pixels} of"
    yield f"{text} {check.num_images} images"
    if truth is not None:
        yield f"{accuracy:.2f} % {truth.title} in float, {check.exported:.2f} % in INT8"
    if result.speedup is not None:
        yield f"{result.speedup:.2f} times as fast as the float network in ONNX Runtime on one thread of this machine"
    elif target == "tensorrt":
        yield "Its speed shows in an engine: visionkd export FILE --format tensorrt, then visionkd bench"
