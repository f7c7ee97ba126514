"""Names of segmentation networks: torchvision's own, and ``HEAD_BACKBONE``."""

from __future__ import annotations

from visionkd.errors import RequestError, did_you_mean

#: What each head is, by name; the default one comes first.
HEADS = {
    "deeplabv3plus": "atrous pyramid, and a decoder that joins it with the map of stride 4",
    "fpn": "feature pyramid: the lightest, logits at stride 4",
    "deeplabv3": "atrous pyramid",
    "pspnet": "pyramid of pooled maps",
    "fcn": "one convolution",
}
DEFAULT_HEAD = next(iter(HEADS))
#: torchvision's networks, which have published weights.
TORCHVISION = (
    "fcn_resnet50",
    "fcn_resnet101",
    "deeplabv3_resnet50",
    "deeplabv3_resnet101",
    "deeplabv3_mobilenet_v3_large",
    "lraspp_mobilenet_v3_large",
)


def split_name(name: str) -> tuple[str, str] | None:
    """Return head and backbone of ``HEAD_BACKBONE``; None where the name does not begin with a head."""
    head, _, backbone = name.partition("_")
    return (head, backbone) if head in HEADS and backbone else None


def is_segmentation(source: str | None, architecture: str | None) -> bool:
    """Whether the network called ``architecture`` in a library answers with a map of classes."""
    if source == "visionkd":
        return split_name(architecture or "") is not None
    return source == "torchvision" and architecture in TORCHVISION


def unknown_part(name: str, known: tuple[str, ...]) -> RequestError | None:
    """Return what is wrong with a name that could be ``HEAD_BACKBONE``; None where it looks like no such thing.

    Args:
        name: What was asked for.
        known: Names of the classifiers.
    """
    name = name.removeprefix("visionkd/")
    parts = split_name(name)
    if parts is not None:
        head, backbone = parts
        near = did_you_mean(backbone.partition(".")[0], known)
        return RequestError(
            f"unknown network '{name}': '{head}' is a segmentation head, and there is no backbone '{backbone}'",
            hint=near or "Any timm network that gives feature maps is a backbone, for example mobilenetv3_large_100.",
        )
    head, _, backbone = name.partition("_")
    if backbone and backbone.partition(".")[0] in known and (near := did_you_mean(head, tuple(HEADS))):
        return RequestError(
            f"unknown network '{name}': there is no segmentation head '{head}'",
            hint=f"{near} The heads: {', '.join(sorted(HEADS))}",
        )
    return None
