"""Batches for training and evaluation.

Training is repeatable from any point: which samples batch ``k`` of an epoch holds follows from (seed, epoch) alone,
and how sample ``i`` looks follows from (seed, view, i) alone. Neither depends on the number of loader processes, on the
rank, or on what was drawn before.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from visionkd.data.cache import CachedSource, _affinity, cached, different_sizes
from visionkd.data.sampler import EvalBatchSampler, PositionedSampler, view_seed
from visionkd.errors import DataError, UnreadableImageError, VisionKDError
from visionkd.types import Source

Transform = Callable[[Any], Tensor]
_MOST_REPLACEMENTS = 1000
_MOST_WORKERS = 8
_SMALL_BATCH_BYTES = 4_000_000
_ERROR = "error"
# How maps of different sizes travel: their pixels in a row, and height and width of each.
_MAPS, _SIZES = "maps", "map_sizes"
# How boxes travel: those of all images in one tensor of each kind, and how many each image has.
_BOXES, _COUNTS = "boxes", "box_counts"
_BOX_KEYS = ("boxes", "labels", "crowd")


def default_workers(world_size: int = 1) -> int:
    """Loader processes for each of ``world_size`` training processes here; one processor is left for each of these."""
    return max(1, min(_MOST_WORKERS, len(_affinity()) // max(1, world_size) - 1))


class _Batches(Dataset):
    """Loads whole batches; one subclass for training, one for evaluation."""

    def __init__(self, source: Source, transform: Transform) -> None:
        self.source = source
        self.transform = transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, samples: Sequence[Any]) -> dict[str, Any]:
        try:
            return self._batch(samples)
        except VisionKDError as error:
            if get_worker_info() is None:
                raise
            # Raised here, it would reach the user wrapped in this process's traceback and without its hint.
            return {_ERROR: error}

    def _batch(self, samples: Sequence[Any]) -> dict[str, Tensor]:
        raise NotImplementedError

    def _collate(self, images: list[Tensor], targets: list[int], **rest: list[int]) -> dict[str, Tensor]:
        if images:
            channels, height, width = images[0].shape
            pixels = _empty((len(images), height, width, channels))
            torch.stack([image.permute(1, 2, 0) for image in images], out=pixels)
            stacked = pixels.permute(0, 3, 1, 2)  # channels-last memory, as convolutions want it
        else:
            height, width = getattr(self.transform, "img_size", (1, 1))
            stacked = torch.empty((0, 3, height, width), dtype=torch.uint8)
        batch = {"image": stacked} | self._targets(targets)
        return batch | {name: torch.tensor(values, dtype=torch.int64) for name, values in rest.items()}

    def _targets(self, targets: list[Any]) -> dict[str, Tensor]:
        return {"target": torch.tensor(targets, dtype=torch.int64)}

    def _view(self, index: int, image: Any, target: Any) -> tuple[Tensor, Any]:
        """Transform a sample, together with its target where that is a map or boxes."""
        if getattr(self.transform, "boxed", False):
            return self.transform(image, target)
        if not getattr(self.transform, "joint", False):
            return self.transform(image), target
        size = (image.height, image.width) if hasattr(image, "height") else tuple(image.shape[1:])
        if size != tuple(target.shape):
            raise different_sizes(self.source.name(index), size, tuple(target.shape))
        return self.transform(image, target)


def _flat_boxes(targets: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
    """Return targets that are boxes as a few tensors: each one that a loader process sends holds a file open."""
    if not targets:
        return {_BOXES: {}, _COUNTS: torch.zeros(0, dtype=torch.int64)}
    flat = {name: torch.cat([target[name] for target in targets]) for name in _BOX_KEYS}
    rest = {name: torch.stack([target[name] for target in targets]) for name in targets[0] if name not in _BOX_KEYS}
    return {_BOXES: flat, _COUNTS: torch.tensor([len(target["labels"]) for target in targets]), **rest}


def _empty(shape: Sequence[int]) -> Tensor:
    """An uninitialised uint8 tensor; in a loader process in shared memory, so that sending it copies nothing."""
    tensor = torch.empty(tuple(shape), dtype=torch.uint8)
    return tensor.share_memory_() if get_worker_info() is not None else tensor


class _TrainBatches(_Batches):
    def __init__(self, source: Source, transform: Transform, view_seed: int) -> None:
        super().__init__(source, transform)
        self.view_seed = view_seed

    def _batch(self, pairs: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        # The main process's own randomness must not notice; a loader process has no other use for it.
        state = None if get_worker_info() is not None else (torch.get_rng_state(), random.getstate())
        try:
            images, targets, indices, unreadable = [], [], [], []
            loaded: tuple[int, Any, Any, int] = (-1, None, None, -1)
            for index, view in pairs:
                if loaded[0] != index:  # several views of one image follow one another
                    loaded = (index, *self._read(index))
                _, sample, label, used = loaded
                self._seed(used, view)
                image, target = self._view(used, sample, label)
                images.append(image)
                targets.append(target)
                indices.append(used)
                unreadable.append(-1 if used == index else index)
        finally:
            if state is not None:
                torch.set_rng_state(state[0])
                random.setstate(state[1])
        views = [view for _, view in pairs]
        return self._collate(images, targets, index=indices, view=views, unreadable=unreadable)

    def _targets(self, targets: list[Any]) -> dict[str, Tensor]:
        if getattr(self.transform, "boxed", False):
            return _flat_boxes(targets)
        if not getattr(self.transform, "joint", False):
            return super()._targets(targets)
        return {"target": torch.stack(targets, out=_empty((len(targets), *targets[0].shape)))}

    def _seed(self, index: int, view: int) -> None:
        seed = view_seed(self.view_seed, view, index)
        torch.default_generator.manual_seed(seed >> 1)
        random.seed(seed)

    def _read(self, index: int) -> tuple[Any, Any, int]:
        """Image and target of a sample, or of the next one that can be read; and that one's index."""
        count = len(self.source)
        for step in range(min(count, _MOST_REPLACEMENTS)):
            used = (index + step) % count
            try:
                return self.source.load(used), self.source.target(used), used
            except UnreadableImageError:
                continue
        raise DataError(
            f"no readable image among {min(count, _MOST_REPLACEMENTS)} from '{self.source.name(index)}' on",
            hint="Run 'visionkd data check' on the data.",
        )


