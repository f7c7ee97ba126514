"""The model zoo in Python: ``visionkd.zoo.load("efficientnet_lite0")``. Importing this module loads nothing heavy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from visionkd.hub.card import Card
    from visionkd.models.network import Network
    from visionkd.runtime.session import Session
    from visionkd.types import Listener

__all__ = ["card", "load", "names", "path"]


def names() -> tuple[str, ...]:
    """Return the names of all models, sorted."""
    from visionkd.hub.index import card_files

    return tuple(card_files())


def card(name: str) -> Card:
    """Return the card of a model.

    Args:
        name: Name of the model, with or without ``zoo:``.

    Raises:
        RequestError: If there is no such model.
    """
    from visionkd.hub.index import find_card

    return find_card(name)


def path(name: str, *, offline: bool | None = None, listener: Listener | None = None) -> Path | None:
    """Pull a model unless it is here, and return its packaged directory or ONNX file.

    Args:
        name: ``NAME`` or ``NAME@ARTIFACT``, with or without ``zoo:``.
        offline: Take nothing from the network; None asks the environment.
        listener: Is told what happens.

    Returns:
        The path; None for weights that timm or torchvision keep in caches of their own.

    Raises:
        RequestError: If there is no such model.
        DownloadError: If it is not to be had.
    """
    from visionkd.hub.pull import pull

    return pull(name, offline=offline, listener=listener).path


def load(name: str, *, offline: bool | None = None, listener: Listener | None = None) -> Network | Session:
    """Return a model of the zoo, ready to use; it is pulled unless it is here.

    Args:
        name: ``NAME`` or ``NAME@ARTIFACT``, with or without ``zoo:``.
        offline: Take nothing from the network; None asks the environment.
        listener: Is told what happens.

    Returns:
        A ``Network`` in eval mode, which takes B x 3 x H x W images in [0, 1]; for an ONNX file, and where torch is not
        installed, a ``Session``.

    Raises:
        RequestError: If there is no such model.
        DownloadError: If it is not to be had.
        DataError: If its files are damaged.
    """
    from visionkd.hub.pull import pull

    pulled = pull(name, offline=offline, listener=listener)
    if pulled.path is not None and pulled.path.suffix == ".onnx":
        from visionkd.runtime.session import open_session

        return open_session(pulled.path)
    from visionkd.config.schema import NetworkConfig
    from visionkd.models.factory import create_network

    return create_network(NetworkConfig(name=pulled.model), in_training=False)
