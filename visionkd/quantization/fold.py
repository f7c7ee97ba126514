"""Fold the batch norms of a quantised network into its convolutions, without changing an integer.

With one scale for each output channel, ``W' = W gamma / sigma`` has the scale ``s' = s |gamma| / sigma`` and the
integers ``q' = sign(gamma) q``: quantisation and folding commute. That is why training keeps its batch norms as they
are; nothing has to be folded while statistics still move.
"""

from __future__ import annotations

import copy

import torch
from timm.layers import FrozenBatchNormAct2d
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchvision.ops import FrozenBatchNorm2d

from visionkd.errors import WorkError
from visionkd.models.network import Network
from visionkd.quantization.fake_quant import QMAX, along, quantize
from visionkd.quantization.insert import freeze
from visionkd.quantization.products import QUANTIZED

#: Timm's and torchvision's frozen ones have the same four tensors, as buffers.
_NORMS = (nn.BatchNorm2d, FrozenBatchNorm2d, FrozenBatchNormAct2d)


def fold_weight(
    weight: Tensor, scale: Tensor, bias: Tensor | None, *, gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor,
    eps: float, axis: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Fold a batch norm in eval mode into the quantised convolution before it.

    Args:
        weight: Of the convolution.
        scale: O, of its weight.
        bias: O, if any.
        gamma: O, and so are ``beta``, ``mean`` and ``var``.
        eps: Added to the variance.
        axis: Dimension of the output channels.

    Returns:
        Weight on the grid of the new scale, the new scale, and the bias.
    """
    factor = gamma / torch.sqrt(var + eps)
    integers = quantize(weight, scale, axis=axis, qmin=-QMAX).to(weight.dtype)
    folded = scale * factor.abs()
    folded = torch.where(folded > 0, folded, torch.ones_like(folded))  # a channel that gamma switches off
    weight = along(folded, weight, axis) * along(factor.sign(), weight, axis) * integers
    shift = beta - mean * factor
    return weight, folded, shift if bias is None else shift + bias * factor


@torch.no_grad()
def fold_quantized(network: Network) -> Network:
    """Return a copy of a quantised network, in eval mode, whose convolutions have taken in the batch norms behind them.

    Raises:
        WorkError: If the network is not quantised.
    """
    if network.quantization is None or network.quantization.get("kind") != "int8":
        raise WorkError(f"'{network.architecture}' is not quantised", hint="Run 'visionkd quantize' on it first.")
    folded = copy.deepcopy(network).eval()
    freeze(folded)
    graph_module = folded.net
    modules = dict(graph_module.named_modules())
    calls: dict[str, int] = {}
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            calls[str(node.target)] = calls.get(str(node.target), 0) + 1
    for node in list(graph_module.graph.nodes):
        convolution = _convolution_before(node, modules, calls)
        if convolution is not None:
            _fold(graph_module, node, convolution, modules[str(node.target)])
    graph_module.graph.lint()
    graph_module.recompile()
    folded.quantization = {**network.quantization, "folded": True}
    return folded


def _convolution_before(
    node: fx.Node, modules: dict[str, nn.Module], calls: dict[str, int]
) -> nn.Conv2d | nn.ConvTranspose2d | None:
    """Return the convolution that feeds nothing but the batch norm ``node``."""
    if node.op != "call_module" or not isinstance(modules[str(node.target)], _NORMS):
        return None
    before = node.args[0]
    if before.op != "call_module" or len(before.users) > 1 or calls[str(before.target)] > 1:
        return None
    fine = modules[str(node.target)].running_mean is not None and calls[str(node.target)] == 1
    module = modules[str(before.target)]
    return module if fine and isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) else None


def _fold(graph_module: fx.GraphModule, node: fx.Node, convolution: nn.Module, norm: nn.Module) -> None:
    gamma = torch.ones_like(norm.running_var) if norm.weight is None else norm.weight
    beta = torch.zeros_like(norm.running_mean) if norm.bias is None else norm.bias
    if isinstance(convolution, QUANTIZED):
        quantizer = convolution.weight_quantizer
        weight, scale, bias = fold_weight(
            convolution.weight, quantizer.scale, convolution.bias, gamma=gamma, beta=beta, mean=norm.running_mean,
            var=norm.running_var, eps=norm.eps, axis=quantizer.axis,
        )  # fmt: skip
        quantizer.scale.copy_(scale)
        convolution.weight, convolution.bias = nn.Parameter(weight), nn.Parameter(bias)
    else:
        convolution.weight, convolution.bias = fuse_conv_bn_weights(
            convolution.weight, convolution.bias, norm.running_mean, norm.running_var, norm.eps, gamma, beta,
            transpose=isinstance(convolution, nn.ConvTranspose2d),
        )  # fmt: skip
    # timm's norms carry an activation, which stays
    rest = [part for part in (getattr(norm, "drop", None), getattr(norm, "act", None)) if part is not None]
    rest = [part for part in rest if not isinstance(part, nn.Identity)]
    if rest:
        graph_module.set_submodule(str(node.target), nn.Sequential(*rest))
    else:
        node.replace_all_uses_with(node.args[0])
        graph_module.graph.erase_node(node)
        graph_module.delete_submodule(str(node.target))
