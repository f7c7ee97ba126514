"""Detectors: torchvision's own and those on backbones of timm, their classes, weights, packages and candidates."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import get_model_builder, get_model_weights

from tests.quantization.detectors import NAMES, pictures, tiny_detector
from visionkd.config.schema import NetworkConfig
from visionkd.errors import RequestError
from visionkd.hub.package import load_package, save_package
from visionkd.models.detection import factory, nets
from visionkd.models.detection.names import TORCHVISION
from visionkd.models.detection.network import DetectionNetwork
from visionkd.models.factory import args_problems, create_network
from visionkd.runtime.boxes import choose_boxes

TARGET = [
    {"boxes": torch.tensor([[5.0, 5, 40, 40], [10, 3, 60, 50]]), "labels": torch.tensor([0, 2])},
    {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
]
TWO_STAGES = "fasterrcnn_test_resnet"


def make(name: str, *, num_classes: int | None = 3, size: object = (64, 96), **args: object) -> DetectionNetwork:
    torch.manual_seed(0)
    config = NetworkConfig(name=name, pretrained=False, img_size=size, args=args)  # type: ignore[arg-type]
    network = create_network(config, num_classes=num_classes, in_training=True)
    assert isinstance(network, DetectionNetwork)
    return network


def small(name: str, **args: object) -> DetectionNetwork:
    own = {"channels": 16, **({"head_dim": 32} if name.startswith("faster") else {"head_convs": 1})}
    return make(name, **{**own, **args})


@pytest.mark.parametrize(
    "name",
    [pytest.param(each, marks=() if "mobilenet" in each else pytest.mark.slow) for each in TORCHVISION],
)
def test_torchvisions_detectors_answer_learn_and_change_their_classes(name: str) -> None:
    network = make(name, size=None if name.startswith("ssd") else (64, 96), score_threshold=0.0)
    theirs = get_model_builder(name)(weights=None, weights_backbone=None)
    assert list(network.net.state_dict()) == list(theirs.state_dict()), "published files load"
    assert network.two_stage == name.startswith("faster") and not list(network.net.transform.state_dict())
    image = torch.rand(2, 3, *network.input.img_size)
    with torch.no_grad():
        found = network.eval()(image).boxes
    assert len(found) == 2
    for each in found:
        assert each.boxes.shape == (len(each.scores), 4) and len(each.labels) == len(each.scores)
        assert set(each.labels.tolist()) <= {0, 1, 2} and bool((each.scores.diff() <= 0).all())
    losses = network.train()(image, TARGET).losses
    assert all(value.isfinite() for value in losses.values())
    sum(losses.values()).backward()
    layers = network.class_layers()
    assert all(network.net.get_submodule(layer).weight.grad is not None for layer in layers)
    network.reset_classifier(5, classes=tuple("abcde"))
    outputs = nets.outputs_per_class(network.net)
    for layer, count in zip(layers, outputs, strict=True):
        assert network.net.get_submodule(layer).weight.shape[0] == count * (5 + nets.has_background(network.net))
    with torch.no_grad():
        assert len(network.eval()(image[:1]).boxes) == 1
    assert network.num_classes == network.model_args["num_classes"] == 5


@pytest.mark.parametrize("name", [*NAMES, "ssdlite320_mobilenet_v3_large"])
def test_what_is_chosen_of_the_candidates_is_what_the_network_answers(name: str) -> None:
    network = tiny_detector(name, img_size=None if name.startswith("ssd") else (64, 96))
    image = torch.rand(2, 3, *network.input.img_size)
    with torch.no_grad():
        boxes, scores = network.candidates(image)
        network.net.score_thresh = float(scores.flatten().topk(400).values[-1])  # equal scores at a limit are a toss
        expected = network(image).boxes
    rule = network.rule()
    assert boxes.shape[1] == sum(map(len, network.anchors())) and scores.shape == (2, boxes.shape[1], 5)
    assert 0.0 <= float(scores.min()) <= float(scores.max()) <= 1.0
    for given, values, wanted in zip(boxes, scores, expected, strict=True):
        found = choose_boxes(given.numpy(), values.numpy(), rule)
        assert len(found) == len(wanted.scores) > 5
        if name.startswith("ssd"):  # untrained, places that show the same score alike to five digits
            np.testing.assert_allclose(found.scores, wanted.scores.numpy(), rtol=1e-4)
            continue
        np.testing.assert_allclose(found.scores, wanted.scores.numpy(), rtol=1e-6)
        # equal scores may change places
        order, theirs = (np.lexsort((*each.boxes.T, each.scores)) for each in (found, wanted))
        np.testing.assert_allclose(found.boxes[order], wanted.boxes.numpy()[theirs], atol=1e-4)
        np.testing.assert_array_equal(np.sort(found.labels), np.sort(wanted.labels.numpy()))


@pytest.mark.parametrize("name", [*NAMES, TWO_STAGES])
def test_a_package_keeps_everything(name: str, tmp_path) -> None:
    network = small(name, score_threshold=0.0, max_detections=7).eval()
    classes = ("a", "b", "c")
    save_package(network, tmp_path / "model", task="detection", classes=classes, metrics={"ap": 1.0}, origin={})
    loaded, card = load_package(tmp_path / "model")
    assert isinstance(loaded, DetectionNetwork) and loaded.classes == classes and card["task"] == "detection"
    assert loaded.input == network.input
    image = pictures(2)
    with torch.no_grad():
        for mine, theirs in zip(network(image).boxes, loaded(image).boxes, strict=True):
            assert torch.equal(mine.boxes, theirs.boxes) and torch.equal(mine.scores, theirs.scores)
            assert len(theirs.scores) <= 7


def test_a_weights_file_tells_its_number_of_classes(tmp_path) -> None:
    network = small("retinanet_test_resnet", num_classes=4)
    torch.save({f"module.{name}": value for name, value in network.net.state_dict().items()}, tmp_path / "w.pth")
    args = {"channels": 16, "head_convs": 1}
    config = NetworkConfig(name=f"retinanet_test_resnet@{tmp_path / 'w.pth'}", img_size=(64, 96), args=args)
    loaded = create_network(config, in_training=False)
    assert loaded.num_classes == 4 and tuple(loaded.input.img_size) == (64, 96)
    image = pictures(1)
    with torch.no_grad():
        assert torch.equal(loaded.candidates(image)[1], network.eval().candidates(image)[1])


@pytest.mark.parametrize("name", ["ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn"])
def test_published_weights_answer_for_the_80_named_classes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 91 outputs the background stays hidden, and numbers that no class has go."""
    record = get_model_weights(name).DEFAULT
    torch.manual_seed(0)
    published = get_model_builder(name)(weights=None, weights_backbone=None)
    state = {key: torch.randn_like(value) if value.is_floating_point() else value
             for key, value in published.state_dict().items()}  # fmt: skip
    monkeypatch.setattr(type(record), "get_state_dict", lambda *_, **__: state)
    monkeypatch.setattr(factory, "url_access", lambda *_, **__: contextlib.nullcontext())
    network = create_network(NetworkConfig(name=name), in_training=False)
    assert network.num_classes == 80 and len(set(network.classes)) == 80 and "N/A" not in network.classes
    assert network.trained and network.pretrained_tag == "COCO_V1"
    numbers = [number for number, each in enumerate(record.meta["categories"]) if each in network.classes]
    for layer, count in zip(network.class_layers(), nets.outputs_per_class(network.net), strict=True):
        mine, theirs = network.net.get_submodule(layer).weight, state[f"{layer}.weight"]
        rest = theirs.shape[1:]
        if layer.endswith("bbox_pred"):  # class in front of side
            expected = theirs.view(91, 4, *rest)[[0, *numbers]]
        else:  # anchor in front of class
            expected = theirs.view(count, 91, *rest)[:, [0, *numbers]]
        assert torch.equal(mine, expected.reshape(-1, *rest))


