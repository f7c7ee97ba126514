"""Placement of the quantisers on segmentation networks: resizes, concatenations, sums of maps, pooling branches."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from tests.quantization.dense_nets import HEADS, calibrated_dense, pictures, tiny_dense
from visionkd.hub.package import load_package, save_package
from visionkd.models.network import Network
from visionkd.models.segmentation.blocks import GridMean
from visionkd.quantization.fake_quant import ActivationQuantizer
from visionkd.quantization.insert import activation_quantizers, float_layers, int8_layers, set_mode

#: Resizes, and layers of pooling branches.
GRID = {"fcn": (0, 0), "pspnet": (4, 4), "deeplabv3": (1, 1), "deeplabv3plus": (2, 1), "fpn": (3, 0)}


@pytest.fixture(scope="module", params=HEADS)
def pair(request: pytest.FixtureRequest) -> tuple[str, Network, Network]:
    network = tiny_dense(f"{request.param}_test_resnet")
    return request.param, network, calibrated_dense(network)


def quantizer_of(network: Network, node: fx.Node) -> str | None:
    """Return the name of the quantiser that made ``node``."""
    module = dict(network.net.named_modules()).get(str(node.target)) if node.op == "call_module" else None
    return str(node.target) if isinstance(module, ActivationQuantizer) else None


def calls(network: Network, *functions: object) -> list[fx.Node]:
    return [node for node in network.net.graph.nodes if node.op == "call_function" and node.target in functions]


def data_inputs(node: fx.Node) -> list[fx.Node]:
    return [value for value in node.args if isinstance(value, fx.Node)]


def test_it_is_the_network_with_quantisers_off(pair: tuple[str, Network, Network], tmp_path) -> None:
    head, network, quantized = pair
    image = pictures(2, seed=3)
    num_resizes, num_float = GRID[head]
    layers = [name for name, module in network.net.named_modules() if isinstance(module, nn.Conv2d)]
    layers = [name for name in layers if not name.startswith("aux_head")]
    assert set(int8_layers(quantized)) | set(float_layers(quantized)) == set(layers) and len(layers) > 15
    assert len(calls(quantized, F.interpolate)) == num_resizes
    assert list(float_layers(quantized).values()) == ["part of a pooling branch"] * num_float
    assert quantized.task == "segmentation" and quantized.stride == network.stride
    assert not [name for name, _ in quantized.net.named_parameters() if name.startswith("aux_head")], "trains only"
    with torch.no_grad():
        expected, given = network(image).logits, quantized(image).logits
        error = float((given - expected).norm() / expected.norm())
        set_mode(quantized, "off")
        torch.testing.assert_close(quantized(image).logits, expected, rtol=1e-5, atol=1e-5)
        set_mode(quantized, "quantize")
        assert 1e-4 < error < 0.1, error
        save_package(quantized, tmp_path / "model", task="segmentation", classes=None, metrics={}, origin={})
        loaded, card = load_package(tmp_path / "model")
        assert card["task"] == "segmentation" and torch.equal(loaded.eval()(image).logits, given)
        odd = torch.rand(1, 3, 40, 72)  # crops of a training have other sizes
        assert quantized(odd).logits.shape == network(odd).logits.shape


def test_both_sides_of_a_resize_have_one_scale(pair: tuple[str, Network, Network]) -> None:
    _, _, quantized = pair
    for node in calls(quantized, F.interpolate):
        before, after = node.args[0], list(node.users)
        name = quantizer_of(quantized, before)
        scales = {quantizer_of(quantized, user) for user in after}
        assert name is not None and None not in scales, node
        folder = activation_quantizers(quantized)
        assert {folder[each.rpartition(".")[2]] for each in scales} == {folder[name.rpartition(".")[2]]}


def test_the_inputs_of_a_concatenation_and_its_output_share_a_scale(pair: tuple[str, Network, Network]) -> None:
    head, _, quantized = pair
    found = calls(quantized, torch.cat)
    assert len(found) == {"pspnet": 1, "deeplabv3": 1, "deeplabv3plus": 2}.get(head, 0)
    for node in found:
        names = {quantizer_of(quantized, value) for value in (*node.all_input_nodes, *node.users)}
        assert len(names) == 1 and None not in names, node


def test_a_sum_takes_the_coarser_map_rounded_and_the_other_from_its_convolution(
    pair: tuple[str, Network, Network],
) -> None:
    head, _, quantized = pair
    modules = dict(quantized.net.named_modules())
    sums = [
        [value for value in data_inputs(node) if "laterals" in str(value.target)]
        for node in calls(quantized, operator.add, torch.add)
    ]
    sums = [found for found in sums if found]
    assert len(sums) == (3 if head == "fpn" else 0)
    for long, *skip in sums:
        assert isinstance(modules[str(long.target)], nn.Conv2d) and len(skip) == 1
        assert quantizer_of(quantized, skip[0]) is not None


def test_means_take_what_the_convolutions_beside_them_take(pair: tuple[str, Network, Network]) -> None:
    """Otherwise a map would be stored twice, in float for the mean and in bytes for the others."""
    head, _, quantized = pair
    modules = dict(quantized.net.named_modules())
    means = [node for node in quantized.net.graph.nodes if isinstance(modules.get(str(node.target)), GridMean)]
    assert len(means) == {"pspnet": 4, "deeplabv3": 1, "deeplabv3plus": 1}.get(head, 0)
    for node in means:
        name = quantizer_of(quantized, node.args[0])
        assert name is not None and len(node.args[0].users) > 1, node


def test_pooling_branches_are_quantised_on_request() -> None:
    network = tiny_dense("pspnet_test_resnet")
    assert float_layers(calibrated_dense(network, gates="int8")) == {}


@pytest.mark.slow
def test_lraspp_of_torchvision() -> None:
    network = tiny_dense("lraspp_mobilenet_v3_large")
    quantized = calibrated_dense(network)
    assert float_layers(quantized)["classifier.scale.1"] == "part of a gate" and len(int8_layers(quantized)) == 49
    (resize,) = calls(quantized, F.interpolate)
    assert quantizer_of(quantized, resize.args[0]) is not None
    (last,) = [node for node in calls(quantized, operator.add, torch.add) if "classifier" in str(node.args[0])]
    assert [quantizer_of(quantized, value) is not None for value in data_inputs(last)].count(True) == 1
