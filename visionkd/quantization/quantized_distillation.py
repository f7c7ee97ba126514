"""Uniform quantisation of weights in buckets, with the gradients that quantised distillation trains through.

A tensor is flattened and cut into buckets of k consecutive values. In each, ``beta`` is the smallest value and
``alpha`` the range, so that ``(v - beta) / alpha`` lies in [0, 1]; s levels there give

    Q(v) = alpha * round((s - 1) * (v - beta) / alpha) / (s - 1) + beta

Both ends of a bucket are levels. Everything is in float32, whatever the autocast of the caller.

Polino, Pascanu and Alistarh, "Model compression via distillation and quantization", ICLR 2018, arXiv 1802.05668.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

#: How the gradient gets past the rounding; see :func:`fake_quantize_uniform`.
Backward = Literal["straight_through", "truncated", "complicated"]
_SMALLEST_RANGE = 1e-10  # below it a bucket counts as constant


@dataclass(frozen=True)
class Buckets:
    """A tensor, scaled to [0, 1] bucket by bucket.

    Attributes:
        values: B x k; the last bucket is filled up with the tensor's last value.
        alpha: Range of each bucket, B x 1, and 1 where that is nothing.
        beta: Smallest value of each bucket, B x 1.
        shape: Of the tensor.
    """

    values: Tensor
    alpha: Tensor
    beta: Tensor
    shape: torch.Size

    @property
    def count(self) -> int:
        """Number of values of the tensor, without what fills the last bucket up."""
        return self.shape.numel()

    def plain(self, bucketed: Tensor) -> Tensor:
        """Bring B x k values back into the order and shape of the tensor."""
        return bucketed.reshape(-1)[: self.count].reshape(self.shape)

    def bucketed(self, plain: Tensor, *, fill: float | None = None) -> Tensor:
        """Bring values in the tensor's shape to B x k; ``fill`` takes the place of the last value at the end."""
        return _filled(plain.reshape(-1), *self.values.shape, fill=fill)

    def unscaled(self, scaled: Tensor) -> Tensor:
        """Bring B x k values in [0, 1] back to the range of their buckets, and to the shape of the tensor."""
        return self.plain(scaled * self.alpha + self.beta)


def scale(x: Tensor, bucket_size: int | None = None) -> Buckets:
    """Scale a tensor to [0, 1] in buckets of ``bucket_size`` values; None, or a larger one, takes it as one bucket."""
    flat = x.detach().reshape(-1)
    width = bucket_width(flat.numel(), bucket_size)
    values = _filled(flat, -(-flat.numel() // width), width)
    beta, top = values.aminmax(dim=1, keepdim=True)
    alpha = top - beta
    alpha = torch.where(alpha < _SMALLEST_RANGE, torch.ones_like(alpha), alpha)
    return Buckets((values - beta) / alpha, alpha, beta, x.shape)


def bucket_width(count: int, bucket_size: int | None) -> int:
    """Return how many values a bucket of a tensor of ``count`` values holds."""
    return max(1, min(bucket_size or count, count))


def _filled(flat: Tensor, rows: int, width: int, *, fill: float | None = None) -> Tensor:
    missing = rows * width - flat.numel()
    if missing:
        last = flat[-1:] if fill is None else flat.new_full((1,), fill)
        flat = torch.cat([flat, last.expand(missing)])
    return flat.view(rows, width)


def uniform_levels(buckets: Buckets, num_levels: int, noise: Tensor | None = None) -> Tensor:
    """Return the number of each value's level, B x k in 0..s-1, as floats.

    Args:
        buckets: Scaled tensor.
        num_levels: s.
        noise: B x k, uniform in [0, 1]: rounds up with a probability equal to the distance, so that the mean is the
            value. None takes the nearest level.
    """
    steps = buckets.values * (num_levels - 1)
    if noise is None:
        return steps.round()
    below = steps.floor()
    return below + (noise <= steps - below)


def from_levels(levels: Tensor, num_levels: int, buckets: Buckets) -> Tensor:
    """Return the tensor that B x k level numbers stand for."""
    return buckets.unscaled(levels / (num_levels - 1))


def quantize_uniform(
    x: Tensor,
    *,
    num_levels: int,
    bucket_size: int | None = None,
    noise: Tensor | None = None,
    subtract_mean: bool = False,
    max_element: float | None = None,
) -> Tensor:
    """Return Q(x), without gradient.

    Args:
        x: Any shape.
        num_levels: s; 2 ** bits.
        bucket_size: k; None takes the whole tensor.
        noise: For stochastic rounding, in the shape of the buckets.
        subtract_mean: Take the tensor's mean off first and put it back at the end.
        max_element: Clip to +- this value, after the mean is off; that is not undone.
    """
    x = x.detach()
    mean = x.mean() if subtract_mean else None
    if mean is not None:
        x = x - mean
    if max_element is not None:
        x = x.clamp(-max_element, max_element)
    buckets = scale(x, bucket_size)
    quantized = from_levels(uniform_levels(buckets, num_levels, noise), num_levels, buckets)
    return quantized if mean is None else quantized + mean


def fake_quantize_uniform(
    x: Tensor,
    *,
    num_levels: int,
    bucket_size: int | None = None,
    stochastic: bool = False,
    backward: Backward = "straight_through",
) -> Tensor:
    """Return Q(x) with a gradient to x.

    Args:
        x: Any shape.
        num_levels: s.
        bucket_size: k; None takes the whole tensor.
        stochastic: Draw the rounding from the default generator.
        backward: ``straight_through`` passes the gradient g on as it is. ``truncated`` sets it to 0 where ``|x| > 1``.
            ``complicated`` knows that a bucket's range hangs on its largest and smallest value: it adds
            ``c = sum_j g_j (qhat_j - xhat_j)`` to the gradient of the former and takes it off that of the latter.
    """
    return _Uniform.apply(x, num_levels, bucket_size, stochastic, backward)


class _Uniform(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, num_levels: int, bucket_size: int | None, stochastic: bool, backward: Backward
    ) -> Tensor:
        buckets = scale(x, bucket_size)
        noise = torch.rand_like(buckets.values) if stochastic else None
        levels = uniform_levels(buckets, num_levels, noise)
        ctx.backward, ctx.buckets = backward, None
        if backward == "truncated":
            ctx.save_for_backward(x)
        elif backward == "complicated":
            ctx.buckets, ctx.rounding = buckets, levels / (num_levels - 1) - buckets.values
        return from_levels(levels, num_levels, buckets)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.backward == "truncated":
            grad = grad * (ctx.saved_tensors[0].abs() <= 1)
        elif ctx.backward == "complicated":
            grad = _through_range(grad, ctx.buckets, ctx.rounding)
        return grad, None, None, None, None


def _through_range(grad: Tensor, buckets: Buckets, rounding: Tensor) -> Tensor:
    bucketed = buckets.bucketed(grad, fill=0.0).clone()
    share = (bucketed * rounding).sum(1, keepdim=True)
    # the first of equal values, so never one that only fills the bucket up
    bucketed.scatter_add_(1, buckets.values.argmax(1, keepdim=True), share)
    bucketed.scatter_add_(1, buckets.values.argmin(1, keepdim=True), -share)
    return buckets.plain(bucketed)
