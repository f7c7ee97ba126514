"""Parameters, multiply-accumulates and bytes of a network."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from visionkd.models.network import Network


@dataclass(frozen=True)
class Complexity:
    """What a network costs, whatever runs it.

    Attributes:
        params_m: Parameters in millions.
        macs_g: Multiply-accumulates for one image in 10^9: of convolutions, linear layers and attention.
        size_mb: Weights and saved buffers in 10^6 bytes, packed where a package holds them so, and with one byte for
            each weight that computes in INT8.
    """

    params_m: float
    macs_g: float
    size_mb: float


def measure_complexity(network: Network, *, img_size: tuple[int, int] | None = None) -> Complexity:
    """Count parameters, multiply-accumulates and bytes of the bare network, without heads that only help training.

    Args:
        network: What to count; it is left as it is.
        img_size: Height and width in pixels; None takes the network's own.
    """
    net, helpers = network.net, network.auxiliary
    params = sum(value.numel() for name, value in net.named_parameters() if not name.startswith(helpers))
    stored = net.state_dict() if network.packed is None else network.packed
    size = sum(each.numel() * each.element_size() for name, each in stored.items() if not name.startswith(helpers))
    int8 = [module.weight for module in net.modules() if hasattr(module, "weight_quantizer")]
    size -= sum(weight.numel() * (weight.element_size() - 1) for weight in int8)
    return Complexity(params / 1e6, _macs(network, img_size or network.input.img_size) / 1e9, size / 1e6)


def _macs(network: Network, img_size: tuple[int, int]) -> float:
    try:
        return _counted(network, img_size, "meta")  # shapes alone: nothing is computed
    except (NotImplementedError, RuntimeError):
        return _counted(network, img_size, "cpu")


def _counted(network: Network, img_size: tuple[int, int], device: str) -> float:
    # frozen: the counter wants to hook what has a gradient, and finds none to hook in PiT
    net = copy.deepcopy(network.core()).float().to(device).eval().requires_grad_(False)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(torch.zeros(1, network.in_chans, *img_size, device=device))
    # PyTorch counts a multiplication and an addition as two operations.
    return counter.get_total_flops() / 2
