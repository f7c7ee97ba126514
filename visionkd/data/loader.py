"""Batches for training and evaluation.

Training is repeatable from any point: which samples batch ``k`` of an epoch holds follows from (seed, epoch) alone,
and how sample ``i`` looks follows from (seed, view, i) alone. Neither depends on the number of loader processes, on the
rank, or on what was drawn before.
"""

from __future__ import annotations

import hashlib
import math
import random
import signal
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from visionkd.data.cache import CachedSource, _affinity, cached
from visionkd.errors import DataError, UnreadableImageError, VisionKDError
from visionkd.types import Source

Transform = Callable[[Any], Tensor]
_MOST_REPLACEMENTS = 1000
_MOST_WORKERS = 8
_SMALL_BATCH_BYTES = 4_000_000
_ERROR = "error"


def view_seed(seed: int, view: int, index: int) -> int:
    """Return the seed of one view of one sample, a hash of all three numbers."""
    return int.from_bytes(hashlib.blake2b(struct.pack("<qqq", seed, view, index), digest_size=8).digest(), "little")


def default_workers(world_size: int = 1) -> int:
    """Loader processes for each of ``world_size`` training processes here; one processor is left for each of these."""
    return max(1, min(_MOST_WORKERS, len(_affinity()) // max(1, world_size) - 1))


class PositionedSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (index, view) pairs, from any position.

    Global batch ``k`` of an epoch is ``order[k * B * W : (k + 1) * B * W]`` for W ranks of batch size B; each rank
    takes its contiguous part. W ranks together therefore see exactly what one process sees with batch size B * W.

    Args:
        num_samples: Samples in all.
        batch_size: Batch size B of one rank.
        seed: Together with the epoch it decides the order.
        rank: This process.
        world_size: Number of processes, W.
        views: Number of different views of each sample, taken in turn; None draws a new one every epoch.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        views: int | None = None,
    ) -> None:
        if num_samples < 1:
            raise DataError("the training set is empty")
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"batch_size {batch_size}, rank {rank} of {world_size}")
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.views = views
        self.epoch = 0
        self.start = 0

    @property
    def sampler(self) -> PositionedSampler:
        """Where Lightning looks for ``set_epoch``."""
        return self

    def __len__(self) -> int:
        """Batches of a full epoch, wherever the next iteration starts."""
        return max(1, self.num_samples // (self.batch_size * self.world_size))

    def set_epoch(self, epoch: int) -> None:
        """Go to an epoch; to its beginning, unless it is the current one."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def set_position(self, epoch: int, batch: int) -> None:
        """Start the next iteration at ``batch`` of ``epoch``, both counted from 0."""
        if not 0 <= batch <= len(self):
            raise ValueError(f"batch {batch} of an epoch of {len(self)}")
        self.epoch, self.start = epoch, batch

    def order(self, epoch: int) -> Tensor:
        """Return the order of an epoch, int64; repeated where the samples do not fill one batch."""
        generator = torch.Generator().manual_seed(view_seed(self.seed, epoch, -1) >> 1)
        order = torch.randperm(self.num_samples, generator=generator)
        whole = self.batch_size * self.world_size
        return order if len(order) >= whole else order.repeat(-(-whole // len(order)))[:whole]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, start = self.epoch, self.start
        view = epoch % self.views if self.views else epoch
        order = self.order(epoch)
        for batch in range(start, len(self)):
            first = (batch * self.world_size + self.rank) * self.batch_size
            yield [(index, view) for index in order[first : first + self.batch_size].tolist()]


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
        batch = {"image": stacked, "target": torch.tensor(targets, dtype=torch.int64)}
        return batch | {name: torch.tensor(values, dtype=torch.int64) for name, values in rest.items()}


def _empty(shape: Sequence[int]) -> Tensor:
    """An uninitialised uint8 tensor; in a loader process in shared memory, so that sending it copies nothing."""
    tensor = torch.empty(tuple(shape), dtype=torch.uint8)
    return tensor.share_memory_() if get_worker_info() is not None else tensor


class _TrainBatches(_Batches):
    def __init__(self, source: Source, transform: Transform, seed: int, with_view: bool) -> None:
        super().__init__(source, transform)
        self.seed = seed
        self.with_view = with_view

    def _batch(self, pairs: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        # The main process's own randomness must not notice; a loader process has no other use for it.
        state = None if get_worker_info() is not None else (torch.get_rng_state(), random.getstate())
        try:
            images, indices, unreadable = [], [], []
            for index, view in pairs:
                image, used = self._load(index, view)
                images.append(image)
                indices.append(used)
                unreadable.append(-1 if used == index else index)
        finally:
            if state is not None:
                torch.set_rng_state(state[0])
                random.setstate(state[1])
        targets = [self.source.target(index) for index in indices]
        extra = {"view": [view for _, view in pairs]} if self.with_view else {}
        return self._collate(images, targets, index=indices, unreadable=unreadable, **extra)

    def _load(self, index: int, view: int) -> tuple[Tensor, int]:
        """The view of a sample, or of the next one that can be read; and that one's index."""
        count = len(self.source)
        for step in range(min(count, _MOST_REPLACEMENTS)):
            used = (index + step) % count
            try:
                image = self.source.load(used)
            except UnreadableImageError:
                continue
            seed = view_seed(self.seed, view, used)
            torch.default_generator.manual_seed(seed >> 1)
            random.seed(seed)
            return self.transform(image), used
        raise DataError(
            f"no readable image among {min(count, _MOST_REPLACEMENTS)} from '{self.source.name(index)}' on",
            hint="Run 'visionkd data check' on the data.",
        )


class _EvalBatches(_Batches):
    def _batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        images, kept, skipped = [], [], []
        for index in indices:
            try:
                images.append(self.transform(self.source.load(index)))
                kept.append(index)
            except UnreadableImageError:
                skipped.append(index)
        batch = self._collate(images, [self.source.target(index) for index in kept], index=kept)
        return batch | {"unreadable": torch.tensor(skipped, dtype=torch.int64)}


def _as_it_is(batch: dict[str, Any]) -> dict[str, Any]:
    return batch


def _start_worker(_: int) -> None:
    """Leave Ctrl-C to the main process, which ends its loader processes when it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Received:
    """Raises errors that loader processes sent."""

    def __init__(self, batches: Iterator[dict[str, Any]]) -> None:
        self._batches = batches

    def __iter__(self) -> _Received:
        return self

    def __next__(self) -> dict[str, Tensor]:
        batch = next(self._batches)
        if _ERROR in batch:
            raise batch[_ERROR]
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

    Batches hold ``image`` (uint8, B x 3 x H x W), ``target``, ``index``, ``unreadable`` (the index of the sample whose
    place was taken by another, else -1) and, where views are counted, ``view``; all but the first int64, B.
    """

    batch_sampler: PositionedSampler

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)

    def set_position(self, epoch: int, batch: int) -> None:
        self.batch_sampler.set_position(epoch, batch)

    @property
    def cached(self) -> bool:
        """Whether the images lie in memory."""
        return isinstance(self.source, CachedSource)

    def state_dict(self) -> dict[str, Any]:
        """Empty: the position follows from the trainer's own counters. Lightning wants to see the method."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load."""


