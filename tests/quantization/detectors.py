"""Tiny detectors of a single stage, for tests of files and INT8."""

from __future__ import annotations

import torch

from tests.batch_norms import draw_statistics
from tests.quantization.dense_nets import SIZE, pictures
from visionkd.config.schema import NetworkConfig
from visionkd.models.detection.network import DetectionNetwork
from visionkd.models.factory import create_network
from visionkd.quantization.calibration import calibrate
from visionkd.quantization.insert import Int8Scheme, quantize_network

#: Detectors on a backbone of 0.4 million parameters.
NAMES = ("fcos_test_resnet", "retinanet_test_resnet")


def tiny_detector(
    name: str = "fcos_test_resnet", *, num_classes: int = 5, img_size: object = SIZE, **args: object
) -> DetectionNetwork:
    """Return a detector with statistics and answers like those of a trained one, in eval mode."""
    torch.manual_seed(0)
    own = {} if name.startswith("ssdlite") else {"channels": 16, "head_convs": 1}
    config = NetworkConfig(name=name, pretrained=False, img_size=img_size, args={**own, **args})  # type: ignore[arg-type]
    network = create_network(config, num_classes=num_classes, in_training=True)
    draw_statistics(network)
    with torch.no_grad():
        for layer in network.class_layers():
            head = network.net.get_submodule(layer)
            head.weight.mul_(2.0 if own == {} else 30.0)
            head.bias.add_(2.0)
    assert isinstance(network, DetectionNetwork)
    return network.eval()


def calibrated_detector(network: DetectionNetwork, **scheme: object) -> DetectionNetwork:
    quantized = quantize_network(network, scheme=Int8Scheme(**{"calibration": "max", **scheme}))  # type: ignore[arg-type]
    calibrate(quantized, [pictures(16)])
    assert isinstance(quantized, DetectionNetwork)
    return quantized.eval()
