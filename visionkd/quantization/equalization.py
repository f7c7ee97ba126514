"""Cross-layer equalisation: channels of one tensor are brought to ranges that one scale serves well.

Where a convolution, its batch norm and ReLU feed a single other layer, ``f(x / s) = f(x) / s`` for each channel: what
the first divides, the second multiplies back. Weights have a scale for each output channel here, so the first layer
gains and loses nothing; what gains is the activation between them, which has one scale, against the weights of the
second. A depthwise convolution has a scale for each of its channels and takes any factor, so all channels in front of
it get the range of the widest; in front of others ``s = sqrt(r_x / r_w)`` shares the load.

ReLU6 is no such ``f``: raised too far, a channel is clipped. One is raised to half of the ceiling at most, and doubled
at most, by what it reached on the images, or six standard deviations by its batch norm where that is more. Even so, a
channel that waits for one kind of image may be clipped on that: on the images given, the network stays what it was.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019, arXiv 1906.04721,
section 4.1 (there with weights in place of activations, for one scale a weight tensor).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from visionkd.models.modes import evaluating
from visionkd.models.network import Network
from visionkd.quantization.fake_quant import ActivationQuantizer
from visionkd.quantization.insert import activation_quantizers, set_mode

_CEILING = 6.0
_MARGIN = 0.5  # of the ceiling: the next image goes further
_LEAST_BELOW_CEILING = 0.5
_DEVIATIONS = 6.0
_LEAST = 1 / 64  # a channel that hardly fires is not blown up without end


@dataclass(frozen=True)
class Chain:
    """Two layers that one tensor joins and nothing else uses.

    Attributes:
        first: Name of the layer in front.
        second: Name of the layer behind.
        quantizer: Name of the quantiser between them.
        norm: Name of the batch norm behind ``first``, if any.
        ceiling: Whether the activation is ReLU6.
    """

    first: str
    second: str
    quantizer: str
    norm: str | None
    ceiling: bool


def find_chains(network: Network) -> list[Chain]:
    """Return the chains of a quantised network, in the order of its graph."""
    modules = dict(network.net.named_modules())
    calls: dict[str, int] = {}
    for node in network.net.graph.nodes:
        if node.op == "call_module":
            calls[str(node.target)] = calls.get(str(node.target), 0) + 1
    found = []
    for node in network.net.graph.nodes:
        if node.op == "call_module" and isinstance(modules[str(node.target)], ActivationQuantizer):
            chain = _chain(node, modules, calls)
            if chain is not None:
                found.append(chain)
    return found


@torch.no_grad()
def equalize(network: Network, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """Equalise the chains of a quantised network, in place; in float it computes what it did before.

    Do it before the calibration.

    Args:
        network: Quantised, calibrated or not.
        batches: Images in [0, 1], B x 3 x H x W each.

    Returns:
        The factors ``s``, one for each channel, by the name of the second layer.
    """
    chains = find_chains(network)
    if not chains:
        return {}
    ranges = _channel_ranges(network, {chain.quantizer for chain in chains}, batches)
    factors = {}
    for chain in chains:
        second = network.net.get_submodule(chain.second)
        target = network.net.get_submodule(chain.norm or chain.first)
        reached = ranges[chain.quantizer]
        if chain.ceiling and chain.norm is not None:
            reached = torch.maximum(reached, target.bias + _DEVIATIONS * target.weight.abs())
        factor = _factor(reached, second, ceiling=chain.ceiling)
        target.weight /= factor.reshape([-1, *(1,) * (target.weight.ndim - 1)])
        if target.bias is not None:
            target.bias /= factor
        second.weight.copy_(_times_input(second, factor))
        for name in (chain.first, chain.second):
            layer = network.net.get_submodule(name)
            if hasattr(layer, "weight_quantizer"):
                layer.weight_quantizer.update(layer.weight)
        factors[chain.second] = factor
    return factors


def _chain(node: fx.Node, modules: dict[str, nn.Module], calls: dict[str, int]) -> Chain | None:
    if len(node.users) != 1 or calls[str(node.target)] > 1:
        return None
    (user,) = node.users
    second = modules[str(user.target)] if user.op == "call_module" else None
    if type(second) is nn.ConvTranspose2d or not isinstance(second, (nn.Conv2d, nn.Linear)):
        return None
    if calls[str(user.target)] > 1:
        return None
    ceiling, norm, before = False, None, node.args[0]
    while True:
        module = modules[str(before.target)] if before.op == "call_module" else None
        if module is None or len(before.users) != 1 or calls[str(before.target)] > 1:
            return None
        if isinstance(module, nn.Conv2d) and before.args[0].op != "get_attr":
            quantizer = str(node.target).rpartition(".")[2]
            return Chain(str(before.target), str(user.target), quantizer, norm, ceiling)
        kind = _homogeneous(module)
        if kind is None or norm is not None:
            return None
        ceiling |= kind == "ceiling"
        if isinstance(module, nn.BatchNorm2d):
            if module.weight is None:
                return None
            norm = str(before.target)
        before = before.args[0]


def _homogeneous(module: nn.Module) -> str | None:
    """Return whether a layer lets factors through: ``yes``, up to a ``ceiling``, or not at all (None)."""
    if isinstance(module, nn.ReLU6):
        return "ceiling"
    if isinstance(module, (nn.ReLU, nn.LeakyReLU, nn.Identity, nn.Dropout)):
        return "yes"
    if isinstance(module, nn.BatchNorm2d):
        return _homogeneous(module.act) if isinstance(getattr(module, "act", None), nn.Module) else "yes"
    return None


def _channel_ranges(network: Network, names: set[str], batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """Return the largest magnitude of each channel in float, by quantiser."""
    ranges: dict[str, Tensor] = {}

    def observer(name: str) -> Any:
        def see(x: Tensor) -> None:
            amax = x.abs().amax([dim for dim in range(x.ndim) if dim != 1])
            ranges[name] = torch.maximum(ranges[name], amax) if name in ranges else amax

        return see

    quantizers = activation_quantizers(network)
    modes = {name: quantizer.mode for name, quantizer in quantizers.items()}
    for name in names:
        quantizers[name].observer = observer(name)
    try:
        set_mode(network, "observe")
        device = next(network.net.parameters()).device
        with evaluating(network):
            for batch in batches:
                network(batch.to(device))
    finally:
        set_mode(network, "quantize")
        for name, quantizer in quantizers.items():
            quantizer.observer, quantizer.mode = None, modes[name]
    return ranges


def _factor(amax: Tensor, second: nn.Module, *, ceiling: bool) -> Tensor:
    widest = amax.max()
    weights = _input_ranges(second)
    alive = (amax > 0) & (weights > 0)
    wanted = amax if _depthwise(second) else (amax / weights.clamp(min=1e-12)).sqrt()
    # so that the widest channel afterwards is as wide as the widest was before
    ratio = torch.where(alive, amax / wanted.clamp(min=1e-12), torch.zeros_like(amax)).max()
    factor = wanted * (ratio / widest.clamp(min=1e-12))
    factor = torch.where(alive, factor.clamp(min=_LEAST), torch.ones_like(factor))
    if ceiling:
        factor = torch.maximum(factor, amax / (_CEILING * _MARGIN)).clamp(min=_LEAST_BELOW_CEILING, max=1.0)
        factor = torch.where(amax >= _CEILING * _MARGIN, torch.ones_like(factor), factor)
    return factor


def _depthwise(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels == layer.out_channels


def _grouped(layer: nn.Module) -> Tensor:
    """Return the weight as groups x outputs of a group x inputs of a group x rest."""
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    weight = layer.weight
    return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)


def _input_ranges(layer: nn.Module) -> Tensor:
    return _grouped(layer).abs().amax((1, 3)).flatten()


def _times_input(layer: nn.Module, factor: Tensor) -> Tensor:
    grouped = _grouped(layer)
    return (grouped * factor.reshape(grouped.shape[0], 1, grouped.shape[2], 1)).reshape(layer.weight.shape)
