"""The teachers of a training, as they run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from visionkd.models.features import extract
from visionkd.models.features import stages as stages_of
from visionkd.models.network import Network
from visionkd.types import Output

_AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "16": torch.float16}


class FrozenTeachers:
    """Frozen networks, each in its own precision. No module: what trains beside them neither owns nor saves them.

    Args:
        networks: In eval mode; they are frozen here.
        precisions: ``32``, ``bf16`` or ``16`` of each.
        memory_format: Of their weights.
        compiled: Run them compiled.
        stages: Stages whose maps their outputs carry.
    """

    def __init__(
        self,
        networks: Sequence[Network],
        *,
        precisions: Sequence[str],
        memory_format: torch.memory_format,
        compiled: bool,
        stages: Sequence[int] = (),
    ) -> None:
        self.networks = tuple(each.requires_grad_(False).to(memory_format=memory_format) for each in networks)
        self.precisions = tuple(precisions)
        for network in self.networks if stages else ():
            stages_of(network)  # looks at the network now, rather than in the first step
        forwards = [partial(extract, each, indices=stages) if stages else each for each in self.networks]
        self.forwards = [torch.compile(each) if compiled else each for each in forwards]
        self._device: torch.device | None = None

    def run(
        self, image: Tensor, precisions: Sequence[str] | None = None, *, extra: Sequence[Tensor] = ()
    ) -> tuple[Output, ...]:
        """Run all of them on images in [0, 1], B x 3 x H x W.

        Args:
            image: Their gradient passes through, unless the caller forbids it.
            precisions: In place of their own.
            extra: What they take beside the images.
        """
        self._place(image.device)
        outputs = []
        for forward, precision in zip(self.forwards, precisions or self.precisions, strict=True):
            with _autocast(precision, image.device):
                outputs.append(forward(image, *extra))
        return tuple(outputs)

    @contextmanager
    def answering(self, number: int, device: torch.device) -> Iterator[Network]:
        """Lend one of them to be asked for parts of its answer: on a device, in its own precision, without gradient."""
        self._place(device)
        with torch.no_grad(), _autocast(self.precisions[number], device):
            yield self.networks[number]

    def _place(self, device: torch.device) -> None:
        # only once they are needed: with a complete label store their memory is never taken
        if self._device != device:
            for network in self.networks:
                network.to(device)
            self._device = device


def _autocast(precision: str, device: torch.device) -> torch.autocast:
    dtype = _AUTOCAST_DTYPES.get(precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
