"""A network that sees a map of labels beside the image: its first layer gets one more input plane."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from visionkd.errors import RequestError
from visionkd.models.network import Network
from visionkd.models.normalize import Normalize
from visionkd.models.segmentation.nets import widen_input
from visionkd.models.stages import forget_plan


def sees_labels(network: Network) -> bool:
    """Whether a network takes a label channel, so that it is of use only where the labels are known."""
    return network.in_chans > 3


def with_label_input(network: Network, *, std: float, seed: int) -> Network:
    """Give ``network``, in place, a fourth input channel, whose values it takes as they are.

    The planes of the image keep their weights; those of the new plane are drawn from N(0, std^2). The network then
    takes B x 4 x H x W: RGB in [0, 1], and the label channel.

    Args:
        network: A segmentation network that begins with a convolution on three channels.
        std: Standard deviation of the new weights. 0 leaves the function that the network had.
        seed: Of the new weights.

    Raises:
        RequestError: If it has no such convolution.
    """
    stem = next((module for module in network.net.modules() if isinstance(module, nn.Conv2d)), None)
    if stem is None or stem.in_channels != 3 or stem.groups != 1:
        raise RequestError(
            f"'{network.architecture}' does not begin with a convolution on three channels, so it cannot see labels",
            hint="Take another architecture for the teacher: --teacher NAME",
        )
    device = stem.weight.device
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        widen_input(network.net.cpu(), 4, std)
    network.net.to(device)
    network.model_args["in_chans"] = 4
    network.input = replace(network.input, mean=(*network.input.mean, 0.0), std=(*network.input.std, 1.0))
    network.normalize = Normalize(network.input.mean, network.input.std).to(device)
    forget_plan(network)
    return network
