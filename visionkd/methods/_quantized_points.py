"""The levels that the method ``quantized`` learns, and the gradients that say which tensor gets how many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from visionkd.quantization.differentiable import allocate, quantile_points, uniform_points

BATCHES = 5  # that the gradients are taken from


class Points(nn.ParameterList):
    """Sorted levels of several tensors, in the scale of [0, 1]; a checkpoint may hold other numbers of them."""

    @classmethod
    def of(cls, weights: Sequence[Tensor], **settings: Any) -> Points:
        """Return the levels that :meth:`begin` begins with."""
        made = cls([nn.Parameter(torch.zeros(0, device=weight.device)) for weight in weights])
        made.begin(weights, **settings)
        return made

    def begin(
        self,
        weights: Sequence[Tensor],
        *,
        num_points: int | Sequence[int],
        bucket_size: int | None,
        start: Literal["quantiles", "uniform"],
    ) -> None:
        """Put fresh levels in place of all.

        Args:
            weights: The tensors that they are for.
            num_points: Levels of each tensor, or of every one.
            bucket_size: Values in a bucket; None takes each tensor as one.
            start: At quantiles of the scaled values, or at equal distances.
        """
        numbers = [num_points] * len(weights) if isinstance(num_points, int) else num_points
        for place, (old, weight, number) in enumerate(zip(list(self), weights, numbers, strict=True)):
            if start == "quantiles":
                fresh = quantile_points(weight, number, bucket_size=bucket_size)
            else:
                fresh = uniform_points(weight, number)
            # a new one, as a graph that is still alive remembers the shape of the old one
            self[place] = nn.Parameter(fresh, requires_grad=old.requires_grad)

    @torch.no_grad()
    def sort(self) -> None:
        """Sort each tensor's levels, which a step may have moved past one another."""
        for parameter in self:
            parameter.copy_(parameter.sort().values)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        for name, parameter in self.named_parameters(recurse=False):
            found = state_dict.get(prefix + name)
            if found is not None and found.shape != parameter.shape:
                parameter.data = parameter.new_empty(found.shape)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class Measured:
    """Sums gradients over the first batches, and then spreads levels over tensors by their norms."""

    def __init__(self) -> None:
        self.gradients: list[Tensor] = []
        self.count = 0
        self.spread = False

    @property
    def complete(self) -> bool:
        """Whether all batches have been seen and the levels are still to be spread."""
        return self.count >= BATCHES and not self.spread

    def add(self, gradients: Sequence[Tensor]) -> None:
        """Add the gradients of one batch; those behind the last one are ignored."""
        if self.count >= BATCHES:
            return
        self.count += 1
        before = [gradient.to(new.device) for gradient, new in zip(self.gradients, gradients, strict=False)]
        self.gradients = [old + new for old, new in zip(before, gradients, strict=True)] if before else list(gradients)

    def allocate(self, num_points: int) -> list[int]:
        """Return the levels of each tensor, ``num_points`` on average, and forget the gradients."""
        norms = [float((gradient / self.count).norm()) for gradient in self.gradients]
        self.gradients, self.spread = [], True
        return allocate(norms, num_points)

    def state_dict(self) -> dict[str, Any]:
        return {"gradients": self.gradients, "count": self.count, "spread": self.spread}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.gradients, self.count, self.spread = list(state["gradients"]), state["count"], state["spread"]
