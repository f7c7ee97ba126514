"""Placement of the quantisers, on tiny members of each family."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx, nn

from tests.quantization.conftest import calibrated, images, tiny
from visionkd.errors import WorkError
from visionkd.hub.package import load_package, save_package
from visionkd.quantization.fake_quant import ActivationQuantizer
from visionkd.quantization.insert import (
    Int8Scheme,
    activation_quantizers,
    float_layers,
    float_network,
    int8_layers,
    leave_float,
    quantize_network,
    set_mode,
)

VIT = {"depth": 2, "embed_dim": 32, "num_heads": 2}
#: Name, arguments, layers in INT8, residual adds with a quantised skip, and layers that stay in float.
GRID = {
    "cifar_resnet": ("cifar_resnet8", {"width": 0.5}, 10, 3, 0),
    "cifar_resnet, option A": ("cifar_resnet8", {"width": 0.5, "shortcut": "pad"}, 8, 3, 0),
    "resnet": ("resnet18", {"channels": (8, 8, 16, 16)}, 22, 8, 0),
    "bottleneck": ("resnet26", {"channels": (8, 8, 8, 8)}, 30, 8, 0),
    "se_resnet": ("seresnet18", {"channels": (16, 16, 16, 16)}, 22, 8, 16),
    "mobilenetv2": ("mobilenetv2_035", {}, 53, 10, 0),
    "mobilenetv2_free": ("mobilenetv2_free", {"width": 0.25, "depths": (1, 2, 1, 1, 1, 1)}, 26, 2, 0),
    "mobilenetv3": ("mobilenetv3_small_050", {}, 36, 7, 18),
    "efficientnet_lite": ("tf_efficientnet_lite0", {}, 50, 9, 0),
    "efficientnet": ("efficientnet_b0", {}, 50, 9, 32),
    "convnext": ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 16)}, 17, 4, 0),
    "vit": ("vit_tiny_patch16_224", VIT, 10, 0, 0),
    "deit": ("deit_tiny_distilled_patch16_224", VIT, 11, 0, 0),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"depths": (1, 2), "embed_dim": 16, "num_heads": (2, 4), "window_size": 4},
        15,
        0,
        0,
    ),
    "torchvision resnet": ("torchvision/resnet18", {}, 21, 8, 0),
    "torchvision mobilenet": ("torchvision/mobilenet_v3_small", {}, 36, 6, 18),
    "shufflenet": ("torchvision/shufflenet_v2_x0_5", {}, 57, 0, 0),
}


def inputs(graph: fx.Graph, modules: dict, node: fx.Node) -> list[bool]:
    """Whether each tensor that goes into a node comes straight from a quantiser."""
    return [isinstance(modules.get(str(parent.target)), ActivationQuantizer) for parent in node.all_input_nodes]


@pytest.mark.parametrize("case", GRID)
def test_the_placement_of_each_family(case, tmp_path):
    name, args, num_layers, num_skips, num_float = GRID[case]
    network = tiny(name, **args).eval()
    quantized = calibrated(network)
    image = images()

    # with quantisers off, it is the network
    set_mode(quantized, "off")
    torch.testing.assert_close(quantized(image).logits, network(image).logits, rtol=1e-5, atol=1e-6)
    set_mode(quantized, "quantize")
    output = quantized(image).logits
    assert torch.isfinite(output).all() and not torch.equal(output, network(image).logits)

    graph, modules = quantized.net.graph, dict(quantized.net.named_modules())
    layers = int8_layers(quantized)
    assert len(layers) == num_layers and len(float_layers(quantized)) == num_float
    # both inputs of each product; the norm or activation behind it reads it as it is
    for node in graph.nodes:
        if node.op == "call_module" and node.target in layers:
            assert inputs(graph, modules, node) == [True], node
            weight = layers[node.target].weight_quantizer
            assert weight.axis == 0 and weight.scale.shape == (layers[node.target].weight.shape[0],)
        elif node.op == "call_module" and isinstance(modules[node.target], (nn.BatchNorm2d, nn.LayerNorm, nn.ReLU)):
            assert not any(inputs(graph, modules, node)), node
    # residual adds: one quantised input, the other not
    adds = [node for node in graph.nodes if node.target in (operator.add, operator.iadd, torch.add)]
    quantized_inputs = [sum(inputs(graph, modules, node)) for node in adds]
    assert max(quantized_inputs, default=0) <= 1 and sum(quantized_inputs) == num_skips
    # one quantiser a tensor, a scale each, all of them used
    rounded = [node.args[0] for node in graph.nodes if isinstance(modules.get(str(node.target)), ActivationQuantizer)]
    assert len(rounded) == len(set(rounded))
    called = {str(node.target).rpartition(".")[2] for node in graph.nodes if str(node.target).startswith("quantizers.")}
    assert called == set(activation_quantizers(quantized))
    assert all(q.scale > 0 for q in activation_quantizers(quantized).values())

    # through a package and back
    save_package(quantized, tmp_path / "model", task="classification", classes=None, metrics={}, origin={})
    loaded, card = load_package(tmp_path / "model")
    assert card["quantization"]["kind"] == "int8" and loaded.quantization == quantized.quantization
    assert torch.equal(loaded(image).logits, output)


def test_the_long_branch_comes_straight_from_its_convolution(small):
    """In a block that changes the shape, the downsample branch is rounded; in others the block's own input is."""
    names = [name for name in activation_quantizers(small) if name.endswith("_skip")]
    assert names == ["layer2_0_conv2_skip", "layer3_0_conv2_skip"]
    (skip,) = [node for node in small.net.graph.nodes if node.target == "quantizers.layer2_0_conv2_skip"]
    assert skip.args[0].target == "layer2.0.downsample.1"
    adds = [node for node in small.net.graph.nodes if node.target is operator.add]
    first = [str(parent.target) for parent in adds[0].all_input_nodes]
    assert first == ["layer1.0.drop_path", "quantizers.layer1_0_conv1"]


