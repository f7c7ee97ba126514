from __future__ import annotations

import pytest
import torch

from visionkd.config.schema import NetworkConfig
from visionkd.models.factory import create_network
from visionkd.models.network import Network
from visionkd.quantization.calibration import calibrate
from visionkd.quantization.insert import Int8Scheme, quantize_network


def tiny(name: str, *, img_size: int = 32, **args) -> Network:
    torch.manual_seed(0)
    config = NetworkConfig(name=name, pretrained=False, img_size=img_size, args=args)
    network = create_network(config, num_classes=7, in_training=True)
    with torch.no_grad():  # statistics that are not 0 and 1, and gains that are not equal
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0.0, 0.2)
                module.running_var.uniform_(0.5, 2.0)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0.0, 0.2)
    return network


def images(count: int = 4, *, seed: int = 0, img_size: int = 32) -> torch.Tensor:
    return torch.rand(count, 3, img_size, img_size, generator=torch.Generator().manual_seed(seed))


def calibrated(network: Network, **scheme) -> Network:
    quantized = quantize_network(network, scheme=Int8Scheme(**{"calibration": "max", **scheme}))
    calibrate(quantized, [images(16)])
    return quantized


@pytest.fixture(scope="module")
def small() -> Network:
    return calibrated(tiny("cifar_resnet8", width=0.5)).eval()
