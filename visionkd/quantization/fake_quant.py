"""Fake quantisation: symmetric INT8, zero point 0, one scale a tensor or one an output channel.

    x^ = s * clamp(round(x / s), -128, 127),    s = amax / 127

Ties go to the even number and ``x`` is divided by ``s``, as ONNX and TensorRT do it. The gradient passes where
``|x| <= amax`` and stops elsewhere. While a graph is exported the same arithmetic goes through torch's own operator,
which becomes QuantizeLinear and DequantizeLinear; elsewhere plain operators take its place, as they are several times
faster on a CPU.

Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", 2018,
arXiv 1712.05877. Learned scales: Esser et al., "Learned Step Size Quantization", 2020, arXiv 1902.08153.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

QMIN, QMAX = -128, 127
Mode = Literal["off", "observe", "quantize"]


def symmetric_scale(amax: Tensor) -> Tensor:
    """Return the scale for a largest magnitude; 1 where that is 0, so that an all-zero channel stays zero."""
    scale = amax / QMAX
    return torch.where(scale > 0, scale, torch.ones_like(scale))  # also 1 where amax is so small that it underflows


def weight_amax(weight: Tensor, axis: int = 0) -> Tensor:
    """Return the largest magnitude of each output channel, O."""
    return weight.detach().abs().amax([dim for dim in range(weight.ndim) if dim != axis])


def fake_quantize(x: Tensor, scale: Tensor, *, axis: int | None = None, qmin: int = QMIN, qmax: int = QMAX) -> Tensor:
    """Round ``x`` to the grid of ``scale``.

    Args:
        x: Any shape.
        scale: Scalar, or one value for each index of ``axis``. It gets no gradient.
        axis: Dimension that ``scale`` runs along.
        qmin: Least integer: -128, or -127 for the narrow range.
        qmax: Largest integer.

    Returns:
        Same shape and type as ``x``; its gradient reaches ``x`` where ``|x| <= qmax * scale``.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return _FakeQuantize.apply(x, along(scale, x, axis), qmin, qmax)
    return _rounded(x, along(scale, x, axis), qmin, qmax)


def quantize(x: Tensor, scale: Tensor, *, axis: int | None = None, qmin: int = QMIN, qmax: int = QMAX) -> Tensor:
    """Return the integers, int8, that ``fake_quantize`` rounds ``x`` to."""
    return torch.div(x, along(scale, x, axis)).round_().clamp_(qmin, qmax).to(torch.int8)


def learned_fake_quantize(
    x: Tensor, scale: Tensor, *, axis: int | None = None, qmin: int = QMIN, qmax: int = QMAX
) -> Tensor:
    """``fake_quantize`` with the gradient of LSQ to the scale, weighted by ``1 / sqrt(elements of a scale * qmax)``.

    Inside of the range the scale's gradient is ``round(x/s) - x/s``, outside it is the bound.
    """
    weight = 1.0 / math.sqrt(x.numel() / scale.numel() * qmax)
    slow = scale * weight + (scale * (1.0 - weight)).detach()
    ratio = (x / along(slow, x, axis)).clamp(qmin, qmax)
    return (ratio + (ratio.round() - ratio).detach()) * along(slow, x, axis)


def along(scale: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """Return ``scale`` in a shape that broadcasts along ``axis`` of ``x``."""
    return scale if axis is None else scale.reshape([-1 if dim == axis % x.ndim else 1 for dim in range(x.ndim)])


def _rounded(x: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
    return torch.div(x.float(), scale).round_().clamp_(qmin, qmax).mul_(scale).to(x.dtype)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
        # the product may fall a rounding error below the magnitude that made the scale, which is inside; a fresh tensor
        # besides, as the scale itself may be set anew before the gradient comes
        ctx.save_for_backward(x, scale * (qmax * (1.0 + 2.0**-22)))
        return _rounded(x, scale, qmin, qmax)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, amax = ctx.saved_tensors
        if amax.numel() == 1 and x.device.type == "cpu":  # one pass over memory in place of three
            bound = float(amax)
            return torch.ops.aten.hardtanh_backward(gradient, x, -bound, bound), None, None, None
        return gradient * (x.abs() <= amax), None, None, None


def exporting() -> bool:
    """Whether a graph is being exported right now."""
    return torch.onnx.is_in_onnx_export() or torch.compiler.is_exporting()


class WeightQuantizer(nn.Module):
    """Rounds a weight with one scale for each output channel.

    While ``frozen`` is False, each pass takes the scale from the weight itself; afterwards the scale stays, and
    weights beyond its range are clipped. Integers lie in -127..127.

    Args:
        channels: Output channels O.
        axis: Their dimension: 0, or 1 in a transposed convolution.

    Attributes:
        scale: O, float32.
        frozen: Whether the scale stays.
        enabled: False passes weights through.
    """

    scale: Tensor
    _zero_point: Tensor

    def __init__(self, channels: int, axis: int = 0) -> None:
        super().__init__()
        self.axis, self.frozen, self.enabled = axis, False, True
        self.register_buffer("scale", torch.ones(channels))
        self.register_buffer("_zero_point", torch.zeros(channels, dtype=torch.int32), persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        if not self.enabled:
            return weight
        if exporting():
            return torch.fake_quantize_per_channel_affine(weight, self.scale, self._zero_point, self.axis, QMIN, QMAX)
        if not self.frozen:
            self.update(weight)
        return fake_quantize(weight, self.scale, axis=self.axis, qmin=-QMAX)

    @torch.no_grad()
    def update(self, weight: Tensor) -> None:
        """Take the scale from ``weight``."""
        self.scale.copy_(symmetric_scale(weight_amax(weight, self.axis).float()))

    def extra_repr(self) -> str:
        return f"{self.scale.numel()} channels, axis={self.axis}, frozen={self.frozen}"


class ActivationQuantizer(nn.Module):
    """Rounds an activation with one scale for the whole tensor.

    Args:
        learned: Let the scale learn (LSQ); it is a parameter then, not a buffer.

    Attributes:
        scale: Scalar, float32. NaN until it is calibrated.
        mode: ``off`` and ``observe`` pass values through; ``observe`` shows them to ``observer`` first.
        observer: Is told each tensor in ``observe``.
    """

    scale: Tensor
    _zero_point: Tensor

    def __init__(self, *, learned: bool = False) -> None:
        super().__init__()
        self.learned = learned
        self.mode: Mode = "off"
        self.observer: Callable[[Tensor], object] | None = None
        scale = torch.tensor(float("nan"))
        if learned:
            self.scale = nn.Parameter(scale)
        else:
            self.register_buffer("scale", scale)
        self.register_buffer("_zero_point", torch.zeros((), dtype=torch.int32), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.mode == "quantize":
            if exporting():
                return torch.fake_quantize_per_tensor_affine(x, self.scale, self._zero_point, QMIN, QMAX)
            if self.learned and self.training and torch.is_grad_enabled():
                return learned_fake_quantize(x, self.scale)
            return fake_quantize(x, self.scale)
        if self.mode == "observe" and self.observer is not None:
            self.observer(x.detach())
        return x

    @torch.no_grad()
    def set_amax(self, amax: float) -> None:
        """Set the scale for values up to ``amax`` in magnitude."""
        self.scale.copy_(torch.as_tensor(amax, dtype=torch.float64) / QMAX)

    def extra_repr(self) -> str:
        return f"mode={self.mode}" + (", learned" if self.learned else "")
