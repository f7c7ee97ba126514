"""Building plain networks: what a constructor objects to, and what cannot be fetched, becomes a message."""

from __future__ import annotations

from typing import Any

import timm
from torch import nn

import visionkd.models.cifar_resnet  # noqa: F401  (registers its networks with timm)
import visionkd.models.free_mobilenet  # noqa: F401  (the same)
from visionkd.config.schema import NetworkConfig
from visionkd.errors import RequestError, VisionKDError
from visionkd.models import torchvision_zoo
from visionkd.models.arguments import unknown_args
from visionkd.models.detection import nets as detectors
from visionkd.models.detection.names import is_detector
from visionkd.models.download import advice, hub_access, url_access
from visionkd.models.names import Resolved, quiet_libraries
from visionkd.models.segmentation import nets
from visionkd.models.segmentation.names import is_segmentation

HF_CACHE = ("HF_HOME=DIR", "use a Hugging Face cache that was filled on a connected machine")
TORCH_CACHE = ("TORCH_HOME=DIR", "use a torch cache that was filled on a connected machine")


def fetch_timm(name: str, cfg: Any, kwargs: dict[str, Any], config: NetworkConfig, in_training: bool) -> nn.Module:
    """Build a timm network with its published weights, from the cache alone where there is no network.

    Raises:
        DownloadError: If they cannot be had.
    """
    if cfg.hf_hub_id:
        page = f"https://huggingface.co/{cfg.hf_hub_id}"
        steps = advice(cfg.architecture, page=page, cache=HF_CACHE, untrained=in_training)
        with hub_access(config.name, cfg.hf_hub_id, advice=steps):
            return build_timm(name, kwargs, config, pretrained=True)
    steps = advice(cfg.architecture, page=cfg.url, cache=TORCH_CACHE, untrained=in_training)
    with url_access(config.name, cfg.url, advice=steps):
        return build_timm(name, kwargs, config, pretrained=True)


def build_timm(name: str, kwargs: dict[str, Any], config: NetworkConfig, *, pretrained: bool) -> nn.Module:
    """Build a timm network; see :func:`guarded`."""
    return guarded(config, lambda: timm.create_model(name, pretrained=pretrained, **kwargs))


def bare(library: str, architecture: str, kwargs: dict[str, Any]) -> nn.Module:
    """Build a network of a library with random weights."""
    if is_segmentation(library, architecture):
        return nets.rebuild(library, architecture, kwargs)
    if is_detector(library, architecture):
        return detectors.rebuild(library, architecture, kwargs)
    if library == "timm":
        return timm.create_model(architecture, **kwargs)
    return torchvision_zoo.build(architecture, {**torchvision_zoo.fixed_args(architecture, False), **kwargs})


def default_network(resolved: Resolved) -> nn.Module:
    """Build a network without arguments."""
    return bare(resolved.library, resolved.architecture, {})


def guarded(config: NetworkConfig, build: Any) -> Any:
    """Run ``build``; what a constructor objects to becomes a message about the request.

    Raises:
        RequestError: Names the arguments.
    """
    try:
        with quiet_libraries():
            return build()
    except (VisionKDError, OSError):
        raise
    except TypeError as error:
        if problems := unknown_args(config, default_network):
            raise RequestError(problems) from error
        raise RequestError(
            f"'{config.name}' does not take these arguments: {error}", hint=f"Given: args={config.args or '{}'}"
        ) from error
    except (RuntimeError, ValueError, AssertionError, KeyError) as error:
        if type(error).__module__.startswith(("huggingface_hub", "httpx", "requests")):
            raise  # hub_access words these
        first = (str(error).strip() or type(error).__name__).splitlines()
        size = f", img_size={config.img_size}" if config.img_size else ""
        raise RequestError(
            f"'{config.name}' cannot be built with args={config.args or '{}'}{size}: " + " ".join(first[:3])[:400],
            hint="Leave img_size and args out to take the network's own.",
        ) from error


def weights_or_none(config: NetworkConfig, published: bool, in_training: bool) -> tuple[bool, tuple[str, ...]]:
    """Decide whether published weights are loaded, and what to tell the user."""
    if not config.pretrained or published:
        return config.pretrained, ()
    if in_training:
        return False, (f"no weights are published for '{config.name}': it starts from random ones",)
    raise RequestError(
        f"no weights are published for '{config.name}', and an untrained network cannot be used as it is",
        hint=f"Train it first (visionkd train --model {config.name} --data DATA) and name its run directory.",
    )