class _EvalBatches(_Batches):
    def _batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        images, targets, kept, skipped = [], [], [], []
        for index in indices:
            try:
                sample = self.source.load(index), self.source.target(index)
            except UnreadableImageError:
                skipped.append(index)
                continue
            image, target = self._view(index, *sample)
            images.append(image)
            targets.append(target)
            kept.append(index)
        batch = self._collate(images, targets, index=kept)
        return batch | {"unreadable": torch.tensor(skipped, dtype=torch.int64)}

    def _targets(self, targets: list[Any]) -> dict[str, Tensor]:
        if getattr(self.transform, "boxed", False):
            return _flat_boxes(targets)
        if not getattr(self.transform, "joint", False):
            return super()._targets(targets)
        # One tensor for all maps, whatever their sizes: each tensor that a loader process sends holds a file open.
        flat = _empty((sum(target.numel() for target in targets),))
        if targets:
            torch.cat([target.flatten() for target in targets], out=flat)
        return {_MAPS: flat, _SIZES: torch.tensor([list(each.shape) for each in targets], dtype=torch.int64)}


def _as_it_is(batch: dict[str, Any]) -> dict[str, Any]:
    return batch


def _start_worker(_: int) -> None:
    """Leave Ctrl-C to the main process, which ends its loader processes when it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Received:
    """Raises errors that loader processes sent, and takes maps of different sizes, and boxes, apart again."""

    def __init__(self, batches: Iterator[dict[str, Any]]) -> None:
        self._batches = batches

    def __iter__(self) -> _Received:
        return self

    def __next__(self) -> dict[str, Tensor]:
        batch = next(self._batches)
        if _ERROR in batch:
            raise batch[_ERROR]
        if _MAPS in batch:
            sizes = batch.pop(_SIZES).tolist()
            parts = batch.pop(_MAPS).split([height * width for height, width in sizes]) if sizes else ()
            batch["target"] = [part.view(*size) for part, size in zip(parts, sizes, strict=True)]
        if _BOXES in batch:
            counts = batch.pop(_COUNTS).tolist()
            flat = {name: values.split(counts) for name, values in batch.pop(_BOXES).items()}
            batch["target"] = [{name: flat[name][place] for name in flat} for place in range(len(counts))]
            for name in ("scale", "size"):  # what brings the boxes that are found back to the picture
                for target, value in zip(batch["target"], batch.get(name, ()), strict=False):
                    target[name] = value
        return batch


class _Loader(DataLoader):
    """A DataLoader whose datasets deliver finished batches.

    It has a random generator of its own: the default one, which training may draw dropout from, is left untouched by
    the start of an epoch, and a run resumed in the middle of one stays in step.
    """

    def __init__(
        self, dataset: _Batches, batch_sampler: Any, workers: int, batch_size: int, pin_memory: bool | None
    ) -> None:
        height, width = getattr(dataset.transform, "img_size", (0, 0))
        small = batch_size * 3 * height * width < _SMALL_BATCH_BYTES
        super().__init__(
            dataset,
            batch_sampler=batch_sampler,
            num_workers=workers,
            collate_fn=_as_it_is,
            persistent_workers=workers > 0,
            # Batches ahead lie in shared memory, of which a container may have 64 MB.
            prefetch_factor=(4 if small else 2) if workers else None,
            pin_memory=torch.cuda.is_available() if pin_memory is None else pin_memory,
            worker_init_fn=_start_worker,
            generator=torch.Generator().manual_seed(0),
        )

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return _Received(super().__iter__())

    @property
    def source(self) -> Source:
        return self.dataset.source


class TrainLoader(_Loader):
    """Endless in epochs, exact in position; see :class:`PositionedSampler`.

    Batches hold ``image`` (uint8, B x 3 x H x W), ``target``, ``index``, ``view`` and ``unreadable`` (the index of the
    sample whose place was taken by another, else -1); all but the first int64, B. Targets that are maps are uint8,
    B x H x W. Targets that are boxes come as a list of ``boxes``, ``labels`` and ``crowd`` for each view, with
    ``geometry``, B x 4; see :class:`visionkd.data.detection_transforms.BoxTrainTransform`.
    """

    batch_sampler: PositionedSampler

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)

    def set_position(self, epoch: int, batch: int) -> None:
        self.batch_sampler.set_position(epoch, batch)

    def over(self, batches: Iterable[list[tuple[int, int]]], *, few: bool = False) -> Iterator[dict[str, Tensor]]:
        """Yield batches of given (index, view) pairs, drawn as the training draws them.

        Args:
            batches: The pairs of each batch.
            few: Draw them in this process, for too few batches to start loader processes for.
        """
        workers = 0 if few else self.num_workers
        return iter(_Loader(self.dataset, batches, workers, self.batch_sampler.batch_size, self.pin_memory))

    @property
    def cached(self) -> bool:
        """Whether the images lie in memory."""
        return isinstance(self.source, CachedSource)

    def state_dict(self) -> dict[str, Any]:
        """Empty: the position follows from the trainer's own counters. Lightning wants to see the method."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load."""


