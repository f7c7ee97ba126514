"""Answers of segmentation networks, counted: pixels per class of each image, and a few maps for the report."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from visionkd.files import write_bytes
from visionkd.runtime.metrics import class_iou, intersection_and_union, mean_iou, pixel_confusion


@dataclass(frozen=True)
class Answers:
    """What a network said about a split, counted.

    Attributes:
        confusion: C x C pixels over all images; rows are the labels.
        intersection: N x C pixels of each image that label and answer share.
        union: N x C pixels of each image that are of the class in either.
        indices: Position of each sample in its source, N; unreadable images are missing.
        skipped: Names of the images that could not be read.
    """

    confusion: np.ndarray
    intersection: np.ndarray
    union: np.ndarray
    indices: np.ndarray
    skipped: tuple[str, ...]

    def metrics(self) -> dict[str, float]:
        return _measures(self.intersection, self.union)

    def per_class(self) -> np.ndarray:
        return class_iou(self.intersection.sum(0), self.union.sum(0))


def _measures(intersection: np.ndarray, union: np.ndarray) -> dict[str, float]:
    """Return mIoU over all images together, and the share of labelled pixels that are right."""
    right = float(intersection.sum())
    labeled = (right + float(union.sum())) / 2.0  # each wrong pixel lies in the unions of two classes
    acc = 100.0 * right / labeled if labeled else float("nan")
    return {"miou": mean_iou(intersection.sum(0), union.sum(0)), "pixel_acc": acc}


class PixelCount:
    """Counts pixels, image by image."""

    def __init__(self, num_classes: int) -> None:
        self.confusion = np.zeros((num_classes, num_classes), np.int64)
        self.parts: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, given: np.ndarray, target: np.ndarray) -> None:
        counts = pixel_confusion(given, target, len(self.confusion))
        self.confusion += counts
        self.parts.append(intersection_and_union(counts))

    def answers(self, indices: np.ndarray, skipped: Sequence[str]) -> Answers:
        empty = np.zeros((0, len(self.confusion)), np.int64)
        intersection, union = (np.stack(each) for each in zip(*self.parts, strict=True)) if self.parts else (empty,) * 2
        return Answers(self.confusion, intersection, union, indices, tuple(skipped))


@dataclass(frozen=True)
class Evaluations:
    """Pixels per class of several networks' answers about the same images, by role.

    Attributes:
        confusion: C x C over all images.
        intersection: N x C each.
        union: N x C each.
        indices: Position of each sample in the validation split, N.
        names: Sample names, N.
        pictured: Samples, as positions among the N, whose answers are kept: worst first, then the best ones.
        labels: Their labels, uint8 H x W each.
        maps: What each network answered about them.
    """

    confusion: dict[str, np.ndarray]
    intersection: dict[str, np.ndarray]
    union: dict[str, np.ndarray]
    indices: np.ndarray
    names: tuple[str, ...]
    pictured: tuple[int, ...] = ()
    labels: tuple[np.ndarray, ...] = ()
    maps: dict[str, tuple[np.ndarray, ...]] = field(default_factory=dict)

    def metrics(self, role: str) -> dict[str, float]:
        return _measures(self.intersection[role], self.union[role])

    def joined(self, teachers: Sequence[str], positions: np.ndarray | None) -> Evaluations:
        """Return the same with the best of several teachers as the teacher, and as positions of the whole split."""
        best = max(teachers, key=lambda role: self.metrics(role)["miou"]) if teachers else None

        def kept(values: dict[str, Any]) -> dict[str, Any]:
            own = {role: found for role, found in values.items() if role not in teachers}
            return own | ({"teacher": values[best]} if best in values else {})

        return replace(
            self, confusion=kept(self.confusion), intersection=kept(self.intersection), union=kept(self.union),
            maps=kept(self.maps), indices=self.indices if positions is None else positions[self.indices],
        )  # fmt: skip

    def save(self, path: Path) -> None:
        """Write ``evaluation.npz``, atomically."""
        arrays: dict[str, np.ndarray] = {}
        for role in self.confusion:
            arrays[f"{role}_confusion"] = self.confusion[role]
            arrays[f"{role}_intersection"] = self.intersection[role].astype(np.int32)
            arrays[f"{role}_union"] = self.union[role].astype(np.int32)
        for number, label in enumerate(self.labels):
            arrays[f"label_{number}"] = label
            arrays |= {f"{role}_map_{number}": found[number] for role, found in self.maps.items()}
        about = {"names": self.names, "pictured": self.pictured, "roles": list(self.confusion), "maps": list(self.maps)}
        text = np.frombuffer(json.dumps(about).encode(), np.uint8)  # an object array would need pickle
        buffer = io.BytesIO()
        np.savez_compressed(buffer, about=text, indices=self.indices, **arrays)
        write_bytes(path, buffer.getvalue())


def load(path: Path) -> Evaluations:
    """Read ``evaluation.npz``."""
    with np.load(path, allow_pickle=False) as arrays:
        about = json.loads(arrays["about"].tobytes().decode())
        parts = {
            part: {role: arrays[f"{role}_{part}"].astype(np.int64) for role in about["roles"]}
            for part in ("confusion", "intersection", "union")
        }
        count = len(about["pictured"])
        return Evaluations(
            **parts,
            indices=arrays["indices"],
            names=tuple(about["names"]),
            pictured=tuple(about["pictured"]),
            labels=tuple(arrays[f"label_{number}"] for number in range(count)),
            maps={role: tuple(arrays[f"{role}_map_{n}"] for n in range(count)) for role in about["maps"]},
        )
