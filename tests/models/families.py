"""One tiny network of each family, for tests that go over all of them."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.mlp_mixer import MlpMixer
from torch import nn

from visionkd.config.schema import NetworkConfig
from visionkd.models.factory import create_network
from visionkd.models.network import Network
from visionkd.types import InputSpec

_VIT = {"patch_size": 8, "embed_dim": 16, "depth": 5, "num_heads": 2}
_SWIN = {"patch_size": 2, "window_size": 4, "embed_dim": 8, "depths": (1, 2, 1), "num_heads": (1, 2, 4)}
_CONFIGURED: dict[str, tuple[str, dict[str, Any]]] = {
    "cnn": ("cifar_resnet8", {}),
    "resnet": ("test_resnet", {}),
    "convnext": ("test_convnext", {}),
    "mobilenet": ("test_efficientnet", {}),
    "vit": ("vit_tiny_patch16_224", _VIT),
    "vit_no_class_token": ("vit_tiny_patch16_224", {**_VIT, "class_token": False, "global_pool": "avg"}),
    "deit_distilled": ("deit_tiny_distilled_patch16_224", _VIT),
    "swin": ("swin_tiny_patch4_window7_224", _SWIN),
    "pit": (
        "pit_ti_224",
        {"patch_size": 4, "stride": 4, "base_dims": (8, 8, 8), "depth": (1, 1, 1), "heads": (1, 2, 4)},
    ),
    "torchvision": ("torchvision/shufflenet_v2_x0_5", {}),
}
FAMILIES = (*_CONFIGURED, "mixer")


def tiny_family(kind: str, *, seed: int = 0, num_classes: int = 4, **more: Any) -> Network:
    """Return the tiny network of a family, in train mode and for images of 32 pixels (64 for torchvision's)."""
    torch.manual_seed(seed)
    if kind == "mixer":  # timm's names fix their sizes
        args = {"patch_size": 8, "num_blocks": 5, "embed_dim": 16, **more}
        return bare(MlpMixer(img_size=32, num_classes=num_classes, **args), (32, 32), num_classes).train()
    name, args = _CONFIGURED[kind]
    size = 64 if kind == "torchvision" else 32
    config = NetworkConfig(name=name, pretrained=False, img_size=size, args={**args, **more})
    return create_network(config, num_classes=num_classes, in_training=True)


def bare(net: nn.Module, img_size: tuple[int, int] = (16, 16), num_classes: int = 4) -> Network:
    """Return a network around any module."""
    spec = InputSpec(img_size=img_size)
    return Network(net, architecture="bare", source="timm", input=spec, model_args={"num_classes": num_classes})
