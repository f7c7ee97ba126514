"""What a report is made of: typed, already measured, independent of where a run keeps it."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from visionkd.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

    from visionkd.report.detection import Detection
    from visionkd.report.segmentation import Segmentation


@dataclass(frozen=True)
class ModelRow:
    """One network and what was measured of it; None where it was not.

    Attributes:
        name: Architecture, such as ``resnet18``.
        top1: Percent.
        top5: Percent; not shown where there are five classes or fewer.
        miou: Percent, of a segmentation network.
        pixel_acc: Percent of its pixels that are right.
        ap: Percent, of a detector: the mean over overlaps from 0.5 to 0.95 and classes.
        ap50: The same at an overlap of 0.5.
        ap75: The same at one of 0.75.
        ap50_base: AP50 of the classes that it saw boxes of in training, where there are others.
        ap50_novel: AP50 of these others.
        params_m: Millions of parameters.
        macs_g: Billions of multiply-accumulates for one image.
        size_mb: Megabytes of the weights file.
        latency_ms: Milliseconds by backend, such as ``{"torch": 11.8, "onnxruntime": 4.5}``.
        note: A few words, such as ``linear probe on frozen features``.
    """

    name: str
    top1: float | None = None
    top5: float | None = None
    miou: float | None = None
    pixel_acc: float | None = None
    ap: float | None = None
    ap50: float | None = None
    ap75: float | None = None
    ap50_base: float | None = None
    ap50_novel: float | None = None
    params_m: float | None = None
    macs_g: float | None = None
    size_mb: float | None = None
    latency_ms: Mapping[str, float | None] = field(default_factory=dict)
    note: str = ""

    @property
    def score(self) -> float | None:
        """The measure that counts, in percent: AP of a detector, mIoU of a segmentation network, top-1 of others."""
        return next((value for value in (self.ap, self.miou) if value is not None), self.top1)

    @property
    def measure(self) -> str:
        """What that measure is called."""
        return "AP" if self.ap is not None else "mIoU" if self.miou is not None else "top-1 accuracy"


@dataclass(frozen=True)
class ExportRow:
    """One exported file and how it was checked against PyTorch.

    Attributes:
        file: Path relative to the run.
        format: ``onnx`` or another.
        size_mb: Megabytes.
        max_abs_diff: Largest difference between a logit and PyTorch's.
        top1_torch: Percent, on the images both ran on.
        top1_exported: Percent, on the same images.
        num_verify_images: How many these were.
        top1_float: Percent of the float network, beside an INT8 file.
        speedup: How many times as fast as the float network the INT8 file is, where it was timed.
        left_float: Layers that the gate left in float to keep the accuracy.
        miou_torch: As ``top1_torch``, of a segmentation network.
        miou_exported: As ``top1_exported``.
        miou_float: As ``top1_float``.
        ap_torch: As ``top1_torch``, of a detector.
        ap_exported: As ``top1_exported``.
        ap_float: As ``top1_float``.
    """

    file: str
    format: str = ""
    size_mb: float | None = None
    max_abs_diff: float | None = None
    top1_torch: float | None = None
    top1_exported: float | None = None
    num_verify_images: int | None = None
    top1_float: float | None = None
    speedup: float | None = None
    left_float: Sequence[str] = ()
    miou_torch: float | None = None
    miou_exported: float | None = None
    miou_float: float | None = None
    ap_torch: float | None = None
    ap_exported: float | None = None
    ap_float: float | None = None

    def score(self, of: str) -> float | None:
        """Return AP, mIoU or top-1, whichever there is, ``of`` ``torch``, ``float`` or ``exported``."""
        found = (getattr(self, f"{measure}_{of}") for measure in ("ap", "miou", "top1"))
        return next((value for value in found if value is not None), None)


@dataclass(frozen=True, eq=False)
class Curve:
    """One metric of one split over time.

    Attributes:
        epochs: Time in epochs, length P; 1.0 is the end of the first epoch. Increasing.
        values: The metric, length P; finite.
    """

    epochs: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Curves:
    """All of a run's ``metrics.csv``: ``curves[metric][split]``, in the file's order of columns."""

    curves: Mapping[str, Mapping[str, Curve]] = field(default_factory=dict)

    def get(self, metric: str, split: str) -> Curve | None:
        return self.curves.get(metric, {}).get(split)

    @classmethod
    def read(cls, path: str | Path) -> Curves:
        """Read a CSV with the columns ``epoch``, ``step``, ``split`` and one per metric; blanks and cut lines are fine.

        A training split may have several rows in an epoch: their steps say where in it they belong. Where a resumed run
        wrote a row again, the later one counts.
        """
        try:
            with Path(path).open(newline="", encoding="utf-8", errors="replace") as file:
                rows = list(csv.DictReader(line.replace("\0", "") for line in file))
        except OSError as error:
            raise DataError(f"cannot read the training curves {path}: {error.strerror or error}") from error
        except csv.Error as error:
            raise DataError(f"the training curves {path} are not a CSV table: {error}") from error
        return cls.from_rows(rows)

    @classmethod
    def from_rows(cls, rows: list[dict[str, Any]]) -> Curves:
        """Build curves from rows as a CSV reader yields them."""
        latest: dict[tuple[str, float, float], dict[str, Any]] = {}
        for row in rows:
            epoch, split = _number(row.get("epoch")), row.get("split")
            if not math.isfinite(epoch) or not split:
                continue
            step = _number(row.get("step"))
            key = (str(split), epoch, step if math.isfinite(step) else -1.0)
            latest.setdefault(key, {}).update((k, v) for k, v in row.items() if v not in (None, ""))
        # Epochs counted from 0 by the writer are moved, so that 1.0 is always the end of the first one.
        train_epochs = [epoch for split, epoch, _ in latest if split == "train"]
        shift = 1.0 if train_epochs and min(train_epochs) == 0 else 0.0
        groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
        for (split, epoch, _), row in sorted(latest.items(), key=lambda item: item[0]):
            groups.setdefault((split, epoch), []).append(row)

        points: dict[str, dict[str, list[tuple[float, float]]]] = {}
        for (split, epoch), group in groups.items():
            previous = groups.get((split, epoch - 1.0))
            start = _number(previous[-1].get("step")) if previous else 0.0
            for time, row in zip(_places(group, start), group, strict=True):
                for name in row.keys() - {"epoch", "step", "split"}:
                    value = _number(row[name])
                    if math.isfinite(value):
                        points.setdefault(name, {}).setdefault(split, []).append((epoch + shift - 1.0 + time, value))
        names = dict.fromkeys(name for row in rows for name in row if name in points)
        return cls(
            {name: {split: Curve(*np.asarray(pairs).T) for split, pairs in points[name].items()} for name in names}
        )


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What the networks answered on the evaluated split.

    Attributes:
        targets: Class indices, length N.
        student_probs: N x C, after softmax.
        teacher_probs: N x C; with several teachers, their mean.
        baseline_probs: N x C.
        names: Paths of the samples relative to the data, length N; may be empty.
    """

    targets: np.ndarray
    student_probs: np.ndarray
    teacher_probs: np.ndarray | None = None
    baseline_probs: np.ndarray | None = None
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        shape = np.shape(self.student_probs)
        if len(shape) != 2 or np.shape(self.targets) != shape[:1]:
            raise DataError(
                f"the evaluation does not fit together: {np.shape(self.targets)} targets, {shape} student_probs"
            )
        for role in ("teacher_probs", "baseline_probs"):
            probs = getattr(self, role)
            if probs is not None and np.shape(probs) != shape:
                raise DataError(
                    f"the evaluation does not fit together: {role} is {np.shape(probs)}, student_probs {shape}"
                )
        if self.names and len(self.names) != shape[0]:
            raise DataError(f"the evaluation does not fit together: {len(self.names)} names for {shape[0]} samples")
        if shape[0] and not (0 <= np.min(self.targets) and np.max(self.targets) < shape[1]):
            raise DataError(f"the evaluation has targets outside of its {shape[1]} classes")

    def __len__(self) -> int:
        return len(self.targets)


