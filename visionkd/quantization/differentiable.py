"""Differentiable quantisation: where a tensor's levels lie is learned.

A tensor is scaled to [0, 1] in buckets as in :mod:`.quantized_distillation`. Each value takes the nearest of m sorted
points there, the upper one of two that are equally near; points may lie outside of [0, 1]. With ``alpha`` the range of
a value's bucket and g the gradient of what was quantised,

    dL/dp_j = sum over the values i at point j of alpha_i * g_i

Polino, Pascanu and Alistarh, "Model compression via distillation and quantization", ICLR 2018, arXiv 1802.05668.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from visionkd.quantization.quantized_distillation import scale


def nearest(values: Tensor, points: Tensor) -> Tensor:
    """Return the index of the point nearest to each value, in the shape of ``values``.

    Args:
        values: Any shape.
        points: M, sorted.
    """
    middles = (points[1:] + points[:-1]) / 2
    return torch.bucketize(values, middles, right=True)


def quantize_to_points(x: Tensor, points: Tensor, *, bucket_size: int | None = None) -> Tensor:
    """Return x with each value moved to its nearest point, with a gradient to both (straight through to x).

    Args:
        x: Any shape.
        points: M, sorted, in the scale of [0, 1].
        bucket_size: k; None takes the whole tensor as one bucket.
    """
    return _ToPoints.apply(x, points, bucket_size)


class _ToPoints(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, points: Tensor, bucket_size: int | None) -> Tensor:
        buckets = scale(x, bucket_size)
        indices = nearest(buckets.values, points)
        ctx.save_for_backward(indices)
        ctx.buckets, ctx.num_points = buckets, len(points)
        return buckets.unscaled(points[indices])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (indices,) = ctx.saved_tensors
        weighted = ctx.buckets.bucketed(grad, fill=0.0) * ctx.buckets.alpha
        of_points = weighted.new_zeros(ctx.num_points)
        return grad, of_points.index_add_(0, indices.flatten(), weighted.flatten()), None


def quantile_points(x: Tensor, num_points: int, *, bucket_size: int | None = None) -> Tensor:
    """Return the points to begin with: quantiles of the scaled values, at m equal steps from the least to the largest.

    Args:
        x: Any shape.
        num_points: m.
        bucket_size: k; None takes the whole tensor as one bucket.
    """
    buckets = scale(x, bucket_size)
    values = buckets.plain(buckets.values).float().flatten().cpu().numpy()
    return torch.from_numpy(np.percentile(values, np.linspace(0, 100, num_points))).to(x)


def uniform_points(x: Tensor, num_points: int) -> Tensor:
    """Return m points at equal distances in [0, 1], on the device of x."""
    return torch.linspace(0.0, 1.0, num_points).to(x)


def allocate(
    gradient_norms: Sequence[float], initial: int | Sequence[int], *, of: Literal["points", "bits"] = "points"
) -> list[int]:
    """Spread a number of points (or bits) over tensors by the norms of their gradients.

    Every tensor keeps half of its points, rounded down (or all bits but one); what is left goes by the norms. What
    rounding leaves over is taken from the tensor with the most, what it lacks is given to the one with the fewest.

    Args:
        gradient_norms: One for each tensor, not negative.
        initial: What each tensor has, or all of them.
        of: What is spread.

    Returns:
        One number for each tensor, with the sum of the initial ones.
    """
    norms = [float(norm) for norm in gradient_norms]
    given = [initial] * len(norms) if isinstance(initial, int) else list(initial)
    if len(given) != len(norms):
        raise ValueError(f"{len(given)} initial numbers for {len(norms)} tensors")
    if not sum(norms) > 0:
        return given  # no tensor matters more than another
    kept = [number // 2 if of == "points" else number - 1 for number in given]
    rest = sum(given) - sum(kept)
    spread = [base + round(norm / sum(norms) * rest) for base, norm in zip(kept, norms, strict=True)]
    over = sum(spread) - sum(given)
    place = spread.index(max(spread) if over > 0 else min(spread))
    spread[place] -= over
    return spread
