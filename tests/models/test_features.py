from __future__ import annotations

import copy
from functools import partial

import pytest
import timm
import torch
from torch import nn

from tests.models.families import FAMILIES, bare, tiny_family
from visionkd.errors import RequestError
from visionkd.models.features import extract, final_width, four_stages, has_class_token, stages
from visionkd.models.network import Network
from visionkd.types import InputSpec

#: What the four stages of each tiny network are called.
NAMES = {
    "cnn": {2: "layer1", 3: "layer2", 4: "layer3"},
    "resnet": {1: "layer1", 2: "layer2", 3: "layer3", 4: "layer4"},
    "convnext": {1: "stages.0", 2: "stages.1", 3: "stages.2", 4: "stages.3"},
    "mobilenet": {1: "blocks.1", 2: "blocks.2", 3: "blocks.3", 4: "bn2.act"},
    "vit": {1: "blocks.0", 2: "blocks.1", 3: "blocks.3", 4: "blocks.4"},
    "vit_no_class_token": {1: "blocks.0", 2: "blocks.1", 3: "blocks.3", 4: "blocks.4"},
    "deit_distilled": {1: "blocks.0", 2: "blocks.1", 3: "blocks.3", 4: "blocks.4"},
    "swin": {2: "layers.0", 3: "layers.1", 4: "layers.2"},
    "pit": {2: "transformers.0", 3: "transformers.1", 4: "transformers.2"},
    "torchvision": {1: "maxpool", 2: "stage2", 3: "stage3", 4: "conv5"},
    "mixer": {1: "blocks.0", 2: "blocks.1", 3: "blocks.3", 4: "blocks.4"},
}
every_network = pytest.mark.parametrize("kind", FAMILIES)


def with_randomness(network: Network) -> Network:
    for module in network.modules():
        if type(module).__name__ == "DropPath":
            module.drop_prob = 0.3
        elif isinstance(module, nn.Dropout):
            module.p = 0.2
    return network


@every_network
def test_stages_are_found_and_numbered_from_the_deepest(kind: str) -> None:
    network = tiny_family(kind)
    found = four_stages(network)
    assert {number: stage.name for number, stage in found.items()} == NAMES[kind]
    assert found[4].channels == final_width(network)


@every_network
def test_extraction_is_the_plain_forward_in_train_mode_too(kind: str) -> None:
    network = with_randomness(tiny_family(kind))
    image = torch.rand(3, 3, *network.input.img_size)
    indices = [stage.index for stage in four_stages(network).values()]
    twin = copy.deepcopy(network)
    torch.manual_seed(5)
    plain = network(image).logits
    torch.manual_seed(5)
    output = extract(twin, image, indices)
    assert torch.equal(output.logits, plain) and twin.training
    for name, buffer in network.named_buffers():
        assert torch.equal(buffer, twin.get_buffer(name)), name
    for index, feature in zip(indices, output.features, strict=True):
        stage = stages(network)[index]
        assert feature.shape == (3, stage.channels, *stage.grid)
    grads = torch.autograd.grad(
        sum(f.square().mean() for f in output.features), list(twin.parameters()), None, allow_unused=True
    )
    assert sum(grad is not None for grad in grads) > len(grads) / 2