def test_a_crowd_and_boxes_without_area_are_not_learnt_from() -> None:
    network = small("fcos_test_resnet").train()
    plain = TARGET[:1]
    more = {
        "boxes": torch.cat([plain[0]["boxes"], torch.tensor([[0.0, 0, 64, 64], [7, 7, 7, 20]])]),
        "labels": torch.tensor([0, 2, 1, 1]),
        "crowd": torch.tensor([False, False, True, False]),
    }
    image = pictures(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    wanted, given = network(image, plain).losses, network(image, [more]).losses
    assert {name: value.item() for name, value in wanted.items()} == {name: v.item() for name, v in given.items()}
    with pytest.raises(ValueError, match="needs the targets"):
        network(image)


def test_the_levels_lie_at_their_strides() -> None:
    for name, strides in (("fcos_test_resnet", [8, 16, 32, 64, 128]), (TWO_STAGES, [4, 8, 16, 32, 64])):
        network = small(name, size=(128, 256)).eval()
        with torch.no_grad():
            maps = network.pyramid(torch.rand(1, 3, 128, 256))
        assert [256 // each.shape[-1] for each in maps] == strides == network.net.backbone.strides


def test_frozen_norms_do_not_move() -> None:
    network = small("fcos_test_resnet", frozen_norm=True).train()
    before = {name: value.clone() for name, value in network.net.backbone.body.named_buffers()}
    network(pictures(2), TARGET)
    assert before and all(torch.equal(value, before[name]) for name, value in
                          network.net.backbone.body.named_buffers())  # fmt: skip


def test_channels_need_not_be_a_multiple_of_32() -> None:
    network = small("fcos_test_resnet", channels=24, head_convs=2)
    head = network.net.head
    assert {module.num_groups for module in head.modules() if isinstance(module, nn.GroupNorm)} == {3}
    assert len([m for m in head.classification_head.conv if isinstance(m, nn.Conv2d)]) == 2


@pytest.mark.parametrize(
    ("name", "args", "words"),
    [
        ("fcos_test_resnet", {"channels": 20}, "a multiple of 8"),
        ("fcos_test_resnet", {"head_dim": 64}, "no such argument"),
        (TWO_STAGES, {"head_convs": 1}, "no such argument"),
        ("retinanet_test_resnet", {"score_threshold": 1.5}, "from 0 to below 1"),
        ("ssdlite320_mobilenet_v3_large", {"chanels": 8}, "no such argument"),
    ],
)
def test_wrong_arguments_are_named(name: str, args: dict[str, object], words: str) -> None:
    (problem,) = args_problems(NetworkConfig(name=name, args=args))
    assert words in str(problem) and next(iter(args)) in problem.key
    with pytest.raises(RequestError, match=next(iter(args))):
        create_network(NetworkConfig(name=name, pretrained=False, args=args), num_classes=2, in_training=True)


def test_an_unknown_backbone_is_named() -> None:
    with pytest.raises(RequestError, match="'fcos' is a detector, and there is no backbone 'resnet19'"):
        create_network(NetworkConfig(name="fcos_resnet19"), in_training=True)
