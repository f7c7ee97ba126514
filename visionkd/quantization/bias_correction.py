"""Take back the shift that rounding gives to the mean of each channel.

Rounded weights and clipped activations move the mean output of a layer. The difference between the layer in float and
in INT8, on the inputs that it has in the quantised network, goes into its bias, or into the mean that the batch norm
behind it subtracts.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019, arXiv 1906.04721,
section 4.2 (here with images).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from visionkd.models.modes import evaluating
from visionkd.models.network import Network
from visionkd.quantization.insert import activation_quantizers, int8_layers


@torch.no_grad()
def correct_bias(network: Network, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """Correct the biases of a calibrated network, in place.

    Layers with neither a bias nor a batch norm behind them are left alone.

    Args:
        network: Quantised, with all scales set.
        batches: Images in [0, 1], B x 3 x H x W each.

    Returns:
        What was added to each channel of a layer's output, O, by layer.
    """
    norms = _norms_behind(network)
    layers = {name: layer for name, layer in int8_layers(network).items() if layer.bias is not None or name in norms}
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    before: dict[int, tuple[Tensor, Tensor]] = {}  # by the rounded tensor, which is kept so that its id stays its own

    def remember(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        before[id(output)] = (inputs[0], output)

    def compare(name: str) -> Any:
        def measure(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            exact, _ = before.get(id(inputs[0]), (inputs[0], None))
            layer.weight_quantizer.enabled = False
            try:
                difference = type(layer).forward(layer, exact) - output
            finally:
                layer.weight_quantizer.enabled = True
            rest = [dim for dim in range(difference.ndim) if dim != _channel(layer, difference)]
            sums[name] = sums.get(name, 0.0) + difference.double().sum(rest)
            counts[name] = counts.get(name, 0) + difference.numel() // difference.shape[_channel(layer, difference)]

        return measure

    handles = [quantizer.register_forward_hook(remember) for quantizer in activation_quantizers(network).values()]
    handles += [layer.register_forward_hook(compare(name)) for name, layer in layers.items()]
    device = next(network.net.parameters()).device
    try:
        with evaluating(network):
            for batch in batches:
                network(batch.to(device))
                before.clear()
    finally:
        for handle in handles:
            handle.remove()
    shifts = {name: (total / counts[name]).float() for name, total in sums.items()}
    for name, shift in shifts.items():
        if layers[name].bias is not None:
            layers[name].bias += shift
        else:
            norms[name].running_mean -= shift
    return shifts


def _channel(layer: nn.Module, output: Tensor) -> int:
    return output.ndim - 1 if isinstance(layer, nn.Linear) else 1


def _norms_behind(network: Network) -> dict[str, nn.BatchNorm2d]:
    """Return the batch norm that alone takes the output of a layer, by layer."""
    modules = dict(network.net.named_modules())
    found = {}
    for node in network.net.graph.nodes:
        if node.op == "call_module" and len(node.users) == 1:
            (user,) = node.users
            norm = modules[str(user.target)] if user.op == "call_module" else None
            if isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None:
                found[str(node.target)] = norm
    return found
