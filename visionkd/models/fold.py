"""Fold the batch norms of a frozen network into its convolutions: the same function with less to compute."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from visionkd.models.detection.network import DetectionNetwork
from visionkd.models.network import Network
from visionkd.models.stages import forget_plan

_TOLERANCE = 1e-3  # of the largest logit; rounding alone stays far below it


@torch.no_grad()
def fold_batch_norm(network: Network) -> Network:
    """Return a frozen copy of ``network`` in eval mode with its batch norms folded away; without any, ``network``.

    Which convolution feeds which norm is seen in a forward pass. The copy is compared with the network on random images
    and dropped if it answers differently, as it would where a convolution feeds something else as well. Of a detector
    only the pyramid is looked at: which boxes its heads answer, rounding may decide.
    """
    if not any(isinstance(module, nn.BatchNorm2d) for module in network.modules()):
        return network
    parameter = next(network.parameters())
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, len(network.input.mean), *network.input.img_size, generator=generator).to(parameter.device)
    network.eval()
    expected = _answer(network, images)
    folded = copy.deepcopy(network).requires_grad_(False)
    for convolution, name in _pairs(folded, images):
        norm = folded.get_submodule(name)
        convolution.weight, convolution.bias = fuse_conv_bn_weights(
            convolution.weight, convolution.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        # timm's norms carry an activation, which stays
        rest = [part for part in (getattr(norm, "drop", None), getattr(norm, "act", None)) if part is not None]
        folded.set_submodule(name, nn.Sequential(*rest) if rest else nn.Identity())
    folded.requires_grad_(False).eval()
    forget_plan(folded)
    difference = (_answer(folded, images) - expected).abs().max()
    return folded if difference <= _TOLERANCE * expected.abs().max() else network


def _answer(network: Network, images: Tensor) -> Tensor:
    """Return what is to stay the same: logits, or the maps of a detector's pyramid as one row for each image."""
    if isinstance(network, DetectionNetwork):
        return torch.cat([each.flatten(1) for each in network.pyramid(images)], 1)
    logits = network(images).logits
    assert logits is not None
    return logits


def _pairs(network: Network, images: Tensor) -> list[tuple[nn.Conv2d, str]]:
    """Return each convolution that feeds a batch norm directly, with the norm's name; both are used once in a pass."""
    made_by: dict[int, tuple[nn.Conv2d, Tensor]] = {}  # the tensor is kept, so that its id stays its own
    found: list[tuple[nn.Conv2d, str]] = []
    calls: dict[int, int] = {}
    handles = []

    def after_convolution(module: nn.Conv2d, args: tuple, output: Tensor) -> None:
        calls[id(module)] = calls.get(id(module), 0) + 1
        made_by[id(output)] = (module, output)

    def before_norm(name: str, module: nn.BatchNorm2d, args: tuple) -> None:
        calls[id(module)] = calls.get(id(module), 0) + 1
        if id(args[0]) in made_by and module.running_mean is not None:
            found.append((made_by[id(args[0])][0], name))

    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            handles.append(module.register_forward_hook(after_convolution))
        elif isinstance(module, nn.BatchNorm2d):
            handles.append(module.register_forward_pre_hook(lambda m, args, name=name: before_norm(name, m, args)))
    try:
        _answer(network, images)
    finally:
        for handle in handles:
            handle.remove()
    return [
        (convolution, name)
        for convolution, name in found
        if calls[id(convolution)] == 1 and calls[id(network.get_submodule(name))] == 1
    ]
