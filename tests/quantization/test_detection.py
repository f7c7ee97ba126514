"""Quantised detectors: backbone and heads as one graph, the rest as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.quantization.detectors import NAMES, calibrated_detector, pictures, tiny_detector
from visionkd.errors import WorkError
from visionkd.hub.package import load_package, save_package
from visionkd.models.detection.network import DetectionNetwork
from visionkd.quantization.fold import fold_quantized
from visionkd.quantization.insert import (
    Int8Scheme,
    activation_quantizers,
    float_layers,
    float_network,
    int8_layers,
    quantize_network,
    set_mode,
)

TARGET = [
    {"boxes": torch.tensor([[5.0, 5, 40, 40], [10, 3, 60, 50]]), "labels": torch.tensor([0, 2])},
    {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
]


@pytest.fixture(scope="module", params=NAMES)
def pair(request: pytest.FixtureRequest) -> tuple[DetectionNetwork, DetectionNetwork]:
    network = tiny_detector(request.param)
    return network, calibrated_detector(network)


def test_it_is_the_detector_with_quantisers_off(pair: tuple[DetectionNetwork, DetectionNetwork], tmp_path) -> None:
    network, quantized = pair
    image = pictures(2, seed=3)
    layers = [name for name, module in network.net.named_modules() if isinstance(module, nn.Conv2d)]
    assert set(int8_layers(quantized)) | set(float_layers(quantized)) == set(layers) and len(layers) > 20
    assert set(float_layers(quantized)) == {name for name in layers if "regression_head.bbox_" in name}
    assert set(network.net.state_dict()) <= set(quantized.net.state_dict()), "the names stay"
    assert quantized.rule() == network.rule() and quantized.num_classes == network.num_classes
    assert not list(quantized.shell.parameters())
    with torch.no_grad():
        (boxes, scores), (rounded_boxes, rounded) = network.candidates(image), quantized.candidates(image)
        assert 1e-4 < float((rounded - scores).norm() / scores.norm()) < 0.2
        assert 0.0 < float((rounded_boxes - boxes).abs().max())
        found = quantized(image).boxes
        set_mode(quantized, "off")
        torch.testing.assert_close(quantized.candidates(image)[1], scores, rtol=1e-5, atol=1e-5)
        for mine, theirs in zip(quantized(image).boxes, network(image).boxes, strict=True):
            torch.testing.assert_close(mine.scores, theirs.scores, rtol=1e-4, atol=1e-5)
        for mine, theirs in zip(quantized.pyramid(image), network.pyramid(image), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(float_network(quantized).candidates(image)[1], scores, rtol=1e-5, atol=1e-5)
        set_mode(quantized, "quantize")
        save_package(quantized, tmp_path / "model", task="detection", classes=None, metrics={}, origin={})
        loaded, card = load_package(tmp_path / "model")
        assert card["quantization"]["kind"] == "int8" and isinstance(loaded, DetectionNetwork)
        for mine, theirs in zip(loaded(image).boxes, found, strict=True):
            assert torch.equal(mine.boxes, theirs.boxes) and torch.equal(mine.labels, theirs.labels)
        odd = torch.rand(1, 3, 40, 72)
        assert quantized.candidates(odd)[0].shape == network.candidates(odd)[0].shape


def test_its_losses_are_the_detectors_and_reach_every_layer(pair: tuple[DetectionNetwork, DetectionNetwork]) -> None:
    network, quantized = pair
    image = pictures(2, seed=4)
    losses = []
    for net, mode in ((network, None), (quantized, "off"), (quantized, "quantize")):
        net.train()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        if mode is not None:
            set_mode(net, mode)
        losses.append(net(image, TARGET).losses)
        net.eval()
    assert set(losses[0]) == set(losses[1])
    for name, value in losses[0].items():
        assert losses[1][name].item() == pytest.approx(value.item(), rel=1e-4)
        assert losses[2][name].item() == pytest.approx(value.item(), rel=0.2)
    sum(losses[2].values()).backward()
    assert all(layer.weight.grad is not None for layer in int8_layers(quantized).values())
    quantized.zero_grad()


def test_a_head_that_serves_all_levels_has_one_scale_for_them(pair: tuple[DetectionNetwork, DetectionNetwork]) -> None:
    _, quantized = pair
    folder = activation_quantizers(quantized)
    layer = next(name for name in quantized.class_layers())
    nodes = [node for node in quantized.net.graph.nodes if str(node.target) == layer]
    assert len(nodes) == 5
    scales = {str(node.args[0].target) for node in nodes}
    assert len(scales) == 1 and scales.pop().removeprefix("quantizers.") in folder


def test_folded_norms_change_nothing(pair: tuple[DetectionNetwork, DetectionNetwork]) -> None:
    _, quantized = pair
    image = pictures(2, seed=5)
    folded = fold_quantized(quantized)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    with torch.no_grad():
        expected, found = quantized.candidates(image)[1], folded.candidates(image)[1]
    assert float((found - expected).norm() / expected.norm()) < 0.02


def test_frozen_norms_are_folded_too() -> None:
    quantized = calibrated_detector(tiny_detector(frozen_norm=True))
    folded = fold_quantized(quantized)
    assert not any("FrozenBatchNorm" in type(module).__name__ for module in folded.modules())
    image = pictures(2, seed=6)
    with torch.no_grad():
        expected, found = quantized.candidates(image)[1], folded.candidates(image)[1]
    assert float((found - expected).norm() / expected.norm()) < 0.02


def test_classes_of_a_quantised_detector_are_fixed(pair: tuple[DetectionNetwork, DetectionNetwork]) -> None:
    _, quantized = pair
    for change in (lambda: quantized.reset_classifier(3), lambda: quantized.select_classes([0, 1])):
        with pytest.raises(WorkError, match="classes of a quantised"):
            change()


def test_two_stages_are_refused_in_words() -> None:
    network = tiny_detector()
    network.two_stage = True
    with pytest.raises(WorkError, match="two stages"):
        quantize_network(network, scheme=Int8Scheme())
