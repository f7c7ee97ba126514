"""Transformers and settings small enough for tests of masked training."""

from __future__ import annotations

import torch

from visionkd.config.schema import DistillConfig, NetworkConfig
from visionkd.models.factory import create_network
from visionkd.models.masked import set_sincos_positions
from visionkd.models.masked_decoder import DecoderSpec, new_decoder
from visionkd.models.network import Network

#: A decoder of the student that costs nothing.
DECODER = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}


def tiny_vit(*, seed: int, img_size: int = 32, num_classes: int = 4, **args) -> Network:
    """A plain vision transformer on images of 32 pixels."""
    torch.manual_seed(seed)
    given = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, **args}
    config = NetworkConfig(name="vit_tiny_patch16_224", pretrained=False, img_size=img_size, args=given)
    return create_network(config, num_classes=num_classes, in_training=True)


def whole_autoencoder(*, seed: int, width: int = 24, depth: int = 4, **args) -> Network:
    """A masked autoencoder with its decoder, as a run of ``train --objective mae`` leaves it."""
    network = tiny_vit(seed=seed, num_classes=0, **args)
    set_sincos_positions(network.net)
    network.masked_decoder = new_decoder(network.net, DecoderSpec(width, depth, 2)).saved()
    return network.eval()


def tiny_config(method: str, *, teachers: int = 1, **changes) -> DistillConfig:
    """The settings that the contract takes."""
    return DistillConfig(
        student={"name": "vit_tiny_patch16_224"}, teachers=[{"name": "vit_tiny_patch16_224"}] * teachers, method=method,
        optimizer={"name": "adamw", "lr": 0.002, "weight_decay": 0.0},
        schedule={"name": "constant", "warmup_epochs": 0}, training={"seed": 1}, **changes,
    )  # fmt: skip
