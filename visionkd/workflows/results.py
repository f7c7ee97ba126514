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
    """Metrics in percent of a model on a split; ``skipped`` names images that could not be read."""

    model: str
    data: str
    split: str
    num_images: int
    metrics: Mapping[str, float]
    per_class: Mapping[str, float]
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one image, most probable first; ``saved`` is the picture they were drawn on."""

    image: Path
    labels: tuple[str, ...]
    probs: tuple[float, ...]
    saved: Path | None = None


@dataclass(frozen=True)
class PredictResult:
    """Predictions, and the images that could not be read with the reason."""

    predictions: tuple[Prediction, ...]
    skipped: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class ExportResult:
    """An exported file and how it was checked: largest difference of a logit, and top-1 in percent before and after."""

    file: Path
    size_mb: float
    max_abs_diff: float
    top1_torch: float | None
    top1_exported: float | None
    num_verify_images: int


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
