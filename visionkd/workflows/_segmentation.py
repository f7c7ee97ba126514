"""Run networks over a split of images with a class for each pixel; see :mod:`visionkd.workflows._tasks`.

Of each image pixels per class are kept, not the answers themselves, which would take gigabytes; the answers about a few
images, the worst and the best ones of the student, are kept for the report.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from visionkd.errors import Problem, RequestError
from visionkd.runtime.metrics import mean_iou
from visionkd.types import Listener, Progress, Source
from visionkd.workflows._classification import readable
from visionkd.workflows._pixel_counts import Answers, Evaluations, PixelCount, load

if TYPE_CHECKING:
    from PIL.Image import Image

    from visionkd.config.schema import RunConfig
    from visionkd.models.network import Network
    from visionkd.runtime.session import Session

__all__ = ["Answers", "Evaluations", "load"]

MAIN, TITLE, PER_CLASS = "miou", "mIoU", "iou"
BATCH_SIZE = 8
PACKAGED = ("miou", "pixel_acc")
COMPARED = ("miou", "pixel_acc")
#: Images whose answers are kept for the report: the worst and the best of the student.
WORST, BEST = 4, 2


def some(source: Source, count: int, *, seed: int) -> np.ndarray:
    """Return positions, spread evenly: neighbours are often frames of one video."""
    return np.unique(np.linspace(0, len(source) - 1, min(count, len(source))).round().astype(np.int64))


def evaluation_of(config: RunConfig | None) -> str:
    """Return how images are looked at: ``resize``, ``native`` or ``slide``."""
    return config.segmentation.evaluation if config is not None else "resize"


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
    """Run a network over all of ``source``, and count at the native size of each image."""
    network.to(device).eval()
    count = PixelCount(network.num_classes if columns is None else len(columns))
    indices: list[int] = []
    skipped: list[str] = []
    start = time.perf_counter()
    if evaluation_of(config) == "resize":
        pairs = _resized(network, source, device=device, batch_size=batch_size, workers=workers, columns=columns)
    else:
        pairs = _one_by_one(network, source, skipped, config=config, device=device, columns=columns, listener=listener)
    for index, given, target in pairs:
        count.add(given, target)
        indices.append(index)
        if len(indices) % batch_size == 0:
            rate = len(indices) / (time.perf_counter() - start)
            left = (len(source) - len(indices)) / rate
            listener.progress(Progress("evaluate", len(indices), len(source), images_per_s=rate, eta_s=left))
    found = np.asarray(indices, np.int64)
    missing = np.setdiff1d(np.arange(len(source)), found)
    return count.answers(found, [source.name(int(index)) for index in missing])


def _resized(
    network: Network, source: Source, *, device: Any, batch_size: int, workers: int, columns: Sequence[int] | None
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    import torch

    from visionkd.data.loader import eval_loader
    from visionkd.data.views import eval_view

    for batch in eval_loader(source, eval_view("segmentation", network.input), batch_size=batch_size, workers=workers):
        if not len(batch["index"]):
            continue
        with torch.inference_mode():
            logits = network(batch["image"].to(device).float().div_(255.0)).logits
            for index, values, target in zip(batch["index"].tolist(), logits, batch["target"], strict=True):
                yield index, largest(values, tuple(target.shape), columns), np.asarray(target)


def _one_by_one(
    network: Network,
    source: Source,
    skipped: list[str],
    *,
    config: RunConfig | None,
    device: Any,
    columns: Sequence[int] | None,
    listener: Listener,
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    kept: list[int] = []
    for image in readable(source, kept, skipped, every=1, listener=listener):
        yield (
            kept[-1],
            class_map(network, image, config=config, device=device, columns=columns),
            source.target(kept[-1]),
        )


def largest(logits: Any, size: tuple[int, int], columns: Sequence[int] | None = None) -> np.ndarray:
    """Return the class with the largest logit of each pixel, uint8 of ``size``, from logits C x h x w of torch."""
    import torch.nn.functional as F

    if columns is not None:
        logits = logits[list(columns)]
    if tuple(logits.shape[-2:]) != tuple(size):
        logits = F.interpolate(logits[None].float(), size=tuple(size), mode="bilinear", align_corners=False)[0]
    return logits.argmax(0).byte().cpu().numpy()


def class_map(
    network: Network,
    image: Image,
    *,
    config: RunConfig | None,
    device: Any,
    columns: Sequence[int] | None = None,
) -> np.ndarray:
    """Return the class of each pixel of an RGB image, uint8 H x W at its own size."""
    import torch

    from visionkd.runtime.preprocess import stretch, to_batch

    mode = evaluation_of(config)
    with torch.inference_mode():
        if mode == "resize":
            batch = torch.from_numpy(to_batch([stretch(image, network.input)])).to(device)
            return largest(network(batch).logits[0], (image.height, image.width), columns)
        from visionkd.tasks.segmentation import segment

        assert config is not None
        pixels = torch.from_numpy(to_batch([np.asarray(image)])[0]).to(device)
        found = segment(network, pixels, mode=mode, overlap=config.segmentation.slide_overlap)
        return largest(found, (image.height, image.width), columns)


def answer_file(
    session: Session,
    source: Source,
    *,
    batch_size: int,
    listener: Listener,
    config: RunConfig | None = None,
    columns: Sequence[int] | None = None,
) -> Answers:
    """Run a model file over all of ``source``, without torch.

    Raises:
        RequestError: If images are to be looked at at their own size: a file takes one size.
    """
    check_file_evaluation(config)
    kept: list[int] = []
    skipped: list[str] = []
    images = readable(source, kept, skipped, every=batch_size, listener=listener)
    count: PixelCount | None = None
    for number, given in enumerate(session.predict_maps(images, batch_size=batch_size, columns=columns)):
        if count is None:
            count = PixelCount(len(columns) if columns is not None else session.num_classes)
        count.add(given, source.target(kept[number]))
    return (count or PixelCount(1)).answers(np.asarray(kept, np.int64), skipped)


def check_file_evaluation(config: RunConfig | None) -> None:
    """Refuse to look at images in another way than a model file can.

    Raises:
        RequestError: If they are to be looked at at their own size.
    """
    if evaluation_of(config) != "resize":
        problem = Problem(
            "segmentation.evaluation",
            f"'{evaluation_of(config)}' looks at images at their own size, and a model file takes one size",
            "Give -o segmentation.evaluation=resize, or the run that the file came from.",
        )
        raise RequestError(problem)


def together(
    networks: Sequence[tuple[str, Network]],
    source: Source,
    *,
    run_one: Callable[[str, Network], Answers],
    config: RunConfig | None = None,
    device: Any = "cpu",
) -> Evaluations:
    """Run several networks over one split, keep the samples that all could read, and the answers about some of them."""
    answers = {role: run_one(role, network) for role, network in networks}
    common = np.asarray(
        sorted(set.intersection(*(set(found.indices.tolist()) for found in answers.values()))), np.int64
    )
    places = {role: np.searchsorted(found.indices, common) for role, found in answers.items()}
    intersection = {role: found.intersection[places[role]] for role, found in answers.items()}
    union = {role: found.union[places[role]] for role, found in answers.items()}
    first = networks[0][0]
    pictured = worst_and_best(intersection[first], union[first])
    chosen = [int(common[place]) for place in pictured]
    maps = {
        role: tuple(class_map(network.to(device).eval(), source.load(index), config=config, device=device)
                    for index in chosen)
        for role, network in networks
    }  # fmt: skip
    return Evaluations(
        confusion={role: found.confusion for role, found in answers.items()},
        intersection=intersection,
        union=union,
        indices=common,
        names=tuple(source.name(int(index)) for index in common),
        pictured=pictured,
        labels=tuple(np.asarray(source.target(index), np.uint8) for index in chosen),
        maps=maps,
    )


def worst_and_best(intersection: np.ndarray, union: np.ndarray) -> tuple[int, ...]:
    """Return the images with the lowest mIoU, lowest first, then those with the highest, highest first."""
    scores = np.asarray([mean_iou(*each) for each in zip(intersection, union, strict=True)])
    order = [int(index) for index in np.argsort(scores, kind="stable") if np.isfinite(scores[index])]
    worst = order[: _num_worst(min(len(order), WORST + BEST))]
    best = [index for index in reversed(order) if index not in worst][:BEST]
    return (*worst, *best)


def _num_worst(pictured: int) -> int:
    """How many of so many pictured images are the worst ones."""
    return max(pictured - BEST, min(1, pictured))


def report_parts(
    evaluations: Evaluations, *, baseline: Evaluations | None, classes: Sequence[str]
) -> Mapping[str, Any]:
    """Return what a report shows of the answers; a ``baseline`` of another run counts where it saw the same samples."""
    from visionkd.report.segmentation import Segmentation

    intersection, union = dict(evaluations.intersection), dict(evaluations.union)
    if baseline is not None:
        for mine, theirs in ((intersection, baseline.intersection), (union, baseline.union)):
            mine.pop("baseline", None)
            if baseline.names == evaluations.names and theirs["student"].shape == mine["student"].shape:
                mine["baseline"] = theirs["student"]
    return {
        "segmentation": Segmentation(
            intersection=intersection,
            union=union,
            confusion=evaluations.confusion["student"],
            names=evaluations.names,
            pictured=evaluations.pictured,
            num_worst=_num_worst(len(evaluations.pictured)),
            labels=evaluations.labels,
            maps=evaluations.maps,
        )
    }