@every_network
@torch.no_grad()
def test_maps_are_those_of_timm(kind: str) -> None:
    network = tiny_family(kind).eval()
    if network.source != "timm":
        pytest.skip("torchvision gives no maps to compare with")
    image = torch.rand(2, 3, 32, 32)
    found = extract(network, image)
    final, expected = network.net.forward_intermediates(network.prepare(image), output_fmt="NCHW")
    if kind == "mobilenet":
        expected[-1] = final
    for ours, theirs in zip(found.features, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    if final.ndim == 3:
        torch.testing.assert_close(found.tokens, final)
    else:
        assert found.tokens is None


def test_looking_for_stages_leaves_the_network_and_the_generator_alone() -> None:
    network = with_randomness(tiny_family("cnn"))
    network.net.layer1.eval()  # a frozen part
    modes = {name: module.training for name, module in network.named_modules()}
    state = copy.deepcopy(network.state_dict())
    before = torch.get_rng_state()
    stages(network)
    assert torch.equal(torch.get_rng_state(), before)
    assert {name: module.training for name, module in network.named_modules()} == modes
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert not any(module._forward_hooks for module in network.modules())


def test_stages_are_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import visionkd.models.stages as module

    network = tiny_family("vit")
    calls = []
    original = module.make_plan
    monkeypatch.setattr(module, "make_plan", lambda network: calls.append(network) or original(network))
    image = torch.rand(1, 3, 32, 32)
    for _ in range(3):
        extract(network, image, [0])
        stages(network)
    extract(copy.deepcopy(network), image, [0])
    assert len(calls) == 1
    network.input = InputSpec(img_size=(24, 24))
    network.net.set_input_size((24, 24))
    assert stages(network)[0].grid == (3, 3) and len(calls) == 2, "another input size has other grids"


@pytest.mark.parametrize(
    ("depth", "blocks"),
    [
        (12, [1, 3, 9, 11]),
        (24, [3, 7, 19, 23]),
        (8, [0, 2, 6, 7]),
        (6, [0, 1, 4, 5]),
        (5, [0, 1, 3, 4]),
        (4, [0, 1, 2, 3]),
        (3, [0, 1, 2]),
        (1, [0]),
    ],
)
def test_blocks_that_are_alike_are_taken_at_the_depths_of_swin(depth: int, blocks: list[int]) -> None:
    found = four_stages(tiny_family("vit", depth=depth))
    assert [stage.index for stage in found.values()] == blocks
    assert list(found) == list(range(5 - len(blocks), 5))
    assert all(stage.layout == "tokens" and stage.grid == (4, 4) for stage in found.values())


def test_layouts() -> None:
    expected = {"cnn": "map", "convnext": "map", "swin": "tokens", "vit": "tokens", "mixer": "tokens"}
    for kind, layout in expected.items():
        assert {stage.layout for stage in stages(tiny_family(kind))} == {layout}, kind


def test_prefix_tokens_come_beside_the_maps() -> None:
    image = torch.rand(2, 3, 32, 32)
    for kind, count in (("vit", 1), ("deit_distilled", 2), ("vit_no_class_token", 0), ("cnn", 0)):
        network = tiny_family(kind).eval()
        output = extract(network, image, [1, 0])
        assert has_class_token(network) == (count > 0), kind
        assert len(output.prefix_tokens) == (2 if count else 0), kind
        if count:
            assert output.prefix_tokens[0].shape == (2, count, 16)
            block = network.net.blocks[1]
            seen = []
            handle = block.register_forward_hook(lambda *given, seen=seen: seen.append(given[2]))
            network(image)
            handle.remove()
            torch.testing.assert_close(output.prefix_tokens[0], seen[0][:, :count])


def test_images_that_are_not_square() -> None:
    net = timm.create_model("test_vit", img_size=(32, 48), patch_size=8)
    network = bare(net, (32, 48))
    output = extract(network.eval(), torch.rand(2, 3, 32, 48), [-1])
    assert output.features[0].shape == (2, 64, 4, 6)
    expected = network.net.forward_intermediates(network.prepare(torch.rand(2, 3, 32, 48)), indices=[5])[1][0]
    assert output.features[0].shape == expected.shape


class _InPlace(nn.Module):
    """A small classifier whose activations work on the outputs of the layers before them."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.two = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu_(self.one(x))
        return self.head(torch.relu_(self.two(x)).mean((2, 3)))


def test_an_output_that_is_overwritten_is_copied() -> None:
    network = bare(_InPlace())
    image = torch.rand(2, 3, 16, 16)
    output = extract(network, image)
    torch.testing.assert_close(output.features[0], network.net.one(network.prepare(image)))
    assert output.features[0].min() < 0
    output.features[0].square().sum().backward()
    assert network.net.one.weight.grad.abs().sum() > 0


def test_a_network_without_maps_is_answered_with_a_reason() -> None:
    network = bare(nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4)))
    with pytest.raises(RequestError, match="'bare' shows no feature maps"):
        stages(network)


def test_extraction_compiles() -> None:
    network = tiny_family("vit").eval()
    image = torch.rand(2, 3, 32, 32)
    expected = extract(network, image, [1, -1])
    found = torch.compile(partial(extract, network, indices=(1, -1)), backend="eager")(image)
    torch.testing.assert_close(found.logits, expected.logits)
    torch.testing.assert_close(found.features, expected.features)


def test_timm_still_names_stages_as_it_did() -> None:
    # The numbers rest on timm's feature_info: one entry for each block of a ViT, strides that grow elsewhere.
    with torch.device("meta"):
        vit, swin = timm.create_model("vit_tiny_patch16_224"), timm.create_model("swin_tiny_patch4_window7_224")
    assert [item["module"] for item in vit.feature_info] == [f"blocks.{number}" for number in range(12)]
    assert [item["reduction"] for item in swin.feature_info] == [4, 8, 16, 32]
