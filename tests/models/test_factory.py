from __future__ import annotations

import time
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from visionkd.config.schema import NetworkConfig
from visionkd.errors import DownloadError, RequestError
from visionkd.models import download
from visionkd.models.factory import create_network

TINY = {"pretrained": False, "img_size": 32}


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No hub can be reached, and the caches are empty; returns the hub's cache."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(cache), raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr(download, "reachable", lambda url: False)
    return cache


def cache_weights(cache: Path, repository: str, tensors: dict[str, torch.Tensor]) -> None:
    commit = "0" * 40
    root = cache / f"models--{repository.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    (root / "snapshots" / commit).mkdir(parents=True)
    save_file(tensors, root / "snapshots" / commit / "model.safetensors")


@pytest.mark.parametrize("name", ["test_resnet", "torchvision/squeezenet1_1"])
def test_without_a_network_the_message_says_what_to_do_within_seconds(
    name: str, offline: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    start = time.perf_counter()
    with pytest.raises(DownloadError) as raised:
        create_network(NetworkConfig(name=name), in_training=True)
    assert time.perf_counter() - start < 4.0
    text = str(raised.value)
    rows = text[text.index("Choose one:") :].splitlines()[1:]
    assert len({len(row) - len(row[2:].partition("  ")[2].lstrip()) for row in rows}) == 1, "the columns are aligned"
    with pytest.raises(DownloadError) as untrained:
        create_network(NetworkConfig(name=name), in_training=False)
    assert "--no-pretrained" not in str(untrained.value), "eval, export and --baseline have no such option"
    assert "cannot be reached" in text and "--no-pretrained" in text and f"{name}@FILE" in text
    assert "HOME=" in text and raised.value.exit_code == 1
    assert capfd.readouterr() == ("", ""), "one message, and no retries printed beside it"


def test_cached_weights_are_used_without_a_network(offline: Path) -> None:
    torch.manual_seed(0)
    published = timm.create_model("test_resnet")
    cache_weights(offline, "timm/test_resnet.r160_in1k", published.state_dict())
    network = create_network(NetworkConfig(name="test_resnet"), in_training=False)
    assert torch.equal(network.net.fc.weight, published.fc.weight)
    assert network.pretrained_tag == "r160_in1k" and not network.training
    assert network.classes is not None and network.classes[0] == "n01440764"
    smaller = create_network(NetworkConfig(name="test_resnet"), classes=("cat", "dog"), in_training=True)
    assert torch.equal(smaller.net.conv1[0].weight, published.conv1[0].weight)
    assert smaller.num_classes == 2 and smaller.classes == ("cat", "dog") and smaller.training
    assert smaller.net.fc.weight.shape[0] == 2


def test_cached_torchvision_weights_are_used_without_a_network(offline: Path, tmp_path: Path) -> None:
    import torchvision

    published = torchvision.models.squeezenet1_1()
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(published.state_dict(), folder / "squeezenet1_1-b8a52dc0.pth")
    network = create_network(NetworkConfig(name="torchvision/squeezenet1_1"), num_classes=3, in_training=True)
    assert torch.equal(network.net.features[0].weight, published.features[0].weight)
    assert network(torch.rand(1, 3, 64, 64)).logits.shape == (1, 3)


def test_a_network_without_published_weights_is_trained_from_scratch_but_not_used_as_it_is(offline: Path) -> None:
    student = create_network(NetworkConfig(name="cifar_resnet8"), in_training=True)
    assert "no weights are published" in student.notes[0] and student.pretrained_tag is None
    with pytest.raises(RequestError, match="visionkd train --model cifar_resnet8"):
        create_network(NetworkConfig(name="cifar_resnet8"), in_training=False)


def test_each_network_brings_its_own_size_and_statistics() -> None:
    vit = create_network(NetworkConfig(name="test_vit", pretrained=False), in_training=False)
    small = create_network(NetworkConfig(name="cifar_resnet8", pretrained=False), in_training=False)
    tv = create_network(NetworkConfig(name="torchvision/swin_t", pretrained=False), num_classes=2, in_training=False)
    assert (vit.input.img_size, vit.input.mean, vit.input.crop_pct) == ((160, 160), (0.5,) * 3, 0.95)
    assert (small.input.img_size, small.input.crop_pct) == ((32, 32), 1.0)
    assert (tv.input.img_size, tv.input.interpolation) == ((224, 224), "bicubic")
    assert tv.input.crop_pct == pytest.approx(224 / 232)
    assert (vit.family, small.family, tv.family) == ("transformer", "cnn", "transformer")


def test_img_size_reaches_the_positions_of_a_transformer() -> None:
    network = create_network(NetworkConfig(name="test_vit", **TINY), num_classes=4, in_training=False)
    assert network.net.pos_embed.shape[1] == 2 * 2 + 1 and network.input.img_size == (32, 32)
    assert network.model_args == {"num_classes": 4, "img_size": 32}
    rebuilt = timm.create_model(network.architecture, **network.model_args)
    rebuilt.load_state_dict(network.net.state_dict())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"name": "test_vit", "img_size": 65}, ["test_vit", "65", "patch size"]),
        ({"name": "test_resnet", "args": {"wrong": 1}}, ["args.wrong: 'test_resnet' has no such argument", "It has: "]),
        ({"name": "cifar_resnet8", "args": {"widht": 2, "hieght": 3}}, ["args.widht", "'width'", "args.hieght"]),
        ({"name": "test_vit", "args": {"drop_path_rat": 0.1}}, ["Did you mean 'drop_path_rate'"]),
        ({"name": "torchvision/squeezenet1_1", "args": {"drop": 0.1}}, ["args.drop", "'dropout'"]),
        ({"name": "test_resnet", "args": {"num_classes": 3}}, ["num_classes", "the data decides"]),
        ({"name": "test_resnet", "args": {"in_chans": 1}}, ["in_chans=1", "RGB"]),
    ],
)
def test_wrong_arguments_are_named(config: dict, words: list[str]) -> None:
    with pytest.raises(RequestError) as raised:
        create_network(NetworkConfig(pretrained=False, **config), in_training=True)
    assert all(word in str(raised.value) for word in words), str(raised.value)


def test_construction_follows_the_seed_alone() -> None:
    weights = []
    for _ in range(2):
        torch.manual_seed(7)
        network = create_network(NetworkConfig(name="test_resnet", **TINY), num_classes=3, in_training=True)
        weights.append(network.net.fc.weight)
    assert torch.equal(*weights)
