"""Products with quantised weights: the layers that INT8 is about."""

from __future__ import annotations

import timm.layers
from timm.layers import Conv2dSame, pad_same
from torch import Tensor, nn
from torch.nn import functional as F

from visionkd.quantization.fake_quant import WeightQuantizer


class QuantizedConv2d(nn.Conv2d):
    """Convolution whose weight goes through ``weight_quantizer``."""

    weight_quantizer: WeightQuantizer

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight_quantizer(self.weight), self.bias)


class QuantizedConv2dSame(Conv2dSame):
    """The same with TensorFlow's padding, which depends on the size of the input."""

    weight_quantizer: WeightQuantizer

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight_quantizer(self.weight)
        x = pad_same(x, list(weight.shape[-2:]), list(self.stride), list(self.dilation))
        return F.conv2d(x, weight, self.bias, self.stride, (0, 0), self.dilation, self.groups)


class QuantizedConvTranspose2d(nn.ConvTranspose2d):
    """Transposed convolution whose weight goes through ``weight_quantizer``."""

    weight_quantizer: WeightQuantizer

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        padding = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, 2, self.dilation
        )
        weight = self.weight_quantizer(self.weight)
        return F.conv_transpose2d(
            input, weight, self.bias, self.stride, self.padding, padding, self.groups, self.dilation
        )


class QuantizedLinear(nn.Linear):
    """Linear layer whose weight goes through ``weight_quantizer``."""

    weight_quantizer: WeightQuantizer

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight_quantizer(self.weight), self.bias)


#: Quantised class and output axis of the weight, by the exact class of the float layer: a subclass may do more.
_CLASSES: dict[type[nn.Module], tuple[type[nn.Module], int]] = {
    nn.Conv2d: (QuantizedConv2d, 0),
    Conv2dSame: (QuantizedConv2dSame, 0),
    nn.ConvTranspose2d: (QuantizedConvTranspose2d, 1),
    nn.Linear: (QuantizedLinear, 0),
    timm.layers.Linear: (QuantizedLinear, 0),
}
QUANTIZED = tuple(dict.fromkeys(quantized for quantized, _ in _CLASSES.values()))
_FLOAT = {quantized: plain for plain, (quantized, _) in reversed(_CLASSES.items())}


def quantizable(module: nn.Module) -> bool:
    """Whether ``module`` is a product that has a quantised twin. Grouped transposed convolutions have none."""
    if type(module) is nn.ConvTranspose2d and module.groups > 1:
        return False  # the channels of a group share the axis, so no single axis counts all outputs
    return type(module) in _CLASSES


def quantized_twin(module: nn.Module) -> nn.Module:
    """Return a quantised layer that shares the parameters of ``module``."""
    kind, axis = _CLASSES[type(module)]
    twin = _as(module, kind)
    weight = module.weight
    twin.weight_quantizer = WeightQuantizer(weight.shape[axis], axis).to(weight.device)
    twin.weight_quantizer.update(weight)
    return twin.train(module.training)


def float_twin(module: nn.Module) -> nn.Module:
    """Return a plain layer that shares the parameters of a quantised one."""
    twin = _as(module, _FLOAT[type(module)])
    del twin._modules["weight_quantizer"]
    return twin


def _as(module: nn.Module, kind: type[nn.Module]) -> nn.Module:
    twin = kind.__new__(kind)
    twin.__dict__.update(module.__dict__)
    for name in ("_parameters", "_buffers", "_modules"):
        twin.__dict__[name] = dict(getattr(module, name))
    return twin
