"""What the workflows return."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from visionkd.types import MetricRow


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Attributes:
        run: The run directory.
        metrics: Final metrics of the packaged network, such as ``val/top1``.
        table: Networks side by side.
        files: What was made, by name: ``model``, ``onnx``, ``report``.
    """

    run: Path
    metrics: Mapping[str, float]
    table: tuple[MetricRow, ...] = ()
    files: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class EvalResult:
    """Metrics in percent of a model on a split.

    Attributes:
        model: MODEL as it was given.
        data: DATA that it was measured on.
        split: Split of it.
        num_images: Images that could be read.
        metrics: By name.
        per_class: Accuracy of each class that occurs, or its intersection over union.
        skipped: Names of images that could not be read.
        measure: What ``per_class`` is: ``top1`` or ``iou``.
    """

    model: str
    data: str
    split: str
    num_images: int
    metrics: Mapping[str, float]
    per_class: Mapping[str, float]
    skipped: tuple[str, ...] = ()
    measure: str = "top1"


@dataclass(frozen=True)
class Prediction:
    """What is on one image.

    Attributes:
        image: The file.
        labels: The most probable classes, most probable first; of a segmentation network those on the image, the
            largest first; of a detector the class of each box, the highest score first.
        probs: Their probabilities, in [0, 1]; of a segmentation network their shares of the pixels; of a detector the
            scores.
        saved: The picture they were drawn on.
        saved_map: Palette picture whose values are the classes of the pixels.
        boxes: Of a detector left, top, right and bottom of each box in pixels of the image; else None.
    """

    image: Path
    labels: tuple[str, ...]
    probs: tuple[float, ...]
    saved: Path | None = None
    saved_map: Path | None = None
    boxes: tuple[tuple[float, float, float, float], ...] | None = None


@dataclass(frozen=True)
class PredictResult:
    """Predictions, and the images that could not be read with the reason."""

    predictions: tuple[Prediction, ...]
    skipped: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class ExportResult:
    """An exported file and how it was checked: largest difference of a logit, and accuracy in percent before and after.

    The accuracy is top-1, mIoU of a segmentation network or AP of a detector; the others are None, and a detector's
    difference is that of a score. Of an INT8 file also that of the float network, how many times faster than it the
    file is on this machine, and the layers that the gate left in float.
    """

    file: Path
    size_mb: float
    max_abs_diff: float
    top1_torch: float | None
    top1_exported: float | None
    num_verify_images: int
    top1_float: float | None = None
    speedup: float | None = None
    left_float: tuple[str, ...] | None = None
    miou_torch: float | None = None
    miou_exported: float | None = None
    miou_float: float | None = None
    ap_torch: float | None = None
    ap_exported: float | None = None
    ap_float: float | None = None


@dataclass(frozen=True)
class EngineResult:
    """A TensorRT engine.

    Attributes:
        file: The engine file.
        size_mb: Its size in 10^6 bytes.
        library: What built it, with its version.
        device: GPU that it is for.
        precision: Number formats that it computes in.
        batch: Smallest, best and largest batch.
        layers: Layers in all; None where no GPU was there to ask the engine.
        int8_layers: Those that compute in INT8.
        reformat_layers: Those that only change formats.
        max_abs_diff: Largest difference of a logit from ONNX Runtime; None where it was not compared.
        top1_onnx: Accuracy of the ONNX file in percent; None but for classification.
        top1_engine: Accuracy of the engine in percent.
        num_verify_images: Images compared on.
        miou_onnx: mIoU of the ONNX file in percent; None but for segmentation.
        miou_engine: mIoU of the engine in percent.
        ap_onnx: AP of the ONNX file in percent; None but for detection.
        ap_engine: AP of the engine in percent.
    """

    file: Path
    size_mb: float
    library: str
    device: str
    precision: str
    batch: str
    layers: int | None
    int8_layers: int | None
    reformat_layers: int | None
    max_abs_diff: float | None
    top1_onnx: float | None
    top1_engine: float | None
    num_verify_images: int
    miou_onnx: float | None = None
    miou_engine: float | None = None
    ap_onnx: float | None = None
    ap_engine: float | None = None


@dataclass(frozen=True)
class BundleResult:
    """A directory that travels to a device: its files, and its size in 10^6 bytes."""

    directory: Path
    files: tuple[str, ...]
    size_mb: float


@dataclass(frozen=True)
class BenchResult:
    """Models side by side."""

    rows: tuple[MetricRow, ...]


@dataclass(frozen=True)
class ReportResult:
    """The written page."""

    file: Path


@dataclass(frozen=True)
class SearchResult:
    """A finished search.

    Attributes:
        run: The run directory.
        table: The best candidates, the best first.
        command: The distillation of the best one, as it is typed; None where there is none.
        student: The same student as a configuration: ``name``, ``args``, ``img_size``, ``pretrained``.
        strategy: How the space was searched.
        num_scored: Candidates with a score.
        num_failed: Candidates that could not be built or scored.
        num_over_budget: Candidates that cost too much.
        seconds: Time that the search took, earlier parts of a resumed one included.
        files: What was made, by name: ``state``, ``candidates``, ``pareto``.
        distilled: The distillation that followed, if it was asked for.
    """

    run: Path
    table: tuple[MetricRow, ...]
    command: str | None
    student: Mapping[str, Any] | None
    strategy: str
    num_scored: int
    num_failed: int
    num_over_budget: int
    seconds: float
    files: Mapping[str, Path] = field(default_factory=dict)
    distilled: RunResult | None = None
