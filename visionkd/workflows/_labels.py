"""The label store of a run: whether it takes one, which, and how it is filled."""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from visionkd.benchmark.record import versions
from visionkd.config.schema import DistillConfig
from visionkd.data.loader import TrainLoader
from visionkd.errors import Problem, RequestError
from visionkd.methods._base import DistillationModule
from visionkd.methods._stored import StoredTeachers
from visionkd.models.network import Network
from visionkd.teachers.store import LabelStore, estimate_bytes, labels_root, nearest_store, store_path
from visionkd.types import DataSet, Listener, Progress
from visionkd.workflows._method import method_name

_FULL_UP_TO_CLASSES = 100
_FEWEST_VIEWS = 10
_EPOCHS_PER_VIEW = 4
_MOST_OF_FREE_DISK = 0.25
_LIBRARIES = ("torch", "torchvision", "timm", "pillow", "numpy")
_BLOCK = 4096
_FEW_BATCHES = 8
_VIEWS = {"crop_size", "scale", "evaluation"}


def resolve_label_store(
    config: DistillConfig, method: type[DistillationModule], options: Any, data: DataSet
) -> list[str]:
    """Decide what was left to decide, so that a resumed run does the same; return what the user should hear.

    A map takes thousands of times the room of a label, so it is kept only where that is asked for.

    Raises:
        RequestError: If a store is asked for and the method has no use for one.
    """
    settings, epochs = config.label_store, config.training.epochs
    if not method.can_store_labels(options):
        if settings.mode == "on":
            raise RequestError(
                Problem(
                    "--cache-teacher",
                    f"'{method_name(config)}' needs more of its teachers than probabilities, with these options,"
                    " so what they say cannot be kept",
                    "Leave it out.",
                )
            )
        settings.mode = "off"
    if settings.mode == "auto" and (config.augment.mixup_alpha or config.augment.cutmix_alpha):
        settings.mode = "off"  # teachers that look at the mixed image say more than a mixture of what they said
    maps = data.task == "segmentation"
    if settings.mode == "auto" and maps:
        settings.mode = "off"
    if settings.mode == "off":
        return []
    views = settings.views or max(_FEWEST_VIEWS, math.ceil(epochs / _EPOCHS_PER_VIEW), settings.views_per_image)
    if settings.mode == "auto" and views >= epochs:
        settings.mode = "off"  # no view would come twice
        return []
    storage = settings.storage
    if maps:
        if storage == "top_k":
            problem = Problem("label_store.storage", "top_k leaves out classes, and maps are kept whole", "Use full.")
            raise RequestError(problem)
        storage = "full"
    if storage == "auto":
        storage = "full" if len(data.classes) <= _FULL_UP_TO_CLASSES else "top_k"
    size = views * estimate_bytes(len(data.splits["train"]), len(data.classes), storage, settings.top_k)
    free = _free_bytes(settings.path)
    if settings.mode == "auto" and size > _MOST_OF_FREE_DISK * free:
        settings.mode = "off"
        return [
            f"The teachers run in every step: keeping what they say would take {size / 1e9:.1f} GB of the"
            f" {free / 1e9:.1f} GB that are free (--cache-teacher keeps it all the same)"
        ]
    settings.mode, settings.views, settings.storage = "on", min(views, epochs), storage
    return []


def _row(grid: tuple[int, int, int] | None, data: DataSet) -> int:
    """Numbers in one label."""
    return len(data.classes) if grid is None else math.prod(grid)


@torch.no_grad()
def label_grid(
    config: DistillConfig, *, data: DataSet, student: Network, img_size: tuple[int, int]
) -> tuple[int, int, int] | None:
    """Return classes, height and width of the student's answer about a training view; None where it is no map.

    Stored maps have this size, to which a method brings those of a teacher anyway.
    """
    if data.task != "segmentation":
        return None
    crop = config.segmentation.crop_size or img_size
    height, width = (crop, crop) if isinstance(crop, int) else crop
    was_training = student.training
    logits = student.eval()(torch.zeros(1, 3, height, width)).logits
    student.train(was_training)
    return tuple(logits.shape[1:])  # type: ignore[return-value]


def _free_bytes(path: str | None) -> int:
    place = Path(path).expanduser() if path else labels_root()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


