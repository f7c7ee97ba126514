"""Weights that others published, made into a packaged model once, at the first pull."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from visionkd.config.schema import NetworkConfig
from visionkd.errors import DataError, RequestError, VisionKDError
from visionkd.hub.card import Card, CheckpointArtifact
from visionkd.hub.package import save_package
from visionkd.models.classes import imagenet_classes
from visionkd.models.factory import create_network
from visionkd.models.network import Network
from visionkd.models.weights import load_tensors, read_tensors


def package_checkpoint(card: Card, artifact: CheckpointArtifact, checkpoint: Path, directory: Path) -> Path:
    """Write the weights of ``checkpoint`` as a packaged model with the card's architecture, input and classes.

    Args:
        card: What the weights are of.
        artifact: How their keys are named.
        checkpoint: A verified weight file; it is read with ``weights_only``.
        directory: The package to write.

    Raises:
        DataError: If the weights do not fit the card.
    """
    try:
        network = _network(card)
        tensors, _ = read_tensors(checkpoint)
        if artifact.keys == "order":
            tensors = in_order(tensors, network.net.state_dict())
        load_tensors(network.net, tensors, path=checkpoint, architecture=card.architecture.name)
    except RequestError as error:  # the card's request, which is not the user's
        raise DataError(f"the weights of zoo:{card.name} do not fit its card: {error.message}") from error
    network.input = card.preprocessing.spec()
    file = artifact.files[0]
    return save_package(
        network,
        directory,
        task=card.task,
        classes=_classes(card),
        metrics={},
        origin={"zoo": card.name, "file": file.name, "file_sha256": file.sha256, "licence": card.licence},
    )


def in_order(tensors: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return ``tensors`` under the keys of ``wanted``, the first under the first.

    Raises:
        DataError: If their number or the shape of one differs.
    """
    if len(tensors) != len(wanted):
        raise DataError(f"{len(tensors)} tensors stand where the architecture has {len(wanted)}")
    renamed = {}
    for (found, tensor), (key, like) in zip(tensors.items(), wanted.items(), strict=True):
        if tensor.shape != like.shape:
            raise DataError(f"'{found}' has shape {tuple(tensor.shape)}, and '{key}' needs {tuple(like.shape)}")
        renamed[key] = tensor
    return renamed


def _network(card: Card) -> Network:
    architecture = card.architecture
    name = f"torchvision/{architecture.name}" if architecture.library == "torchvision" else architecture.name
    config = NetworkConfig(name=name, pretrained=False, args=architecture.args)
    try:
        return create_network(config, num_classes=card.num_classes, in_training=True).eval()
    except VisionKDError as error:
        raise DataError(f"zoo:{card.name} names an architecture that is not to be built: {error.message}") from error


def _classes(card: Card) -> tuple[str, ...] | None:
    return imagenet_classes(1000) if card.classes == "imagenet1k" else card.classes
