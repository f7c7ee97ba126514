"""torchvision's classifiers: their records of weights, and the arguments that some of them need."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torchvision.models import get_model_builder, get_model_weights

from visionkd.errors import RequestError
from visionkd.types import InputSpec


def weights(architecture: str, tag: str | None) -> Any:
    """Return the weight record called ``tag``, or the default one; None where none are published."""
    known = get_model_weights(architecture)
    if tag is not None:
        return known[tag]
    try:
        return known.DEFAULT
    except AttributeError:
        return None


def build(architecture: str, kwargs: Mapping[str, Any]) -> nn.Module:
    """Build a network with random weights."""
    return get_model_builder(architecture)(weights=None, **kwargs)


def fixed_args(architecture: str, pretrained: bool) -> dict[str, Any]:
    """Return what the Inception networks need to answer with logits alone and to start quickly.

    Their published weights expect images in other statistics, which ``transform_input`` converts to.
    """
    if architecture in ("inception_v3", "googlenet"):
        return {"aux_logits": False, "transform_input": pretrained, "init_weights": False}
    return {}


def fixed_size(architecture: str) -> bool:
    """Tell whether the network is built for one input size."""
    return architecture.startswith(("vit_", "maxvit"))


def input_spec(record: Any) -> InputSpec:
    """Return size and statistics as the weight record's evaluation transform states them."""
    if record is None:
        return InputSpec()
    preset = record.transforms()
    crop, resize = preset.crop_size[0], preset.resize_size[0]
    return InputSpec(
        img_size=(crop, crop),
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        interpolation=preset.interpolation.value,
        crop_pct=crop / resize,
    )


def is_auxiliary(key: str) -> bool:
    """Tell whether a key of a state dict belongs to an auxiliary head, which only helps training."""
    return key.startswith(("AuxLogits.", "aux1.", "aux2."))


def load(net: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load published weights, past the auxiliary heads that ``net`` was built without."""
    extra = [key for key in state if key not in net.state_dict()]
    if any(not is_auxiliary(key) for key in extra):
        raise RequestError(f"the published weights do not fit: {', '.join(extra[:6])} are unexpected")
    net.load_state_dict({key: value for key, value in state.items() if key not in extra})