class EvalBatchSampler(Sampler[list[int]]):
    """Batches of indices in order, shared out over ranks: each index is seen once, and all ranks take as many steps.

    Args:
        num_samples: Samples in all.
        batch_size: Largest batch.
        rank: This process; it takes samples ``rank, rank + world_size, ...``.
        world_size: Number of processes.
    """

    def __init__(self, num_samples: int, batch_size: int, *, rank: int = 0, world_size: int = 1) -> None:
        indices = np.arange(rank, num_samples, world_size)
        batches = [indices[start : start + batch_size].tolist() for start in range(0, len(indices), batch_size)]
        steps = math.ceil(math.ceil(num_samples / world_size) / batch_size)
        # A rank with one sample less may be a batch short: ranks that wait for one another would hang.
        if batches and len(batches) < steps and len(batches[-1]) > 1:
            last = batches.pop()
            batches += [last[: len(last) // 2], last[len(last) // 2 :]]
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


class EvalLoader(_Loader):
    """Batches hold ``image``, ``target``, ``index`` of readable samples; ``unreadable`` lists the indices left out."""


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
        epochs: Epochs to come, if known: ``auto`` caches nothing for fewer than three.
        pin_memory: Copy batches to page-locked memory; None does where there is a CUDA device.
        progress: Called with images decoded and images in all while the cache is filled.
    """
    source = cached(source, cache, epochs=epochs, progress=progress)
    sampler = PositionedSampler(len(source), batch_size, seed=seed, rank=rank, world_size=world_size, views=views)
    workers = default_workers(world_size) if workers is None else workers
    batches = _TrainBatches(source, transform, seed, views is not None)
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
    sampler = EvalBatchSampler(len(source), batch_size, rank=rank, world_size=world_size)
    workers = default_workers(world_size) if workers is None else workers
    return EvalLoader(_EvalBatches(source, transform), sampler, workers, batch_size, pin_memory)
