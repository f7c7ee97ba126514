"""A quantised network in the form that becomes a Q/DQ graph: weights as integers, scales as constants."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from visionkd.errors import WorkError
from visionkd.models.network import Network
from visionkd.quantization.fake_quant import QMAX, ActivationQuantizer, WeightQuantizer, quantize
from visionkd.quantization.fold import fold_quantized
from visionkd.quantization.insert import int8_layers


def is_int8(network: Network) -> bool:
    """Whether ``network`` is quantised to INT8."""
    return network.quantization is not None and network.quantization.get("kind") == "int8"


def signed_form(network: Network) -> Network:
    """Return a copy of an INT8 network for the exporter, and for nothing else: it computes no values.

    Batch norms are folded, which changes no integer; weights are int8 behind a DequantizeLinear, so that the file is
    a quarter as large; activations pass a QuantizeLinear and a DequantizeLinear with int8 zeros.

    Args:
        network: Quantised and calibrated.

    Raises:
        WorkError: If a scale was never calibrated, or is zero or infinite.
    """
    form = fold_quantized(network).cpu().float().to(memory_format=torch.contiguous_format).eval().requires_grad_(False)
    for name, layer in int8_layers(form).items():
        quantizer: WeightQuantizer = layer.weight_quantizer
        _check(quantizer.scale, f"{name}.weight")
        integers = quantize(layer.weight.detach(), quantizer.scale, axis=quantizer.axis, qmin=-QMAX)
        layer.weight_quantizer = _Dequantize(integers, quantizer.scale, quantizer.axis)
    for name, module in list(form.named_modules()):
        if isinstance(module, ActivationQuantizer):
            _check(module.scale, name.rpartition(".")[2])
            form.set_submodule(name, _QuantizeDequantize(module.scale))
    return form


def _check(scale: Tensor, name: str) -> None:
    if not bool((scale.isfinite() & (scale > 0)).all()):
        raise WorkError(
            f"the scale of '{name}' is {float(scale.min()):g}, and a positive number is needed",
            hint="Calibrate the model on images: visionkd quantize MODEL --data DATA",
        )


class _QuantizeDequantize(nn.Module):
    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale.detach().clone())
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        # written as ONNX operators: PyTorch's own fake quantisation cannot be traced with a free batch size
        inputs = (self.scale, self.zero_point)
        rounded = torch.onnx.ops.symbolic("QuantizeLinear", (x, *inputs), dtype=torch.int8, shape=x.shape)
        return torch.onnx.ops.symbolic("DequantizeLinear", (rounded, *inputs), dtype=torch.float32, shape=x.shape)


class _Dequantize(nn.Module):
    def __init__(self, integers: Tensor, scale: Tensor, axis: int) -> None:
        super().__init__()
        self.axis = axis
        self.register_buffer("integers", integers)
        self.register_buffer("scale", scale.detach().clone())
        self.register_buffer("zero_point", torch.zeros(len(scale), dtype=torch.int8))

    def forward(self, weight: Tensor) -> Tensor:
        return torch.onnx.ops.symbolic(
            "DequantizeLinear", (self.integers, self.scale, self.zero_point), attrs={"axis": self.axis},
            dtype=torch.float32, shape=weight.shape,
        )  # fmt: skip
