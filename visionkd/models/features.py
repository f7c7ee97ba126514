"""Intermediate maps: which stages a network has, and how to get their outputs together with the logits."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from visionkd.errors import RequestError
from visionkd.models.network import Network
from visionkd.types import Output


@dataclass(frozen=True)
class Stage:
    """One place to take features from.

    Attributes:
        index: Position, from the shallowest.
        name: Dotted name of the module in the bare network.
        channels: Channels of its map.
        stride: Pixels of the image for one step in the map.
    """

    index: int
    name: str
    channels: int
    stride: int


def stages(network: Network) -> tuple[Stage, ...]:
    """Return the stages of ``network`` from timm's feature info, or from the maps it shows where there is none."""
    info = getattr(network.net, "feature_info", None)
    if info and hasattr(network.net, "forward_intermediates"):
        items = info if isinstance(info, list) else info.get_dicts()
        return tuple(
            Stage(index, item["module"], int(item["num_chs"]), int(item["reduction"]))
            for index, item in enumerate(items)
        )
    return _observed_stages(network)


def extract(network: Network, image: Tensor, indices: Sequence[int] | None = None) -> Output:
    """Run ``network`` and return logits, maps and, for a transformer, tokens.

    Args:
        network: Any network.
        image: B x 3 x H x W in [0, 1].
        indices: Stages wanted, negative ones counted from the deepest; None takes all.

    Returns:
        ``logits`` B x C; ``features``, one B x channels x H/stride x W/stride map for each index, in the order of
        ``indices``; ``tokens`` B x N x D where the network ends in tokens.

    Raises:
        RequestError: If the network has no such stage.
    """
    known = stages(network)
    wanted = list(range(len(known))) if indices is None else list(indices)
    outside = [index for index in wanted if not -len(known) <= index < len(known)]
    if outside:
        raise RequestError(
            f"'{network.architecture}' has no stage {outside[0]}",
            hint="Its stages: " + ", ".join(f"{stage.index} ({stage.name})" for stage in known),
        )
    wanted = [index % len(known) for index in wanted]
    image = network.prepare(image)
    net: Any = network.net
    if hasattr(net, "forward_intermediates") and getattr(net, "feature_info", None):
        order = sorted(set(wanted))  # timm returns maps from shallow to deep, whatever the order asked for
        final, maps = net.forward_intermediates(image, indices=order, output_fmt="NCHW")
        found = dict(zip(order, maps, strict=True))
        tokens = final if final.ndim == 3 else None
        return Output(net.forward_head(final), tuple(found[index] for index in wanted), tokens)
    seen, logits = _run_with_hooks(net, [known[index].name for index in wanted], image)
    return Output(logits, tuple(seen[known[index].name] for index in wanted))


def _observed_stages(network: Network) -> tuple[Stage, ...]:
    """Take the last module with a map of each resolution as a stage, by a run on the meta device."""
    net = copy.deepcopy(network.net).to("meta").eval()
    height, width = network.input.img_size
    seen: list[tuple[str, torch.Size]] = []
    handles = []
    for name, module in net.named_modules():
        if name:
            handles.append(module.register_forward_hook(_recorder(seen, name)))
    with torch.no_grad():
        net(torch.empty(1, 3, height, width, device="meta"))
    last: dict[int, tuple[str, int]] = {}
    for name, shape in seen:
        if len(shape) == 4 and shape[2] > 1 and height // shape[2] == width // shape[3]:
            last[height // shape[2]] = (name, shape[1])
    if not last:
        raise RequestError(
            f"'{network.architecture}' shows no feature maps",
            hint="Choose a method that needs none, or another network.",
        )
    return tuple(
        Stage(index, name, channels, stride) for index, (stride, (name, channels)) in enumerate(sorted(last.items()))
    )


def _recorder(seen: list[tuple[str, torch.Size]], name: str) -> Any:
    def record(_: nn.Module, __: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            seen.append((name, output.shape))

    return record


def _run_with_hooks(net: nn.Module, names: Sequence[str], image: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    seen: dict[str, Tensor] = {}

    def keeper(name: str) -> Any:
        def keep(_: nn.Module, __: Any, output: Tensor) -> None:
            # A clone, because the activation behind it may work in place.
            seen[name] = output.clone()

        return keep

    handles = [net.get_submodule(name).register_forward_hook(keeper(name)) for name in dict.fromkeys(names)]
    try:
        output = net(image)
    finally:
        for handle in handles:
            handle.remove()
    return seen, output[0] if isinstance(output, tuple) else output
