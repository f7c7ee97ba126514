"""Means of training metrics, summed on the device and read once in a while."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


class RunningMeans:
    """Sums named scalars where they are, so that logging does not make the device wait."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            value = value.detach()
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
            self._counts[name] = self._counts.get(name, 0) + 1

    def take(self, gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return the means over all ranks since the last call and start again; this waits for the device.

        Args:
            gather: Collects a tensor from all ranks, as :meth:`lightning.LightningModule.all_gather` does.
        """
        if not self._sums:
            return {}
        means = torch.stack([value.float() / self._counts[name] for name, value in self._sums.items()])
        means = gather(means).view(-1, len(means)).mean(0)  # of all ranks, so that all of them see a NaN
        found = {f"train/{name}": value for name, value in zip(self._sums, means.tolist(), strict=True)}
        self._sums.clear()
        self._counts.clear()
        return found
