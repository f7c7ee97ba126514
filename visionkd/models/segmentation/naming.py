"""What the name of a classifier stands for where pixels or boxes are asked for: the default head on it."""

from __future__ import annotations

from visionkd.config.schema import NetworkConfig
from visionkd.models.detection.names import DEFAULT_DETECTOR
from visionkd.models.names import Resolved, fetched, resolve_name
from visionkd.models.package_file import read_card
from visionkd.models.segmentation.names import DEFAULT_HEAD
from visionkd.types import TaskName


def for_task(config: NetworkConfig, task: TaskName) -> tuple[NetworkConfig, str | None]:
    """Return the network that ``config`` names, with a head for pixels or boxes where the task asks for one.

    A trained classifier (package or weights file) becomes the weights that the backbone begins with.

    Args:
        config: The network as named.
        task: Task of the data.

    Returns:
        The configuration, and what was chosen, to be said aloud; None where nothing was.

    Raises:
        RequestError: If its name is unknown.
    """
    if task == "classification":
        return config, None
    architecture, tag, trained = _classifier(resolve_name(config.name))
    if architecture is None:
        return config, None
    head, what = (DEFAULT_HEAD, "segmentation head") if task == "segmentation" else (DEFAULT_DETECTOR, "detector")
    name = f"{head}_{architecture}" + (f".{tag}" if tag else "")
    backbone = config.name if trained and config.backbone is None else config.backbone
    note = f"'{config.name}' names whole images: '{name}' puts a {what} on it"
    return config.model_copy(update={"name": name, "backbone": backbone}), note


def _classifier(resolved: Resolved) -> tuple[str | None, str | None, bool]:
    """Return architecture, tag and whether it is trained, of a classifier of timm; nothing of other networks."""
    if resolved.source == "package":
        card = read_card(fetched(resolved))
        fits = card["source"] == "timm" and card.get("quantization") is None
        return (card["architecture"], None, True) if fits else (None, None, False)
    if resolved.library != "timm" or ":" in str(resolved.architecture):
        return None, None, False
    return resolved.architecture, resolved.tag, resolved.source == "file"
