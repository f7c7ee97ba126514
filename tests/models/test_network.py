from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

from visionkd.config.schema import NetworkConfig
from visionkd.errors import WorkError
from visionkd.models.factory import create_network
from visionkd.models.features import extract, stages
from visionkd.models.network import Network
from visionkd.models.normalize import Normalize, resize
from visionkd.types import InputSpec

NAMES = [
    "cifar_resnet8",
    "test_vit",
    "test_convnext",
    "test_resnet",
    "torchvision/shufflenet_v2_x0_5",
    "test_efficientnet",
]


def make(name: str, *, img_size: int = 32, num_classes: int = 5) -> Network:
    torch.manual_seed(0)
    config = NetworkConfig(name=name, pretrained=False, img_size=img_size)
    return create_network(config, num_classes=num_classes, in_training=False)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_the_contract_of_a_network(name: str) -> None:
    network = make(name, img_size=64)
    image = torch.rand(2, 3, 64, 64)
    logits = network(image).logits
    assert logits.shape == (2, 5)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (network.input.mean, network.input.std))
    torch.testing.assert_close(logits, network.net((image - mean) / std), rtol=1e-4, atol=1e-5)
    embedding = network.embed(image)
    assert embedding.shape == (2, network.embedding_dim)
    assert network.forward_features(image).shape[0] == 2
    # A probe on the embedding becomes the network's logits.
    weight, bias = torch.randn(3, network.embedding_dim), torch.randn(3)
    network.set_classifier(weight, bias, ("a", "b", "c"))
    assert network.num_classes == 3 and network.classes == ("a", "b", "c") and network.model_args["num_classes"] == 3
    torch.testing.assert_close(network(image).logits, embedding @ weight.T + bias, rtol=1e-4, atol=1e-4)
    picked = network(image).logits[:, [2, 0]]
    network.select_classes([2, 0])
    assert network.classes == ("c", "a") and network.num_classes == 2
    torch.testing.assert_close(network(image).logits, picked, rtol=1e-4, atol=1e-4)


def test_the_state_dict_is_the_bare_one() -> None:
    network = make("test_resnet")
    assert set(network.state_dict()) == {f"net.{key}" for key in network.net.state_dict()}
    plain = timm.create_model(network.architecture, **network.model_args)
    plain.load_state_dict(network.net.state_dict())


@torch.no_grad()
def test_other_sizes_are_brought_to_the_networks_own() -> None:
    network = make("test_vit", img_size=32)
    image = torch.rand(1, 3, 48, 48)
    small = resize(image, (32, 32), "bicubic")
    assert small.min() >= 0 and small.max() <= 1
    torch.testing.assert_close(network(image).logits, network(small).logits)
    assert resize(image, (48, 48), "bicubic") is image, "a fitting batch is not copied"


def test_normalize_keeps_layout_and_dtype_and_saves_nothing() -> None:
    normalize = Normalize((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    image = torch.rand(2, 3, 8, 8).to(memory_format=torch.channels_last)
    result = normalize(image)
    assert result.is_contiguous(memory_format=torch.channels_last)
    expected = (image - torch.tensor((0.5, 0.4, 0.3)).view(1, 3, 1, 1)) / torch.tensor((0.2, 0.3, 0.4)).view(1, 3, 1, 1)
    torch.testing.assert_close(result, expected)
    assert normalize(image.bfloat16()).dtype == torch.bfloat16 and normalize.state_dict() == {}
    with pytest.raises(ValueError):
        Normalize((0.5,), (0.0,))


def test_a_network_can_be_copied_and_traced_by_dynamo() -> None:
    network = copy.deepcopy(make("cifar_resnet8"))
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    image = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(compiled(image).logits, network(image).logits)


def test_a_classifier_that_is_not_linear_is_refused() -> None:
    network = make("cifar_resnet8")
    network.net.fc = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 5))
    with pytest.raises(WorkError, match="--fit-teacher finetune"):
        network.select_classes([0, 1])


def test_class_names_must_fit_the_outputs() -> None:
    with pytest.raises(WorkError, match="5 outputs, but 2 class names"):
        Network(
            nn.Linear(1, 5),
            architecture="x",
            source="timm",
            input=InputSpec(),
            model_args={"num_classes": 5},
            classes=("a", "b"),
        )


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("test_vit", "transformer"),
        ("test_convnext", "cnn"),
        ("test_efficientnet", "cnn"),
        ("test_coatnet", "hybrid"),
        ("test_maxvit", "hybrid"),
        ("mixer_s32_224", "mlp"),
        ("convit_tiny", "transformer"),
        ("swin_t", "transformer"),
        ("torchvision/vit_b_16", "transformer"),
        ("resnet18", "cnn"),
    ],
)
def test_families(name: str, family: str) -> None:
    with torch.device("meta"):
        network = create_network(NetworkConfig(name=name, pretrained=False), in_training=False)
    assert network.family == family


@pytest.mark.parametrize("name", ["cifar_resnet8", "test_vit", "test_convnext", "torchvision/shufflenet_v2_x0_5"])
@torch.no_grad()
def test_stages_describe_the_maps(name: str) -> None:
    network = make(name, img_size=64)
    image = torch.rand(2, 3, 64, 64)
    known = stages(network)
    output = extract(network, image)
    torch.testing.assert_close(output.logits, network(image).logits)
    for stage, found in zip(known, output.features, strict=True):
        assert found.shape == (2, stage.channels, 64 // stage.stride, 64 // stage.stride), stage
    picked = extract(network, image, [-1, 0]).features
    assert torch.equal(picked[0], output.features[-1]) and torch.equal(picked[1], output.features[0])
    assert (output.tokens is not None) == (network.family == "transformer")


def test_a_stage_that_does_not_exist_is_answered_with_those_that_do() -> None:
    network = make("cifar_resnet8")
    with pytest.raises(Exception, match="(?s)no stage 9.*layer3") as raised:
        extract(network, torch.rand(1, 3, 32, 32), [9])
    assert raised.value.exit_code == 2
