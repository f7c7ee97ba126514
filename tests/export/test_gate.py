"""The gate: guilty layers are found and left in float; what is slow or wrong is refused."""

from __future__ import annotations

import pytest
import torch

from tests.quantization.conftest import calibrated, images, tiny
from visionkd.errors import WorkError
from visionkd.export import gate
from visionkd.export.accuracy import Labels
from visionkd.models.network import Network
from visionkd.quantization.insert import activation_quantizers, float_layers, int8_layers
from visionkd.types import Listener
from visionkd.workflows._export_int8 import _accurate

GUILTY = "layer2.0.conv2"


def fine() -> Network:
    """An INT8 network whose answers are spread over its classes."""
    network = tiny("cifar_resnet8").eval()
    logits = gate.logits_of(network, images(32))
    with torch.no_grad():
        network.net.fc.bias -= logits.mean(0)
    return calibrated(network).eval()


@pytest.fixture
def spoiled() -> Network:
    """One layer's weights have a scale so coarse that most are zero."""
    network = fine()
    int8_layers(network)[GUILTY].weight_quantizer.scale.mul_(150.0)
    return network


def test_the_layer_that_costs_most_is_named_first(spoiled: Network) -> None:
    seen = []
    ranked = gate.sensitivity(spoiled, images(8), on_layer=lambda done, total: seen.append((done, total)))
    assert ranked[0].name == GUILTY and ranked[0].divergence > 5 * ranked[1].divergence > 0
    assert {row.name for row in ranked} == set(int8_layers(spoiled)) and seen[-1] == (10, 10)
    assert all(quantizer.mode == "quantize" for quantizer in activation_quantizers(spoiled).values())
    assert all(layer.weight_quantizer.enabled for layer in int8_layers(spoiled).values())


def test_the_reference_may_be_a_teacher(spoiled: Network) -> None:
    teacher = torch.randn(8, 7, generator=torch.Generator().manual_seed(0))
    far = {row.name: row.divergence for row in gate.sensitivity(spoiled, images(8), reference=teacher)}
    near = {row.name: row.divergence for row in gate.sensitivity(spoiled, images(8))}
    assert all(far[name] > near[name] for name in near if name != GUILTY)


def test_the_guilty_layer_is_left_in_float(spoiled: Network) -> None:
    batch, said = images(32, seed=5), []
    with torch.no_grad():
        ranked = gate.sensitivity(spoiled, batch)
        expected = gate.logits_of(fine(), batch)
    truth = Labels(expected.argmax(1).numpy())

    class Notes(Listener):
        def message(self, text: str, level: str = "info") -> None:
            said.append(text)

    repaired, names, measured = _accurate(spoiled, batch, expected, truth, 100.0, 15.0, Notes())
    assert names == (GUILTY,) and measured[0].name == ranked[0].name
    assert float_layers(repaired)[GUILTY] == "skipped" and len(int8_layers(repaired)) == 9
    assert "looking for the layers" in said[0] and said[1] == f"Left in float: {GUILTY}"
    kept, none, _ = _accurate(repaired, batch, expected, truth, 100.0, 15.0, Notes())
    assert kept is repaired and none == ()


def test_what_cannot_be_repaired_is_refused(spoiled: Network) -> None:
    ranked, tried = gate.sensitivity(spoiled, images(4)), []

    def drop_of(network: Network) -> float:
        tried.append(len(int8_layers(network)))
        return 7.5

    with pytest.raises(WorkError, match=rf"7.50 points .* 5 of 10 layers in float.*most sensitive layers are {GUILTY}"):
        gate.repair(spoiled, ranked, drop_of, max_drop=1.0)
    assert tried == [9, 8, 6, 5]


def test_int8_that_is_slower_is_refused() -> None:
    assert gate.check_speed(4.0, 2.0, min_speedup=1.0) == 2.0
    with pytest.raises(WorkError, match=r"0\.80 times as fast, and 1 times is asked for"):
        gate.check_speed(4.0, 5.0, min_speedup=1.0)
    assert gate.check_speed(4.0, 5.0, min_speedup=0.0) == 0.8