@dataclass(frozen=True)
class Labels:
    """An open store and how a run uses it.

    Attributes:
        store: The store.
        rest: What becomes of classes that are not stored.
        ahead: Whether all of them are to be there before the training begins.
        grid: Classes, height and width of a label, where it is a map.
    """

    store: LabelStore
    rest: str
    ahead: bool
    grid: tuple[int, int, int] | None = None


def labels_for(
    config: DistillConfig,
    *,
    data: DataSet,
    teachers: Sequence[Network],
    temperature: float,
    img_size: tuple[int, int],
    student: Network,
    listener: Listener,
) -> Labels | None:
    """Open the store of a training by all that decides what it holds; None where the training takes no store."""
    if config.label_store.mode != "on":
        return None
    grid, interpolation = label_grid(config, data=data, student=student, img_size=img_size), student.input.interpolation
    key = store_key(
        config, data=data, teachers=teachers, temperature=temperature, img_size=img_size, interpolation=interpolation,
        grid=grid,
    )  # fmt: skip
    return open_labels(config, key, data=data, teachers=teachers, listener=listener, grid=grid)


def open_labels(
    config: DistillConfig,
    key: Mapping[str, Any],
    *,
    data: DataSet,
    teachers: Sequence[Network],
    listener: Listener,
    grid: tuple[int, int, int] | None = None,
) -> Labels:
    """Open the store that belongs to a run which takes one, and say what it saves.

    Args:
        config: Settings of the training, with ``label_store`` resolved.
        key: What :func:`store_key` gave for it.
        data: What is trained on.
        teachers: Whose labels they are.
        listener: Is told what is kept.
        grid: Classes, height and width of a label, where it is a map.

    Raises:
        RequestError: If the directory that was named holds labels of another teacher, data set, view or library.
    """
    settings = config.label_store
    assert settings.views is not None and settings.storage != "auto", "resolve_label_store decides both"
    form = {"storage": settings.storage, "top_k": settings.top_k}
    path = Path(settings.path).expanduser() if settings.path else store_path(key, **form)
    if not path.exists() and (near := nearest_store(key, unrelated=_other_teachers_or_data)) is not None:
        differing = ", ".join(problem.key for problem in near[1][:4])
        listener.message(f"The label store {near[0]} does not fit this run: it differs in {differing}")
    store = LabelStore.open(
        path,
        key,
        num_samples=len(data.splits["train"]),
        num_classes=_row(grid, data),
        about={"teachers": [teacher.architecture for teacher in teachers], "data": data.name},
        on_message=listener.message,
        **form,
    )
    listener.message(_what_it_saves(store, settings.views, config.training.epochs, ahead=settings.ahead))
    return Labels(store, settings.rest, settings.ahead, grid)


def _other_teachers_or_data(name: str) -> bool:
    """Whether a store that differs in this part of its key holds answers of other teachers, or about other images."""
    part, _, rest = name.partition(".")
    return part in ("data", "classes") or (part == "teachers" and not rest.endswith(".precision"))


def _what_it_saves(store: LabelStore, views: int, epochs: int, *, ahead: bool) -> str:
    samples = store.manifest.num_samples
    there = sum(store.count(view) > 0.99 * samples for view in range(views))
    size_mb = views * samples * store.bytes_per_label / 1e6
    kept = f"{views} views of each" if views > 1 else "one view of each"
    text = f"Teacher labels: {kept} of {samples:,} images in {store.path} ({size_mb:,.1f} MB)"
    to_do = views - there
    if not to_do:
        return f"{text}; all of them are there, so the teachers do not run at all"
    have = f"; {there} are there already" if there else ""
    if ahead:
        when = f"before the training, over {_counted(to_do, 'view')}"
    elif to_do == epochs:
        when = "in every epoch, and other runs find the labels there"
    else:
        when = f"in {to_do} of the {epochs} epochs (--no-cache-teacher draws new views in every epoch)"
    return f"{text}{have}; the teachers run {when}"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def store_key(
    config: DistillConfig,
    *,
    data: DataSet,
    teachers: Sequence[Network],
    temperature: float,
    img_size: tuple[int, int],
    interpolation: str,
    grid: tuple[int, int, int] | None = None,
) -> dict[str, Any]:
    """Return all that decides what the teachers say of a view."""
    augment = config.augment.model_dump(
        mode="json", exclude={"mixup_alpha", "cutmix_alpha", "learned", "hard"}
    )  # what is done to a batch comes after the labels
    views = {}
    if grid is not None:  # what else decides how a picture is shown with its map
        views = {"grid": list(grid), **config.segmentation.model_dump(mode="json", include=_VIEWS)}
    precisions = [spec.precision or config.training.precision for spec in config.teachers]
    return {
        "teachers": [
            {
                "architecture": teacher.architecture,
                "weights": weights_hash(teacher),
                "input": teacher.input.to_dict(),
                "precision": precision,
            }
            for teacher, precision in zip(teachers, precisions, strict=True)
        ],
        "temperature": temperature,
        "classes": hashlib.sha256("\0".join(data.classes).encode()).hexdigest(),
        "data": {"name": data.name, "fingerprint": data.fingerprint},
        "augment": {
            **augment,
            "img_size": list(img_size),
            "interpolation": interpolation,
            "view_seed": config.label_store.view_seed,
            **views,
        },
        "versions": versions(_LIBRARIES),
    }


