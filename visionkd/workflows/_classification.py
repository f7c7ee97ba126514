"""Run networks over a split of labelled images and keep what they answered; see :mod:`visionkd.workflows._tasks`."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from visionkd.data.subset import stratified_limit, targets_of
from visionkd.errors import UnreadableImageError
from visionkd.files import write_bytes
from visionkd.runtime.metrics import classification_metrics, per_class_accuracy
from visionkd.types import Listener, Progress, Source

if TYPE_CHECKING:
    from visionkd.config.schema import RunConfig
    from visionkd.models.network import Network
    from visionkd.runtime.session import Session

MAIN, TITLE, PER_CLASS = "top1", "top-1", "top1"
BATCH_SIZE = None
PACKAGED = ("top1", "top5", "ece", "nll")
COMPARED = ("top1", "top5")
_FULL_VALUES = 10_000_000


@dataclass(frozen=True)
class Answers:
    """What a network said about a split.

    Attributes:
        probs: N x C in float32, after softmax.
        targets: Class indices, N.
        indices: Position of each sample in its source, N; unreadable images are missing.
        skipped: Names of the images that could not be read.
    """

    probs: np.ndarray
    targets: np.ndarray
    indices: np.ndarray
    skipped: tuple[str, ...]

    def metrics(self) -> dict[str, float]:
        return {name: float(value) for name, value in classification_metrics(self.probs, self.targets).items()}

    def per_class(self) -> np.ndarray:
        return per_class_accuracy(self.probs, self.targets)


def some(source: Source, count: int, *, seed: int) -> np.ndarray:
    """Return positions, spread over the classes."""
    return stratified_limit(targets_of(source), count, seed)


def answer(
    network: Network,
    source: Source,
    *,
    device: Any,
    batch_size: int,
    workers: int,
    listener: Listener,
    config: RunConfig | None = None,
    columns: Sequence[int] | None = None,
) -> Answers:
    """Run a network over all of ``source``."""
    import torch

    from visionkd.data.loader import eval_loader
    from visionkd.data.views import eval_view

    network.to(device).eval()
    probs, targets, indices = [], [], []
    done, start = 0, time.perf_counter()
    with torch.inference_mode():
        for batch in eval_loader(
            source, eval_view("classification", network.input), batch_size=batch_size, workers=workers
        ):
            count = len(batch["target"])
            if not count:
                continue
            image = batch["image"].to(device, non_blocking=True).float().div_(255.0)
            probs.append(network(image).logits.softmax(1).cpu())
            targets.append(batch["target"])
            indices.append(batch["index"])
            done += count
            rate = done / (time.perf_counter() - start)
            left = (len(source) - done) / rate
            listener.progress(Progress("evaluate", done, len(source), images_per_s=rate, eta_s=left))
    if not probs:
        shape = (0, network.num_classes)
        empty = np.zeros(0, np.int64)
        return Answers(np.zeros(shape, np.float32), empty, empty, tuple(source.name(i) for i in range(len(source))))
    found = torch.cat(indices).numpy()
    missing = np.setdiff1d(np.arange(len(source)), found)
    skipped = tuple(source.name(int(index)) for index in missing)
    return Answers(_of_classes(torch.cat(probs).numpy(), columns), torch.cat(targets).numpy(), found, skipped)


def answer_file(
    session: Session,
    source: Source,
    *,
    batch_size: int,
    listener: Listener,
    config: RunConfig | None = None,
    columns: Sequence[int] | None = None,
) -> Answers:
    """Run a model file over all of ``source``, without torch."""
    kept: list[int] = []
    skipped: list[str] = []
    images = readable(source, kept, skipped, every=batch_size, listener=listener)
    first = next(images, None)
    if first is None:
        return Answers(np.zeros((0, 1), np.float32), np.zeros(0, np.int64), np.zeros(0, np.int64), tuple(skipped))

    def all_of_them() -> Iterator[Any]:
        yield first
        yield from images

    probs = session.predict_images(all_of_them(), batch_size=batch_size)
    indices = np.asarray(kept, np.int64)
    return Answers(_of_classes(probs, columns), targets_of(source)[indices], indices, tuple(skipped))


def readable(source: Source, kept: list[int], skipped: list[str], *, every: int, listener: Listener) -> Iterator[Any]:
    """Yield the images of a source, and note which ones could be read; progress is told after each ``every`` ones."""
    start = time.perf_counter()
    for index in range(len(source)):
        try:
            image = source.load(index)
        except UnreadableImageError:
            skipped.append(source.name(index))
            continue
        kept.append(index)
        if len(kept) % every == 0:
            rate = len(kept) / (time.perf_counter() - start)
            left = (len(source) - index) / rate
            listener.progress(Progress("evaluate", index + 1, len(source), images_per_s=rate, eta_s=left))
        yield image


def _of_classes(probs: np.ndarray, columns: Sequence[int] | None) -> np.ndarray:
    """Return the probabilities of the data's classes, given that it is one of these."""
    if columns is None:
        return probs
    probs = probs[:, list(columns)]
    return probs / np.maximum(probs.sum(1, keepdims=True), 1e-12)


