"""Weight files: what is read, what is refused, and how the refusal is worded."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

import visionkd.models.cifar_resnet  # noqa: F401  (registers its networks with timm)
from visionkd.config.schema import NetworkConfig
from visionkd.errors import DataError, RequestError
from visionkd.models.factory import create_network
from visionkd.models.weights import strip_prefixes, weights_sha256


@pytest.fixture
def net() -> torch.nn.Module:
    torch.manual_seed(1)
    return timm.create_model("cifar_resnet8", num_classes=7)


def load(path: Path, architecture: str = "cifar_resnet8", **kwargs):
    return create_network(NetworkConfig(name=f"{architecture}@{path}", **kwargs), in_training=False)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": {f"module.{key}": value for key, value in state.items()}, "epoch": 3},
        lambda state: {"model": {f"_orig_mod.module.{key}": value for key, value in state.items()}},
        lambda state: {"model_ema": state, "model": {key: value + 1 for key, value in state.items()}},
        lambda state: {
            "state_dict": {f"student.net.{key}": value for key, value in state.items()}
            | {f"projectors.{key}": value for key, value in state.items()}
        },
    ],
    ids=["plain", "ddp", "compiled", "ema first", "ours"],
)
def test_state_dicts_are_found_and_unwrapped(net: torch.nn.Module, tmp_path: Path, wrap) -> None:
    torch.save(wrap(net.state_dict()), tmp_path / "w.pt")
    network = load(tmp_path / "w.pt")
    assert network.num_classes == 7, "inferred from the classifier"
    assert weights_sha256(network.net) == weights_sha256(net)
    assert "input statistics" in network.notes[0]


def test_safetensors_load_too_and_another_head_is_put_in_place_aloud(net: torch.nn.Module, tmp_path: Path) -> None:
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    config = NetworkConfig(name=f"cifar_resnet8@{tmp_path / 'w.safetensors'}")
    network = create_network(config, num_classes=3, in_training=True)
    assert network.num_classes == 3 and network.net.fc.weight.shape == (3, 64)
    assert torch.equal(network.net.conv1.weight, net.conv1.weight)
    assert any("7 outputs" in note for note in network.notes)


def test_a_pickle_is_refused_and_never_run(tmp_path: Path) -> None:
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (open, (str(ran), "w"))

    for content in (Evil(), {"state_dict": {"conv1.weight": torch.zeros(1)}, "args": argparse.Namespace(lr=1)}):
        torch.save(content, tmp_path / "w.pt")
        with pytest.raises(RequestError) as raised:
            load(tmp_path / "w.pt")
        assert "weights_only" in str(raised.value) and "state_dict()" in str(raised.value)
    assert not ran.exists()


def test_differences_are_listed(net: torch.nn.Module, tmp_path: Path) -> None:
    state = net.state_dict()
    del state["conv1.weight"]
    state["surplus"] = torch.zeros(1)
    state["layer1.0.bn1.weight"] = torch.zeros(3)
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(RequestError) as raised:
        load(tmp_path / "w.pt")
    text = str(raised.value)
    assert "missing: conv1.weight" in text and "unexpected: surplus" in text
    assert "layer1.0.bn1.weight (file (3,), network (16,))" in text


def test_the_wrong_architecture_is_refused(net: torch.nn.Module, tmp_path: Path) -> None:
    torch.save(net.state_dict(), tmp_path / "w.pt")
    with pytest.raises(RequestError, match="does not fit 'cifar_resnet14'"):
        load(tmp_path / "w.pt", "cifar_resnet14")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_damaged_files_are_named(net: torch.nn.Module, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    if suffix == ".pt":
        torch.save(net.state_dict(), path)
    else:
        save_file(net.state_dict(), path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DataError, match="cannot be read"):
        load(path)


@pytest.mark.parametrize("content", [{"lr": 0.1}, [1, 2]])
def test_files_without_weights_are_refused(tmp_path: Path, content) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(RequestError, match="holds"):
        load(tmp_path / "w.pt")


def test_positions_of_another_size_are_resampled(tmp_path: Path) -> None:
    torch.save(timm.create_model("test_vit", img_size=64, num_classes=3).state_dict(), tmp_path / "w.pt")
    network = load(tmp_path / "w.pt", "test_vit", img_size=32)
    assert network.net.pos_embed.shape[1] == 5 and network.num_classes == 3
    assert network(torch.rand(1, 3, 32, 32)).logits.shape == (1, 3)


def test_the_prefix_that_fits_best_wins() -> None:
    wanted = {"a.weight": torch.zeros(1), "b.weight": torch.zeros(1)}
    tensors = {"module.model.a.weight": torch.ones(1), "module.model.b.weight": torch.ones(1), "x": torch.ones(1)}
    assert set(strip_prefixes(tensors, wanted)) == set(wanted)