class EvalLoader(_Loader):
    """Batches hold ``image``, ``target``, ``index`` of readable samples; ``unreadable`` lists the indices left out.

    Targets that are maps come as a list of uint8 tensors, each at the size of its picture; those that are boxes as a
    list of ``boxes``, ``labels`` and ``crowd`` in pixels of the picture, with its ``scale`` and ``size``, which the
    batch has too; see :class:`visionkd.data.detection_transforms.BoxEvalTransform`.
    """


def train_loader(
    source: Source,
    transform: Transform,
    *,
    batch_size: int,
    seed: int,
    workers: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    cache: str = "auto",
    views: int | None = None,
    views_per_image: int = 1,
    view_seed: int | None = None,
    epochs: int | None = None,
    pin_memory: bool | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TrainLoader:
    """Return the batches to train on.

    Args:
        source: The training samples.
        transform: Usually a :class:`visionkd.data.transforms.TrainTransform`.
        batch_size: Images per batch of this rank.
        seed: Decides the order and the views.
        workers: Loader processes; 0 loads in this process, None takes :func:`default_workers`.
        rank: This process.
        world_size: Number of training processes.
        cache: ``ram`` decodes all images now, ``auto`` does so where they fit in 1 GB, ``none`` never.
        views: Number of different views per sample; None draws a new one every epoch.
        views_per_image: Views taken of each image that is loaded.
        view_seed: Decides the views, where ``seed`` is to decide the order alone.
        epochs: Epochs to come, if known: ``auto`` caches nothing for fewer than three.
        pin_memory: Copy batches to page-locked memory; None does where there is a CUDA device.
        progress: Called with images decoded and images in all while the cache is filled.
    """
    source = cached(source, cache, epochs=epochs, progress=progress)
    ranks = {"rank": rank, "world_size": world_size}
    sampler = PositionedSampler(
        len(source), batch_size, seed=seed, views=views, views_per_image=views_per_image, **ranks
    )
    workers = default_workers(world_size) if workers is None else workers
    batches = _TrainBatches(source, transform, seed if view_seed is None else view_seed)
    return TrainLoader(batches, sampler, workers, batch_size, pin_memory)


def eval_loader(
    source: Source,
    transform: Transform,
    *,
    batch_size: int,
    workers: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    cache: str = "none",
    pin_memory: bool | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> EvalLoader:
    """Return the batches to evaluate on, in order, each sample once.

    Args:
        source: The samples.
        transform: Usually a :class:`visionkd.data.transforms.EvalTransform`.
        batch_size: Images per batch at most.
        workers: Loader processes; 0 loads in this process, None takes :func:`default_workers`.
        rank: This process.
        world_size: Number of processes.
        cache: As for :func:`train_loader`; pays where the same split is evaluated after every epoch.
        pin_memory: As for :func:`train_loader`.
        progress: Called with images decoded and images in all while the cache is filled.
    """
    source = cached(source, cache, progress=progress)
    if getattr(transform, "native", False):
        batch_size = 1  # pictures of many sizes are no batch
    sampler = EvalBatchSampler(len(source), batch_size, rank=rank, world_size=world_size)
    workers = default_workers(world_size) if workers is None else workers
    return EvalLoader(_EvalBatches(source, transform), sampler, workers, batch_size, pin_memory)
