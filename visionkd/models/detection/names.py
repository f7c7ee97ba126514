"""Names of detectors: torchvision's own, and ``DETECTOR_BACKBONE``."""

from __future__ import annotations

from visionkd.errors import RequestError, did_you_mean

#: What each detector is, by name; the default one comes first.
DETECTORS = {
    "fcos": "one stage, without anchors",
    "retinanet": "one stage, nine anchors in each place",
    "fasterrcnn": "two stages: proposals, and a head that looks at each of them",
}
DEFAULT_DETECTOR = next(iter(DETECTORS))
#: torchvision's networks, which have published weights.
TORCHVISION = (
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_resnet50_fpn_v2",
    "fasterrcnn_mobilenet_v3_large_fpn",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "retinanet_resnet50_fpn",
    "retinanet_resnet50_fpn_v2",
    "fcos_resnet50_fpn",
    "ssdlite320_mobilenet_v3_large",
)


def split_name(name: str) -> tuple[str, str] | None:
    """Return detector and backbone of ``DETECTOR_BACKBONE``; None where the name does not begin with a detector."""
    detector, _, backbone = name.partition("_")
    return (detector, backbone) if detector in DETECTORS and backbone else None


def is_detector(source: str | None, architecture: str | None) -> bool:
    """Whether the network called ``architecture`` in a library answers with boxes."""
    if source == "visionkd":
        return split_name(architecture or "") is not None
    return source == "torchvision" and architecture in TORCHVISION


def unknown_part(name: str, known: tuple[str, ...]) -> RequestError | None:
    """Return what is wrong with a name that could be ``DETECTOR_BACKBONE``; None where it looks like no such thing.

    Args:
        name: What was asked for.
        known: Names of the classifiers.
    """
    parts = split_name(name.removeprefix("visionkd/"))
    if parts is None:
        return None
    detector, backbone = parts
    near = did_you_mean(name, TORCHVISION) or did_you_mean(backbone.partition(".")[0], known)
    return RequestError(
        f"unknown network '{name}': '{detector}' is a detector, and there is no backbone '{backbone}'",
        hint=near or "Any timm network that gives feature maps is a backbone, for example mobilenetv3_large_100.",
    )
