"""The further arguments of a network's constructor, ``args`` in a configuration."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import timm
import torch
from torch import nn
from torchvision.models import get_model_builder

from visionkd.config.schema import NetworkConfig
from visionkd.errors import Problem, did_you_mean
from visionkd.models.names import Resolved, quiet_libraries, resolve_name

_OWN = {
    "num_classes": "the data decides it",
    "pretrained": "use --no-pretrained",
    "img_size": "use img_size beside args",
}
# What timm takes out of the arguments before a constructor sees them.
_TIMM = frozenset({"checkpoint_path", "feature_cfg", "output_stride", "pretrained_cfg", "scriptable"})


def misplaced_args(config: NetworkConfig, *, dense: bool) -> list[Problem]:
    """Return what is set in the wrong place, or for a network that has no use for it.

    Args:
        config: The network.
        dense: Whether it names pixels or finds boxes.
    """
    found = [
        Problem(f"args.{name}", f"is not for the arguments of '{config.name}': {reason}")
        for name, reason in _OWN.items()
        if name in config.args
    ]
    if dense:
        return found
    if config.args.get("in_chans", 3) != 3:
        message = f"'{config.name}': in_chans={config.args['in_chans']} is not supported; images are RGB, in_chans 3"
        found.append(Problem("args.in_chans", message))
    if isinstance(config.img_size, tuple):
        message = f"'{config.name}' takes square images, and img_size={list(config.img_size)} is not one number"
        found.append(Problem("img_size", message, "Only networks for pixels or boxes take height and width."))
    return found


def unknown_args(config: NetworkConfig, build: Callable[[Resolved], nn.Module]) -> list[Problem]:
    """Return the arguments that a network's constructor does not have; nothing where that cannot be told.

    Args:
        config: The network that could not be built.
        build: Builds it without arguments; called where nothing is allocated.
    """
    try:
        resolved = resolve_name(config.name)
        timm_entry = resolved.library == "timm"
        entry = timm.model_entrypoint(resolved.architecture) if timm_entry else get_model_builder(resolved.architecture)
        with quiet_libraries(), torch.device("meta"):  # the class is that of what the entry function makes
            kind = type(build(resolved))
    except Exception:  # this only words a mistake better: what goes wrong here is not the user's matter
        return []
    taken = {
        name
        for signature in (inspect.signature(entry), inspect.signature(kind.__init__))
        for name, parameter in signature.parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    known = sorted(taken - {"self", "in_chans", "weights", "progress", *_OWN})
    return [
        Problem(
            f"args.{name}",
            f"'{config.name}' has no such argument (given: {value!r})",
            did_you_mean(name, known) or f"It has: {', '.join(known)}",
        )
        for name, value in config.args.items()
        if name not in taken | _TIMM
    ]
