"""Answers of detectors: the boxes that were found in each image, beside the true ones."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from visionkd.files import write_bytes
from visionkd.runtime.box_metrics import BoxPrecision, BoxSet, average_precision


@dataclass(frozen=True)
class Answers:
    """What a detector found in a split.

    Attributes:
        found: Boxes with scores of each image, in pixels of the pictures.
        truth: The true ones of the same images.
        num_classes: Number of classes.
        indices: Position of each sample in its source, N; unreadable images are missing.
        skipped: Names of the images that could not be read.
        novel: Classes to measure apart.
    """

    found: BoxSet
    truth: BoxSet
    num_classes: int
    indices: np.ndarray
    skipped: tuple[str, ...]
    novel: tuple[int, ...] = ()

    @cached_property
    def precision(self) -> BoxPrecision:
        return average_precision(self.found, self.truth, num_classes=self.num_classes)

    def metrics(self) -> dict[str, float]:
        return self.precision.metrics(self.novel)

    def per_class(self) -> np.ndarray:
        return self.precision.per_class()


@dataclass(frozen=True)
class Evaluations:
    """Boxes that several networks found in the same images, by role.

    Attributes:
        found: Of each role.
        truth: The true ones.
        num_classes: Number of classes.
        indices: Position of each sample in the validation split, N.
        names: Sample names, N.
        novel: Classes to measure apart.
    """

    found: dict[str, BoxSet]
    truth: BoxSet
    num_classes: int
    indices: np.ndarray
    names: tuple[str, ...]
    novel: tuple[int, ...] = ()
    _known: dict[str, BoxPrecision] = field(default_factory=dict, compare=False, repr=False)

    def precision(self, role: str) -> BoxPrecision:
        if role not in self._known:
            self._known[role] = average_precision(self.found[role], self.truth, num_classes=self.num_classes)
        return self._known[role]

    def metrics(self, role: str) -> dict[str, float]:
        return self.precision(role).metrics(self.novel)

    def joined(self, teachers: Sequence[str], positions: np.ndarray | None) -> Evaluations:
        """Return the same with the best of several teachers as the teacher, and as positions of the whole split."""
        best = max(teachers, key=lambda role: self.metrics(role)["ap"]) if teachers else None
        kept = {role: found for role, found in self.found.items() if role not in teachers}
        kept |= {"teacher": self.found[best]} if best is not None else {}
        indices = self.indices if positions is None else positions[self.indices]
        return replace(self, found=kept, indices=indices, _known={})

    def save(self, path: Path) -> None:
        """Write ``evaluation.npz``, atomically."""
        arrays: dict[str, np.ndarray] = {"truth_crowd": self.truth.crowd}
        for name, boxes in (("truth", self.truth), *self.found.items()):
            arrays |= {f"{name}_{part}": getattr(boxes, part) for part in ("counts", "boxes", "labels")}
            arrays[f"{name}_scores"] = boxes.scores
        about = {"names": self.names, "roles": list(self.found), "num_classes": self.num_classes, "novel": self.novel}
        text = np.frombuffer(json.dumps(about).encode(), np.uint8)  # an object array would need pickle
        buffer = io.BytesIO()
        np.savez_compressed(buffer, about=text, indices=self.indices, **arrays)
        write_bytes(path, buffer.getvalue())


def load(path: Path) -> Evaluations:
    """Read ``evaluation.npz``."""
    with np.load(path, allow_pickle=False) as arrays:
        about: dict[str, Any] = json.loads(arrays["about"].tobytes().decode())

        def boxes(name: str) -> BoxSet:
            parts = {part: arrays[f"{name}_{part}"] for part in ("counts", "boxes", "labels", "scores")}
            crowd = arrays["truth_crowd"] if name == "truth" else np.zeros(len(parts["labels"]), bool)
            return BoxSet(**parts, crowd=crowd)

        return Evaluations(
            found={role: boxes(role) for role in about["roles"]},
            truth=boxes("truth"),
            num_classes=about["num_classes"],
            indices=arrays["indices"],
            names=tuple(about["names"]),
            novel=tuple(about["novel"]),
        )
