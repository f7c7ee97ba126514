"""Image-text encoders behind one face: our own and open_clip's."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from visionkd.config.schema import NetworkConfig
from visionkd.errors import DownloadError, RequestError
from visionkd.hub.package import save_package
from visionkd.models.factory import create_network
from visionkd.models.text_encoder import ImageTextHead, TextSpec, Tokenizer
from visionkd.teachers.encoders import TwoTowers, from_network, is_encoder, open_encoder, usual_templates

WORDS = Tokenizer.words(["a red circle", "a blue star"])


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    torch.manual_seed(0)
    wanted = NetworkConfig(
        name="vit_tiny_patch16_224", pretrained=False, img_size=32,
        args={"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2},
    )  # fmt: skip
    network = create_network(wanted, num_classes=0, in_training=True).eval()
    for parameter in network.net.parameters():
        nn.init.normal_(parameter, std=0.2)
    network.image_text = ImageTextHead(TextSpec(WORDS, dim=6, width=8, depth=1, heads=2), width=16).saved()
    directory = tmp_path_factory.mktemp("encoder") / "model"
    save_package(network, directory, task="classification", classes=None, metrics={}, origin={})
    return directory


@pytest.fixture(scope="module")
def encoder(package) -> TwoTowers:
    return open_encoder(str(package))


def rand(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def test_a_package_keeps_its_texts_and_a_training_from_it_does_not(package, encoder) -> None:
    card = json.loads((package / "model.json").read_text())
    assert card["text"]["words"] == list(WORDS) and set(card["sha256"]) == {"model.safetensors", "text.safetensors"}
    again = open_encoder(str(package))
    assert again.identity == encoder.identity and torch.equal(again.encode_text(["red"]), encoder.encode_text(["red"]))
    begun = create_network(NetworkConfig(name=str(package)), num_classes=3, in_training=True)
    assert begun.image_text is None


def test_images_crops_and_texts_lie_in_one_space(encoder) -> None:
    assert (encoder.dim, encoder.img_size, encoder.grid) == (6, (32, 32), (8, 8))
    crops = rand(3, 3, 32, 32)
    plain, whole = encoder.encode_crops(crops), encoder.encode_image(crops)
    texts = encoder.encode_text(["red circle", "blue_star"], ["a {}"])
    for found in (plain, whole, texts):
        assert torch.allclose(found.norm(dim=1), torch.ones(len(found))) and not found.requires_grad
    assert torch.allclose(plain, whole, atol=1e-5)  # stepping the blocks is running them
    assert encoder.encode_image(rand(1, 3, 40, 72)).shape == (1, 6)  # at its own size
    assert encoder.encode_crops(rand(2, 3, 50, 40)).shape == (2, 6) and encoder.encode_crops(crops[:0]).shape == (0, 6)


def test_masks_hide_what_is_no_object(encoder) -> None:
    crops, outside = rand(70, 3, 32, 32), torch.zeros(70, 8, 8, dtype=torch.bool)
    outside[:, :, 4:] = True
    masked = encoder.encode_crops(crops, outside)
    assert masked.shape == (70, 6)
    assert torch.allclose(
        masked[65:], encoder.encode_crops(crops[65:], outside[65:]), atol=1e-5
    )  # batches do not matter
    assert (masked - encoder.encode_crops(crops, torch.zeros_like(outside))).abs().max() > 1e-3
    with pytest.raises(ValueError, match="grid of"):
        encoder.encode_crops(crops, outside[:, :4])


def test_templates_are_averaged_and_not_normalised_again(encoder) -> None:
    one, other = encoder.encode_text(["red star"], ["a {}"]), encoder.encode_text(["red star"], ["{} circle"])
    both = encoder.encode_text(["red star"], ["a {}", "{} circle"])
    assert torch.allclose(both, (one + other) / 2) and both.norm() < 1
    with pytest.raises(RequestError, match="needs {}"):
        encoder.encode_text(["red star"], ["a"])
    with pytest.raises(RequestError, match="no class names"):
        encoder.encode_text([])
    with pytest.raises(RequestError, match="'green'"):
        encoder.encode_text(["red star", "green star"])


def test_another_encoder_has_another_identity(package, encoder) -> None:
    assert open_encoder(str(package), upsample=1).identity != encoder.identity
    network = create_network(NetworkConfig(name=str(package)), in_training=False)
    network.image_text.tensors["log_scale"].add_(0.1)
    assert from_network(network, name="x").identity != encoder.identity


def test_a_network_without_texts_is_refused(tmp_path) -> None:
    network = create_network(
        NetworkConfig(name="cifar_resnet8", pretrained=False), num_classes=2, in_training=True
    ).eval()
    save_package(network, tmp_path / "m", task="classification", classes=None, metrics={}, origin={})
    with pytest.raises(RequestError, match="no texts"):
        open_encoder(str(tmp_path / "m"))


# open_clip ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def open_clip(tmp_path):
    module = pytest.importorskip("open_clip")
    config = {
        "embed_dim": 12, "quick_gelu": True,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }  # fmt: skip
    (tmp_path / "ViT-tiny-test.json").write_text(json.dumps(config))
    module.add_model_config(tmp_path / "ViT-tiny-test.json")
    return module


def test_an_open_clip_file_gives_what_open_clip_gives(open_clip, tmp_path) -> None:
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-tiny-test", load_weights=False).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    encoder = open_encoder(f"open_clip:ViT-tiny-test@{tmp_path}/weights.pt")
    assert (encoder.dim, encoder.img_size, encoder.grid) == (12, (32, 32), (8, 8))
    images = rand(2, 3, 32, 32)
    mean, std = (torch.tensor(model.visual.preprocess_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        expected = model.encode_image((images - mean) / std, normalize=True)
        texts = model.encode_text(open_clip.get_tokenizer("ViT-tiny-test")(["a red circle"]), normalize=True)
    for found in (encoder.encode_image(images), encoder.encode_crops(images)):
        assert torch.allclose(found, expected, atol=1e-5)
    assert torch.allclose(encoder.encode_text(["red circle"], ["a {}"]), texts, atol=1e-6)
    assert encoder.encode_crops(images, torch.ones(2, 8, 8, dtype=torch.bool)).isfinite().all()


def test_what_open_clip_does_not_have_is_told(open_clip, tmp_path) -> None:
    for name, said in {
        "open_clip:ViT-B-33/openai": "ViT-B-32",
        "open_clip:ViT-B-32/nothing": "laion2b_s34b_b79k",
        "open_clip:ViT-B-32": "does not say which weights",
        f"open_clip:ViT-B-32@{tmp_path}/absent.pt": "is no file",
    }.items():
        with pytest.raises(RequestError, match=said):
            open_encoder(name)


def test_files_of_other_things_are_refused_and_never_unpickled(open_clip, tmp_path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pt")
    torch.save(nn.Linear(2, 2), tmp_path / "pickle.pt")
    for file in ("other.pt", "pickle.pt"):
        with pytest.raises(RequestError, match="does not hold the weights"):
            open_encoder(f"open_clip:ViT-tiny-test@{tmp_path}/{file}")


def test_weights_that_cannot_be_fetched_are_told(open_clip, monkeypatch) -> None:
    def unreachable(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr(open_clip, "create_model", unreachable)
    with pytest.raises(DownloadError, match="no route") as caught:
        open_encoder("open_clip:ViT-B-32-quickgelu/openai")
    assert "@FILE" in str(caught.value)


def test_names_of_encoders_are_known_without_loading_them(package, tmp_path) -> None:
    plain = create_network(NetworkConfig(name="cifar_resnet8", pretrained=False), num_classes=2, in_training=True)
    save_package(plain.eval(), tmp_path / "plain", task="classification", classes=None, metrics={}, origin={})
    known = {str(package): True, "open_clip:ViT-B-32/openai": True, str(tmp_path / "plain"): False, "resnet50": False,
             "no/such/thing": False}  # fmt: skip
    assert {name: is_encoder(name) for name in known} == known
    assert usual_templates(str(package)) == ("a {}",) and len(usual_templates("open_clip:ViT-B-32/openai")) > 1
    assert all("{}" in template for template in usual_templates("open_clip:x"))