@dataclass(frozen=True, eq=False)
class ReportData:
    """Everything that the page shows. Parts that are missing are left out of it.

    Attributes:
        title: Heading of the page.
        run: Name of the run.
        created: When the run was made, ready to print.
        student: The trained network; in a supervised run the only one.
        teachers: One or several; empty in a supervised run.
        baseline: The same student trained alone, or in float beside an INT8 student.
        command: The command line that made the run.
        data: Name of the data set.
        split: Name of the evaluated split.
        method: Name of the distillation method, empty in a supervised run.
        options: The method's options.
        curves: The run's training curves.
        baseline_curves: The baseline's.
        classes: Class names in index order; numbered names where empty.
        measure: What the networks are compared by: ``top-1``, ``mIoU`` of segmentation networks, ``AP`` of detectors.
        evaluation: Answers on the evaluated split.
        segmentation: The same of segmentation networks.
        detection: The same of detectors.
        thumbnail: Gives the picture of sample ``index`` of the evaluation; may raise where it cannot be read.
        environment: Versions, devices, commit; nested mappings are flattened.
        config: The run's resolved ``config.yaml`` as text.
        messages: What the run said, as (level, text); level ``info`` or ``warning``.
        note: What accuracy means here, where it is not accuracy.
        preflight: Findings about the teacher, as (status, text); status ``ok``, ``warning``, ``error`` or another word.
        exports: Exported files.
        skipped: Images that could not be read, as (name, reason).
        augmentation: Directory with what a learned augmentation left behind.
        reconstructions: Picture of what a masked autoencoder makes of images.
        pretrained: Whether the network is an encoder that has no classifier yet.
    """

    title: str
    run: str
    created: str
    student: ModelRow
    teachers: tuple[ModelRow, ...] = ()
    baseline: ModelRow | None = None
    command: str = ""
    data: str = ""
    split: str = "val"
    method: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    curves: Curves | None = None
    baseline_curves: Curves | None = None
    classes: tuple[str, ...] = ()
    measure: str = "top-1"
    evaluation: Evaluation | None = None
    segmentation: Segmentation | None = None
    detection: Detection | None = None
    thumbnail: Callable[[int], Image] | None = None
    environment: Mapping[str, Any] = field(default_factory=dict)
    config: str = ""
    messages: tuple[tuple[str, str], ...] = ()
    preflight: tuple[tuple[str, str], ...] = ()
    exports: tuple[ExportRow, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    note: str = ""
    augmentation: Path | None = None
    reconstructions: Path | None = None
    pretrained: bool = False

    def __post_init__(self) -> None:
        if self.evaluation is not None and self.classes:
            columns = self.evaluation.student_probs.shape[1]
            if len(self.classes) != columns:
                raise DataError(f"the evaluation has {columns} classes, the report was given {len(self.classes)} names")

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """Class names, made up where the run has none."""
        if self.classes:
            return tuple(self.classes)
        if self.evaluation is None:
            counted = self.detection or self.segmentation
            return tuple(f"class {index}" for index in range(counted.num_classes if counted is not None else 0))
        return tuple(f"class {index}" for index in range(self.evaluation.student_probs.shape[1]))

    @property
    def distilled(self) -> bool:
        """Whether a teacher taught the network, be it one that is not compared with it."""
        answered = self.evaluation is not None and self.evaluation.teacher_probs is not None
        counted = self.segmentation is not None or self.detection is not None
        return bool(self.teachers) or answered or (bool(self.method) and counted)


def _places(rows: list[dict[str, Any]], start: float) -> list[float]:
    """Return where in their epoch, in (0, 1], its rows belong: by step, else evenly; ``start`` is the step before."""
    steps = [_number(row.get("step")) for row in rows]
    ordered = all(low < high for low, high in zip([start, *steps[:-1]], steps, strict=True))
    if len(rows) == 1 or not ordered:
        return [place / len(rows) for place in range(1, len(rows) + 1)]
    return [(step - start) / (steps[-1] - start) for step in steps]


def _number(value: Any) -> float:
    """Return ``value`` as a float, NaN where it is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
