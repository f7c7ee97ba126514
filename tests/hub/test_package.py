from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from visionkd.config.schema import NetworkConfig
from visionkd.errors import DataError
from visionkd.hub.package import load_package, save_package
from visionkd.models.factory import Network, create_network

CLASSES = ("ant", "bee", "käfer")


@pytest.fixture
def network() -> Network:
    torch.manual_seed(0)
    config = NetworkConfig(name="test_vit", pretrained=False, img_size=32, args={"drop_path_rate": 0.1})
    return create_network(config, classes=CLASSES, in_training=True)


@pytest.fixture
def package(network: Network, tmp_path: Path) -> Path:
    return save_package(
        network,
        tmp_path / "run" / "model",
        task="classification",
        classes=CLASSES,
        metrics={"top1": 50.0},
        origin={"method": "kd"},
    )


def test_the_package_loads_into_plain_timm(package: Path, network: Network) -> None:
    card = json.loads((package / "model.json").read_text(encoding="utf-8"))
    net = timm.create_model(card["architecture"], **card["model_args"])
    net.load_state_dict(load_file(package / "model.safetensors"))
    image = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(net.eval()(network.prepare(image)), network.eval()(image).logits)


@pytest.mark.parametrize("part", ["", "..", "model.safetensors"], ids=["package", "run", "weights alone"])
def test_round_trip(package: Path, network: Network, part: str) -> None:
    image = torch.rand(2, 3, 32, 32)
    network.eval()
    config = NetworkConfig(name=os.path.normpath(package / part))
    for loaded in [create_network(config, in_training=False)] + (
        [] if "." in part[2:] else [load_package(package / part)[0]]
    ):
        assert torch.equal(loaded(image).logits, network(image).logits)
        assert (loaded.classes, loaded.input, loaded.model_args) == (CLASSES, network.input, network.model_args)
        assert not loaded.training


def test_the_card(package: Path) -> None:
    card = load_package(package)[1]
    assert card["format"] == 1 and card["task"] == "classification" and card["classes"] == list(CLASSES)
    assert card["metrics"] == {"top1": 50.0} and card["origin"]["method"] == "kd"


def test_a_package_replaces_a_former_one_and_leaves_nothing_beside_it(package: Path, network: Network) -> None:
    save_package(network, package, task="classification", classes=None, metrics={"top1": 60.0}, origin={})
    assert load_package(package)[1]["metrics"] == {"top1": 60.0}
    assert [path.name for path in package.parent.iterdir()] == ["model"]
    assert sorted(path.name for path in package.iterdir()) == ["model.json", "model.safetensors"]


def test_what_a_killed_process_left_is_cleared(package: Path, network: Network) -> None:
    (package.parent / ".model.abc.tmp").mkdir()
    save_package(network, package, task="classification", classes=None, metrics={}, origin={})
    assert [path.name for path in package.parent.iterdir()] == ["model"]


def test_a_failure_leaves_the_former_package(package: Path, network: Network) -> None:
    before = (package / "model.json").read_bytes()
    with pytest.raises(TypeError):
        save_package(network, package, task="classification", classes=None, metrics={}, origin={"x": object()})
    assert (package / "model.json").read_bytes() == before
    assert [path.name for path in package.parent.iterdir()] == ["model"]


def test_tied_weights_are_packaged(network: Network, tmp_path: Path) -> None:
    network.net.norm.bias = network.net.blocks[0].norm1.bias
    save_package(network, tmp_path / "tied", task="classification", classes=CLASSES, metrics={}, origin={})
    assert load_package(tmp_path / "tied")[0].num_classes == 3


def test_a_flipped_bit_is_found(package: Path) -> None:
    file = package / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match="(?s)damaged or was replaced.*SHA-256"):
        load_package(package)
    with pytest.raises(DataError, match="SHA-256"):
        create_network(NetworkConfig(name=str(package)), in_training=False)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda card: card.pop("architecture"), "lacks architecture"),
        (lambda card: card.update(format=2), "format 2.*(?s:.*)upgrade"),
        (lambda card: card.pop("format"), "format None"),
        (lambda card: card.update(architecture="no_such_net"), "no_such_net"),
    ],
)
def test_a_card_that_does_not_fit_is_refused(package: Path, change, words: str) -> None:
    card = json.loads((package / "model.json").read_text(encoding="utf-8"))
    change(card)
    (package / "model.json").write_text(json.dumps(card), encoding="utf-8")
    with pytest.raises(DataError, match=words):
        load_package(package)


def test_missing_and_unreadable_parts(package: Path) -> None:
    (package / "model.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match="cannot be read"):
        load_package(package)
    (package / "model.json").unlink()
    with pytest.raises(DataError, match="model.json"):
        load_package(package)


def test_missing_weights(package: Path) -> None:
    (package / "model.safetensors").unlink()
    with pytest.raises(DataError, match="is missing"):
        load_package(package)


def test_other_classes_get_a_fresh_classifier_aloud(package: Path, network: Network) -> None:
    config = NetworkConfig(name=str(package))
    same = create_network(config, classes=CLASSES, in_training=True)
    assert torch.equal(same.net.head.weight, network.net.head.weight) and not same.notes
    other = create_network(config, classes=("x", "y", "z"), in_training=True)
    assert not torch.equal(other.net.head.weight, network.net.head.weight)
    assert "fresh classifier" in other.notes[0] and other.classes == ("x", "y", "z")
    larger = create_network(config, num_classes=5, in_training=True)
    assert larger.num_classes == 5 and "3 outputs" in larger.notes[0]


def test_another_input_size_resamples_positions(package: Path) -> None:
    network = create_network(NetworkConfig(name=str(package), img_size=64), in_training=False)
    assert network.net.pos_embed.shape[1] == 17 and network.input.img_size == (64, 64)
    assert network.model_args["img_size"] == 64
