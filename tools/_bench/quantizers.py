"""What others make of a float ONNX file and images: INT8 files of onnxruntime, NNCF and NVIDIA's Model Optimizer."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from visionkd.files import replacing
from visionkd.runtime.ort import OrtModel

INPUT = "image"


def others(source: Path, work: Path, calibration: np.ndarray) -> dict[str, Path]:
    """Return the file of each quantiser that is installed and whose file runs; of the others say a line on stderr.

    Args:
        source: The float file.
        work: Folder of the files; those that are in it are taken as they are.
        calibration: Images, uint8 N x 3 x H x W.
    """
    found = {}
    for name, (package, quantize) in QUANTIZERS.items():
        path = work / f"{name.replace(' ', '_')}.onnx"
        if not path.is_file() and importlib.util.find_spec(package) is None:
            print(f"{name}: not installed", file=sys.stderr)
            continue
        try:
            if not path.is_file():
                with replacing(path) as temporary, _quiet():
                    quantize(source, temporary, calibration)
            OrtModel(path, threads=1).run(next(batches(calibration)))
        except Exception as error:  # anything that another package may raise
            said = " ".join(str(error).split())[:300]
            print(f"{name}: left out, it fails on this network: {type(error).__name__}: {said}", file=sys.stderr)
            continue
        found[name] = path
    return found


def static(source: Path, path: Path, calibration: np.ndarray) -> None:
    """Quantise with onnxruntime: QDQ, uint8 activations, int8 weights with a scale for each channel."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = batches(calibration)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {INPUT: batch}

    prepared = path.with_suffix(".prepared.onnx")
    try:
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared), str(path), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        )  # fmt: skip
    finally:
        prepared.unlink(missing_ok=True)


def nncf(source: Path, path: Path, calibration: np.ndarray) -> None:
    """Quantise with NNCF for processors: bytes behind a ReLU, int8 elsewhere; int8 weights, a scale for each channel.

    It makes int8 of all that may be negative, whatever its settings, and ONNX Runtime has no integer kernels for that
    on x86. The preset ``performance`` leaves more bytes than ``mixed`` does.
    """
    os.environ.setdefault("NNCF_CI", "1")  # it reports its use to its authors otherwise
    import nncf
    import onnx

    nncf.set_log_level(logging.ERROR)
    images = list(batches(calibration, 1))
    model = nncf.quantize(
        onnx.load(source), nncf.Dataset(images, lambda image: {INPUT: image}), subset_size=len(images),
        preset=nncf.QuantizationPreset.PERFORMANCE, target_device=nncf.TargetDevice.CPU,
    )  # fmt: skip
    onnx.save(model, path)


def modelopt(source: Path, path: Path, calibration: np.ndarray) -> None:
    """Quantise with NVIDIA's Model Optimizer: int8 without zero points, for TensorRT; all else stays in float32."""
    from modelopt.onnx.quantization import quantize

    quantize(
        str(source), quantize_mode="int8", calibration_data={INPUT: np.concatenate(list(batches(calibration)))},
        calibration_eps=["cpu"], high_precision_dtype="fp32", output_path=str(path), log_level="ERROR",
    )  # fmt: skip


#: By the name of the variant: the package it needs, and what writes the file. Model Optimizer changes onnxruntime's own
#: quantiser where it is loaded, so that it comes last.
QUANTIZERS: dict[str, tuple[str, Callable[[Path, Path, np.ndarray], None]]] = {
    "onnxruntime static": ("onnxruntime", static),
    "nncf": ("nncf", nncf),
    "modelopt": ("modelopt", modelopt),
}


def batches(images: np.ndarray, size: int = 8) -> Iterator[np.ndarray]:
    """Yield float batches in [0, 1]."""
    for start in range(0, len(images), size):
        yield images[start : start + size].astype("float32") / 255.0


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep bars and messages off stdout, which may be JSON, and off stderr."""
    said = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        warnings.simplefilter("ignore")
        yield
