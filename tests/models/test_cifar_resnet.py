from __future__ import annotations

import pytest
import timm
import torch

from visionkd.models.cifar_resnet import DEPTHS, CifarResNet


@pytest.mark.parametrize(("depth", "params_m"), [(20, 0.27), (32, 0.46), (56, 0.85), (110, 1.7)])
def test_the_sizes_are_the_papers(depth: int, params_m: float) -> None:
    """Table 6 of He et al., whose shortcuts have no parameters."""
    with torch.device("meta"):
        net = timm.create_model(f"cifar_resnet{depth}", shortcut="pad")
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(params_m, abs=0.031)
    layers = [m for m in net.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    assert len(layers) == depth


def test_stages_may_have_blocks_and_channels_of_their_own() -> None:
    net = timm.create_model("cifar_resnet", blocks=[1, 2, 3], channels=[8, 12, 20], width=2.0, drop_path_rate=0.1)
    assert [len(layer) for layer in (net.layer1, net.layer2, net.layer3)] == [1, 2, 3]
    assert [info["num_chs"] for info in net.feature_info] == [16, 16, 24, 40]
    plain, free = timm.create_model("cifar_resnet20"), timm.create_model("cifar_resnet", blocks=(3, 3, 3))
    assert {k: v.shape for k, v in plain.state_dict().items()} == {k: v.shape for k, v in free.state_dict().items()}


def test_all_depths_are_registered() -> None:
    assert all(timm.is_model(f"cifar_resnet{depth}") for depth in DEPTHS)


@pytest.mark.parametrize("shortcut", ["conv", "pad"])
@torch.no_grad()
def test_timms_interface(shortcut: str) -> None:
    net = timm.create_model("cifar_resnet8", shortcut=shortcut, width=2.0, num_classes=4).eval()
    image = torch.rand(2, 3, 32, 32)
    features = net.forward_features(image)
    assert features.shape == (2, 128, 8, 8) == (2, net.num_features, 8, 8)
    torch.testing.assert_close(net(image), net.forward_head(features))
    torch.testing.assert_close(net(image), net.get_classifier()(net.forward_head(features, pre_logits=True)))
    final, maps = net.forward_intermediates(image, indices=[0, 2])
    assert torch.equal(final, features) and [tuple(m.shape[1:]) for m in maps] == [(32, 32, 32), (64, 16, 16)]
    assert torch.equal(net.forward_intermediates(image, indices=1, intermediates_only=True)[0], features)
    net.reset_classifier(9)
    assert net(image).shape == (2, 9) and net.num_classes == 9
    pyramid = timm.create_model("cifar_resnet8", features_only=True, out_indices=(1, 2, 3))
    assert [m.shape[1] for m in pyramid(image)] == pyramid.feature_info.channels() == [16, 32, 64]


def test_the_padded_shortcut_passes_pixels_on() -> None:
    block = timm.create_model("cifar_resnet8", shortcut="pad").layer2[0].downsample
    image = torch.rand(1, 16, 4, 4)
    result = block(image)
    assert torch.equal(result[:, 8:24], image[:, :, ::2, ::2]) and result[:, :8].abs().sum() == 0


@pytest.mark.parametrize(
    "kwargs",
    [
        {"depth": 21},
        {"depth": 2},
        {"depth": 8, "shortcut": "none"},
        {"depth": 8, "blocks": (1, 1, 1)},
        {"blocks": (1, 1)},
        {"blocks": (1, 1, 0)},
        {"blocks": (1, 1, 1.5)},
        {"channels": (16, 32)},
        {"channels": (16, 32, 0)},
    ],
)
def test_wrong_arguments(kwargs: dict) -> None:
    with pytest.raises(ValueError):
        CifarResNet(**kwargs)
