"""Weights that timm and torchvision fetch into caches of their own: where they lie, and whether they are the card's."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlsplit

from visionkd.config.schema import NetworkConfig
from visionkd.errors import DataError, DownloadError
from visionkd.files import sha256
from visionkd.hub.card import PublishedArtifact
from visionkd.models.factory import create_network

_FILES = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin")


def published_file(model: str) -> Path | None:
    """Return the file of published weights in the cache of timm or torchvision, None where it is not there.

    Args:
        model: ``timm/NAME.TAG`` or ``torchvision/NAME.TAG``.
    """
    library, _, name = model.partition("/")
    architecture, _, tag = name.partition(".")
    if library == "torchvision":
        from torchvision.models import get_model_weights

        return _in_torch_cache(get_model_weights(architecture)[tag].url)
    from timm.models import get_pretrained_cfg

    cfg = get_pretrained_cfg(name)
    if cfg.hf_hub_id:
        from huggingface_hub import try_to_load_from_cache

        repository, _, revision = cfg.hf_hub_id.partition("@")
        for file in (cfg.hf_hub_filename, *_FILES):
            found = try_to_load_from_cache(repository, file, revision=revision or None) if file else None
            if isinstance(found, str):
                return Path(found)
        return None
    return _in_torch_cache(cfg.url) if cfg.url else None


def fetch_published(artifact: PublishedArtifact, *, offline: bool, model: str) -> bool:
    """Have timm or torchvision fetch weights that are not in their cache; return whether that was needed.

    Raises:
        DownloadError: If they are not to be had.
        DataError: If they are others than the card says.
    """
    present = published_file(artifact.model) is not None
    if not present:
        if offline:
            raise DownloadError(
                f"the weights of zoo:{model} ({artifact.model}) are not in the cache, and downloads are switched off",
                hint=f"Run 'visionkd zoo pull {model}' once without --offline.",
            )
        create_network(NetworkConfig(name=artifact.model), in_training=False)
    check_published(artifact, model=model)
    return not present


def check_published(artifact: PublishedArtifact, *, model: str) -> None:
    """Compare the cached file with as much as the card says of its SHA-256.

    Raises:
        DataError: If it is missing or another one.
    """
    path = published_file(artifact.model)
    if path is None:
        raise DataError(f"the weights of zoo:{model} are not in the cache", hint=f"Run: visionkd zoo pull {model}")
    if artifact.sha256 is not None and not (found := sha256(path)).startswith(artifact.sha256):
        raise DataError(
            f"'{path}' is not what zoo:{model} says: its SHA-256 is {found}, and the card's begins with "
            f"{artifact.sha256}",
            hint="Remove that file and pull again.",
        )


def _in_torch_cache(url: str) -> Path | None:
    import torch

    path = Path(torch.hub.get_dir(), "checkpoints", os.path.basename(urlsplit(url).path))
    return path if path.is_file() else None
