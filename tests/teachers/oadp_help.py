"""An image-text encoder small enough for tests, and scenes for it to look at."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from visionkd.config.schema import NetworkConfig
from visionkd.data.shapes import COMBINATIONS
from visionkd.hub.package import save_package
from visionkd.models.factory import create_network
from visionkd.models.text_encoder import ImageTextHead, TextSpec, Tokenizer

WORDS = Tokenizer.words(["a", *COMBINATIONS])
DIM = 6


def write_encoder(directory: Path, *, seed: int = 0, name: str = "vit_tiny_patch16_224", img_size: int = 32) -> Path:
    """Write the package of an encoder with random weights that knows the words of ``shapes``."""
    torch.manual_seed(seed)
    args = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2} if name.startswith("vit") else {}
    wanted = NetworkConfig(name=name, pretrained=False, img_size=img_size, args=args)
    network = create_network(wanted, num_classes=0, in_training=True).eval()
    for parameter in network.net.parameters():
        nn.init.normal_(parameter, std=0.2)
    spec = TextSpec(WORDS, dim=DIM, width=8, depth=1, heads=2)
    network.image_text = ImageTextHead(spec, width=network.embedding_dim).saved()
    save_package(network, directory, task="classification", classes=None, metrics={}, origin={})
    return directory