def test_concatenated_tensors_share_a_scale():
    network = calibrated(tiny("torchvision/shufflenet_v2_x0_5"))
    modules = dict(network.net.named_modules())
    cats = [node for node in network.net.graph.nodes if node.target in (torch.cat, torch.concat)]
    assert cats
    for node in cats:
        targets = {parent.target for parent in node.all_input_nodes}
        assert len(targets) == 1 and isinstance(modules[targets.pop()], ActivationQuantizer), node


def test_attention_products_are_quantised_on_request():
    network = tiny("vit_tiny_patch16_224", **VIT).eval()
    plain, split = calibrated(network), calibrated(network, attention="int8")
    assert len(activation_quantizers(split)) == len(activation_quantizers(plain)) + 2 * 4
    modules = dict(split.net.named_modules())
    products = [node for node in split.net.graph.nodes if node.target in (operator.matmul, torch.matmul)]
    assert len(products) == 4
    assert all(inputs(split.net.graph, modules, node) == [True, True] for node in products)
    set_mode(split, "off")
    torch.testing.assert_close(split(images()).logits, network(images()).logits, rtol=1e-4, atol=1e-5)


def test_gates_and_skipped_layers():
    network = tiny("mobilenetv3_small_050")
    whole = quantize_network(network, scheme=Int8Scheme(gates="int8", skip=("classifier", "blocks.0.*")))
    rest = float_layers(whole)
    assert set(rest.values()) == {"skipped"} and "classifier" in rest and "blocks.0.0.conv_dw" in rest
    assert "blocks.2.0.se.conv_reduce" in int8_layers(whole) and "classifier" not in int8_layers(whole)
    with pytest.raises(WorkError, match="no layer to quantise"):
        quantize_network(network, scheme=Int8Scheme(skip=("*",)))


def test_layers_can_be_taken_back_to_float_with_the_other_scales_kept(small):
    names = ["conv1", "layer1.0.conv1"]
    fewer = leave_float(small, names)
    assert set(int8_layers(small)) - set(int8_layers(fewer)) == set(names)
    assert fewer.quantization["scheme"]["skip"] == names and small.quantization["scheme"]["skip"] == []
    assert all(torch.isfinite(q.scale) for q in activation_quantizers(fewer).values())
    before, after = int8_layers(small)["fc"].weight_quantizer, int8_layers(fewer)["fc"].weight_quantizer
    assert torch.equal(before.scale, after.scale) and after.frozen
    # nearer to float than before, and in float without any
    plain = float_network(small)
    exact = plain(images()).logits
    errors = [(net(images()).logits - exact).abs().mean().item() for net in (small, fewer)]
    assert 0 < errors[1] < errors[0]
    assert plain.quantization is None and not int8_layers(plain)


def test_training_reaches_weights_statistics_and_stochastic_depth():
    network = tiny("cifar_resnet8", width=0.5, drop_path_rate=0.5)
    quantized = calibrated(network).train()
    mean = quantized.net.bn1.running_mean.clone()
    torch.manual_seed(1)
    first = quantized(images()).logits
    first.square().sum().backward()
    assert not torch.equal(quantized(images()).logits, first), "stochastic depth draws anew"
    assert not torch.equal(quantized.net.bn1.running_mean, mean)
    missing = [name for name, p in quantized.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert [name for name in missing if "weight" in name and "layer" not in name] == []
    quantized.eval()
    assert torch.equal(quantized(images()).logits, quantized(images()).logits)


def test_dropout_follows_the_mode():
    quantized = calibrated(tiny("mobilenetv3_small_050", drop_rate=0.5))
    quantized.train().requires_grad_(False)
    for module in quantized.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    assert not torch.equal(quantized(images()).logits, quantized(images()).logits)
    quantized.eval()
    assert torch.equal(quantized(images()).logits, quantized(images()).logits)


def test_what_a_quantised_network_can_no_longer_do(small):
    assert small.embed(images()).shape == (4, small.embedding_dim)
    with pytest.raises(WorkError, match="cannot be replaced"):
        small.reset_classifier(3)
    with pytest.raises(WorkError, match="feature maps"):
        small.forward_features(images())


def test_a_network_that_decides_from_its_data_is_refused():
    class Choosy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 7, 3)

        def get_classifier(self) -> nn.Module:
            return self.conv

        def forward(self, x):
            return self.conv(x).mean((2, 3)) if x.sum() > 0 else self.conv(-x).mean((2, 3))

    network = tiny("cifar_resnet8", width=0.5)
    network.net = Choosy()
    with pytest.raises(WorkError, match=r"'cifar_resnet8' cannot be quantised: torch.fx cannot follow"):
        quantize_network(network, scheme=Int8Scheme())