@dataclass(frozen=True)
class Evaluations:
    """Answers of several networks about the same samples, by role: ``student``, ``teacher``, ``baseline``.

    Attributes:
        probs: N x C each.
        targets: Class indices, N.
        indices: Position of each sample in the validation split, N.
        names: Sample names, N.
    """

    probs: dict[str, np.ndarray]
    targets: np.ndarray
    indices: np.ndarray
    names: tuple[str, ...]

    def metrics(self, role: str) -> dict[str, float]:
        return {name: float(value) for name, value in classification_metrics(self.probs[role], self.targets).items()}

    def joined(self, teachers: Sequence[str], positions: np.ndarray | None) -> Evaluations:
        """Return the same with the mean of the teachers in their place, and as positions of the whole split."""
        probs = {role: found for role, found in self.probs.items() if role not in teachers}
        if teachers:
            first, *rest = (self.probs[role] for role in teachers)
            probs["teacher"] = sum(rest, first) / len(teachers)
        return replace(self, probs=probs, indices=self.indices if positions is None else positions[self.indices])

    def save(self, path: Path) -> None:
        """Write ``evaluation.npz``, atomically."""
        buffer = io.BytesIO()
        names = np.frombuffer(json.dumps(self.names).encode(), np.uint8)  # an object array would need pickle
        # half precision makes ties, so that a class or two changes: only where the file would be huge otherwise
        precision = np.float32 if max(values.size for values in self.probs.values()) <= _FULL_VALUES else np.float16
        arrays = {f"{role}_probs": values.astype(precision) for role, values in self.probs.items()}
        np.savez_compressed(buffer, targets=self.targets, indices=self.indices, names=names, **arrays)
        write_bytes(path, buffer.getvalue())


def load(path: Path) -> Evaluations:
    """Read ``evaluation.npz``."""
    with np.load(path, allow_pickle=False) as arrays:
        probs = {
            name.removesuffix("_probs"): arrays[name].astype(np.float32)
            for name in arrays.files
            if name.endswith("_probs")
        }
        names = tuple(json.loads(arrays["names"].tobytes().decode()))
        return Evaluations(probs, arrays["targets"], arrays["indices"], names)


def together(
    networks: Sequence[tuple[str, Network]],
    source: Source,
    *,
    run_one: Callable[[str, Network], Answers],
    config: RunConfig | None = None,
    device: Any = None,
) -> Evaluations:
    """Run several networks over one split and keep the samples that all of them could read."""
    answers = {role: run_one(role, network) for role, network in networks}
    common = np.asarray(
        sorted(set.intersection(*(set(found.indices.tolist()) for found in answers.values()))), np.int64
    )
    probs = {role: found.probs[np.searchsorted(found.indices, common)] for role, found in answers.items()}
    first = next(iter(answers.values()))
    targets = first.targets[np.searchsorted(first.indices, common)]
    return Evaluations(probs, targets, common, tuple(source.name(int(index)) for index in common))


def report_parts(
    evaluations: Evaluations, *, baseline: Evaluations | None, classes: Sequence[str]
) -> Mapping[str, Any]:
    """Return what a report shows of the answers; a ``baseline`` of another run counts where it saw the same samples."""
    from visionkd.report.data import Evaluation

    probs = evaluations.probs.get("baseline")
    if baseline is not None:
        other = baseline.probs["student"]
        same = baseline.names == evaluations.names and other.shape == evaluations.probs["student"].shape
        probs = other if same else None
    student, teacher = evaluations.probs["student"], evaluations.probs.get("teacher")
    return {"evaluation": Evaluation(evaluations.targets, student, teacher, probs, evaluations.names)}
