"""Run detectors over a split of images with boxes; see :mod:`visionkd.workflows._tasks`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from visionkd.data.boxes import novel_of
from visionkd.runtime.box_metrics import box_set
from visionkd.runtime.boxes import FoundBoxes
from visionkd.types import Listener, Progress, Source
from visionkd.workflows._box_counts import Answers, Evaluations, load
from visionkd.workflows._classification import readable
from visionkd.workflows._segmentation import some

if TYPE_CHECKING:
    from visionkd.config.schema import RunConfig
    from visionkd.models.network import Network
    from visionkd.runtime.session import Session

__all__ = ["Answers", "Evaluations", "load", "some"]

MAIN, TITLE, PER_CLASS = "ap", "AP", "ap"
BATCH_SIZE = 8
PACKAGED = ("ap", "ap50", "ap75", "ap50_base", "ap50_novel")
COMPARED = PACKAGED


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
    """Run a network over all of ``source``; what it finds of classes that are not in ``columns`` is left out."""
    import torch

    from visionkd.data.loader import eval_loader
    from visionkd.data.views import eval_view

    network.to(device).eval()
    found: list[dict[str, np.ndarray]] = []
    truth: list[dict[str, np.ndarray]] = []
    indices: list[int] = []
    start = time.perf_counter()
    for batch in eval_loader(source, eval_view("detection", network.input), batch_size=batch_size, workers=workers):
        if not len(batch["index"]):
            continue
        with torch.inference_mode():
            answers = network(batch["image"].to(device).float().div_(255.0)).boxes
        scales, sizes = batch["scale"].tolist(), batch["size"].tolist()
        for given, target, scale, size in zip(answers, batch["target"], scales, sizes, strict=True):
            arrays = (getattr(given, name).float().cpu().numpy() for name in ("boxes", "scores", "labels"))
            boxes, scores, labels = arrays
            on_picture = FoundBoxes(boxes, scores, labels.astype(np.int64)).on_picture(scale, size)
            found.append(_in_order(on_picture, columns))
            truth.append({name: target[name].numpy() for name in ("boxes", "labels", "crowd")})
        indices += batch["index"].tolist()
        rate = len(indices) / (time.perf_counter() - start)
        left = (len(source) - len(indices)) / rate
        listener.progress(Progress("evaluate", len(indices), len(source), images_per_s=rate, eta_s=left))
    kept = np.asarray(indices, np.int64)
    missing = np.setdiff1d(np.arange(len(source)), kept)
    return Answers(
        box_set(found), box_set(truth), network.num_classes if columns is None else len(columns), kept,
        tuple(source.name(int(index)) for index in missing), novel_of(source),
    )  # fmt: skip


def _in_order(found: FoundBoxes, columns: Sequence[int] | None) -> dict[str, np.ndarray]:
    """Return boxes with the labels of the data: ``columns`` are the network's outputs in the order of its classes."""
    boxes, scores, labels = found.boxes, found.scores, found.labels
    if columns is not None:
        number = {column: place for place, column in enumerate(columns)}
        kept = np.isin(labels, list(columns))
        boxes, scores = boxes[kept], scores[kept]
        labels = np.array([number[label] for label in labels[kept].tolist()], np.int64)
    return {"boxes": boxes, "labels": labels, "scores": scores}


def answer_file(
    session: Session,
    source: Source,
    *,
    batch_size: int,
    listener: Listener,
    config: RunConfig | None = None,
    columns: Sequence[int] | None = None,
) -> Answers:
    """Run a model file over all of ``source``, without torch; average precision takes faster-coco-eval there too."""
    kept: list[int] = []
    skipped: list[str] = []
    found: list[dict[str, np.ndarray]] = []
    truth: list[dict[str, np.ndarray]] = []
    images = readable(source, kept, skipped, every=batch_size, listener=listener)
    for number, boxes in enumerate(session.predict_boxes(images, batch_size=batch_size, columns=columns)):
        found.append({"boxes": boxes.boxes, "labels": boxes.labels, "scores": boxes.scores})
        truth.append(source.target(kept[number]))
    count = len(columns) if columns is not None else session.num_classes
    return Answers(box_set(found), box_set(truth), count, np.asarray(kept, np.int64), tuple(skipped), novel_of(source))


def together(
    networks: Sequence[tuple[str, Network]],
    source: Source,
    *,
    run_one: Callable[[str, Network], Answers],
    config: RunConfig | None = None,
    device: Any = "cpu",
) -> Evaluations:
    """Run several networks over one split, and keep the samples that all of them could read."""
    answers = {role: run_one(role, network) for role, network in networks}
    common = np.asarray(
        sorted(set.intersection(*(set(found.indices.tolist()) for found in answers.values()))), np.int64
    )
    places = {role: np.searchsorted(found.indices, common) for role, found in answers.items()}
    first = networks[0][0]
    return Evaluations(
        found={role: found.found.taken(places[role]) for role, found in answers.items()},
        truth=answers[first].truth.taken(places[first]),
        num_classes=answers[first].num_classes,
        indices=common,
        names=tuple(source.name(int(index)) for index in common),
        novel=answers[first].novel,
    )


def report_parts(
    evaluations: Evaluations, *, baseline: Evaluations | None, classes: Sequence[str]
) -> Mapping[str, Any]:
    """Return what a report shows of the answers; a ``baseline`` of another run counts where it saw the same samples."""
    from visionkd.report.detection import Detection

    found = dict(evaluations.found)
    precision = {role: evaluations.precision(role) for role in found}
    if baseline is not None:
        found.pop("baseline", None)
        precision.pop("baseline", None)
        if baseline.names == evaluations.names and baseline.num_classes == evaluations.num_classes:
            found["baseline"], precision["baseline"] = baseline.found["student"], baseline.precision("student")
    return {
        "detection": Detection(
            precision=precision,
            found=found,
            truth=evaluations.truth,
            num_classes=evaluations.num_classes,
            names=evaluations.names,
            novel=evaluations.novel,
        )
    }
