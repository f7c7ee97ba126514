"""Tiny segmentation networks of every head, for tests of INT8."""

from __future__ import annotations

import torch
from torch import nn

from tests.batch_norms import draw_statistics
from visionkd.config.schema import NetworkConfig
from visionkd.models.factory import create_network
from visionkd.models.network import Network
from visionkd.quantization.calibration import calibrate
from visionkd.quantization.insert import Int8Scheme, quantize_network

SIZE = (64, 96)
#: Heads by name, with a backbone of 0.4 million parameters.
HEADS = ("fcn", "pspnet", "deeplabv3", "deeplabv3plus", "fpn")


def tiny_dense(name: str = "deeplabv3plus_test_resnet", *, num_classes: int = 5, **args: object) -> Network:
    """Return a network with statistics and answers like those of a trained one, in eval mode."""
    torch.manual_seed(0)
    own = {} if name.startswith("lraspp") else {"channels": 16, "aux": True}
    config = NetworkConfig(name=name, pretrained=False, img_size=SIZE, args={**own, **args})
    network = create_network(config, num_classes=num_classes, in_training=True)
    draw_statistics(network)
    with torch.no_grad():
        heads = network.net.get_classifier()
        for head in heads if isinstance(heads, tuple) else (heads,):
            head.weight.mul_(50.0)
    return network.eval()


def pictures(count: int, *, seed: int = 0) -> torch.Tensor:
    """Return smooth images in [0, 1], count x 3 x 64 x 96."""
    small = torch.rand(count, 3, 8, 12, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(small, size=SIZE, mode="bicubic").clamp(0.0, 1.0)


def calibrated_dense(network: Network, **scheme: object) -> Network:
    quantized = quantize_network(network, scheme=Int8Scheme(**{"calibration": "max", **scheme}))  # type: ignore[arg-type]
    calibrate(quantized, [pictures(16)])
    return quantized.eval()
