"""Which samples, and which views of them, a batch holds."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from visionkd.errors import DataError


def view_seed(seed: int, view: int, index: int) -> int:
    """Return the seed of one view of one sample, a hash of all three numbers."""
    return int.from_bytes(hashlib.blake2b(struct.pack("<qqq", seed, view, index), digest_size=8).digest(), "little")


class PositionedSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (index, view) pairs, from any position.

    Global batch ``k`` of an epoch is ``order[k * B * W : (k + 1) * B * W]`` for W ranks of batch size B; each rank
    takes its contiguous part. W ranks together therefore see exactly what one process sees with batch size B * W.

    With ``views_per_image`` n above 1, an epoch takes n views of each n-th part of the samples, one after the other, so
    that an image is loaded once for all of them; n epochs go over all samples. An epoch stays as long as it is.

    Args:
        num_samples: Samples in all.
        batch_size: Batch size B of one rank.
        seed: Together with the epoch it decides the order.
        rank: This process.
        world_size: Number of processes, W.
        views: Number of different views of each sample, taken in turn; None draws a new one every time.
        views_per_image: Views taken of a sample at a time, n.
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
        views_per_image: int = 1,
    ) -> None:
        if num_samples < 1:
            raise DataError("the training set is empty")
        if views is not None and views_per_image > views:
            raise ValueError(f"{views_per_image} views at a time of {views}")
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"batch_size {batch_size}, rank {rank} of {world_size}")
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.views = views
        self.views_per_image = min(views_per_image, num_samples)
        self.epoch = 0
        self.start = 0

    @property
    def sampler(self) -> PositionedSampler:
        """Where Lightning looks for ``set_epoch``."""
        return self

    def __len__(self) -> int:
        """Batches of a full epoch, wherever the next iteration starts."""
        count = self.num_samples // self.views_per_image * self.views_per_image
        return max(1, count // (self.batch_size * self.world_size))

    def set_epoch(self, epoch: int) -> None:
        """Go to an epoch; to its beginning, unless it is the current one."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def set_position(self, epoch: int, batch: int) -> None:
        """Start the next iteration at ``batch`` of ``epoch``, both counted from 0."""
        if not 0 <= batch <= len(self):
            raise ValueError(f"batch {batch} of an epoch of {len(self)}")
        self.epoch, self.start = epoch, batch

    def views_of(self, epoch: int) -> tuple[int, ...]:
        """Return the views that an epoch takes of each of its samples."""
        first = epoch // self.views_per_image * self.views_per_image
        views = range(first, first + self.views_per_image)
        return tuple(view % self.views if self.views else view for view in views)

    def has_passed(self, epoch: int) -> bool:
        """Whether earlier epochs went over all samples with each of the views of this one."""
        return self.views is not None and epoch // self.views_per_image * self.views_per_image >= self.views

    def order(self, epoch: int) -> Tensor:
        """Return the samples of an epoch, int64; repeated where they do not fill one batch."""
        each = self.views_per_image
        generator = torch.Generator().manual_seed(view_seed(self.seed, epoch // each, -1) >> 1)
        order = torch.randperm(self.num_samples, generator=generator)
        if each > 1:
            share = self.num_samples // each
            order = order[epoch % each * share : (epoch % each + 1) * share]
        whole = -(-self.batch_size * self.world_size // each)
        return order if len(order) >= whole else order.repeat(-(-whole // len(order)))[:whole]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, start = self.epoch, self.start
        views = self.views_of(epoch)
        order = self.order(epoch).tolist()
        for batch in range(start, len(self)):
            first = (batch * self.world_size + self.rank) * self.batch_size
            places = (divmod(place, len(views)) for place in range(first, first + self.batch_size))
            yield [(order[sample], views[view]) for sample, view in places]


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