def weights_hash(network: Network) -> str:
    """Return the SHA-256 of all tensors of a network, with their names."""
    digest = hashlib.sha256()
    for name, value in sorted(network.net.state_dict().items()):
        value = value.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class FillLabels(Callback):
    """Fills the store: ahead where that was asked for, and otherwise whatever the first pass over a view left out.

    Args:
        labels: The open store.
        loader: Draws the views as the training does.
        listener: Is told how far it is.
    """

    def __init__(self, labels: Labels, loader: TrainLoader, listener: Listener) -> None:
        self.labels, self.loader, self.listener = labels, loader, listener

    def setup(self, trainer: Trainer, pl_module: DistillationModule, stage: str) -> None:
        pl_module.stored = StoredTeachers(self.labels.store, rest=self.labels.rest, grid=self.labels.grid)

    def on_train_start(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        if self.labels.ahead:
            last = trainer.max_epochs or 0
            views = {view for epoch in range(last) for view in self.loader.batch_sampler.views_of(epoch)}
            self._fill(trainer, pl_module, sorted(views), say=True)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        sampler = self.loader.batch_sampler
        if sampler.has_passed(trainer.current_epoch):  # a pass leaves out what does not fill a last batch
            self._fill(trainer, pl_module, sampler.views_of(trainer.current_epoch))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        self._commit(trainer)

    def _fill(self, trainer: Trainer, module: DistillationModule, views: Sequence[int], *, say: bool = False) -> None:
        store = self.labels.store
        # of a training on the labelled images alone, which come first, the others' labels are not wanted
        wanted = len(self.loader.source)
        absent = {view: (missing := store.missing(view))[missing < wanted] for view in views}
        total = sum(map(len, absent.values()))
        if not total:
            return
        done, size = 0, self.loader.batch_sampler.batch_size
        batches = _batches(absent, size, trainer.global_rank, trainer.world_size)
        for batch in self.loader.over(batches, few=total < _FEW_BATCHES * size):
            image = module.on_after_batch_transfer({"image": batch["image"].to(module.device)}, 0)["image"]
            module.stored.write(batch["index"], batch["view"], module.label_to_store(image))
            done += len(batch["index"]) * trainer.world_size
            if say:
                self.listener.progress(Progress("labels", min(done, total), total))
        self._commit(trainer)

    def _commit(self, trainer: Trainer) -> None:
        """Merge what all ranks have written; one process of each node writes the shards."""
        self.labels.store.seal()
        trainer.strategy.barrier("labels written")
        if trainer.local_rank == 0:
            self.labels.store.commit()
        trainer.strategy.barrier("labels merged")
        self.labels.store.refresh()


def _batches(absent: Mapping[int, Any], batch_size: int, rank: int, world_size: int) -> Iterator[list[tuple[int, int]]]:
    """Yield (index, view) pairs, all views of an image one after the other, so that it is loaded once for them."""
    batch: list[tuple[int, int]] = []
    last = max(int(samples[-1]) for samples in absent.values() if len(samples)) + 1
    for start in range(0, last, _BLOCK):
        pairs = []
        for view, samples in absent.items():
            low, high = samples.searchsorted((start, start + _BLOCK))
            pairs += [(int(index), view) for index in samples[low:high]]
        for number, pair in enumerate(sorted(pairs)):
            if number % world_size == rank:
                batch.append(pair)
            if len(batch) == batch_size:
                yield batch
                batch = []
    if batch:
        yield batch
