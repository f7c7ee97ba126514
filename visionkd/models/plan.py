"""Look at a network once: which of its modules give a map, and how each output becomes one.

timm says which modules end a stage. One pass over the network in eval mode shows what these modules really give (maps,
channels last, tokens with a class token in front), and stands in where timm says nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from visionkd.errors import RequestError
from visionkd.models.modes import evaluating
from visionkd.models.network import Network, main_logits

Layout = Literal["map", "tokens"]


@dataclass(frozen=True)
class Stage:
    """One place to take features from.

    Attributes:
        index: Position, from the shallowest.
        name: Dotted name of the module in the bare network.
        channels: Channels of its map.
        stride: Pixels of the image for one step in the map.
        grid: Height and width of the map at the network's own input size.
        layout: ``tokens`` where the network itself works on tokens or with channels last, ``map`` elsewhere.
    """

    index: int
    name: str
    channels: int
    stride: int
    grid: tuple[int, int]
    layout: Layout


@dataclass(frozen=True)
class Tap:
    """How the output of a module becomes a map.

    Attributes:
        name: Dotted name of the module.
        kind: Order of the axes: ``NCHW``, ``NHWC``, or ``NLC`` for tokens.
        channels: Width.
        grid: Height and width of the map.
        prefix: Tokens in front of those of the map.
        overwritten: A later layer works in place on this output, so it must be copied to be kept.
    """

    name: str
    kind: Literal["NCHW", "NHWC", "NLC"]
    channels: int
    grid: tuple[int, int]
    prefix: int = 0
    overwritten: bool = False


@dataclass(frozen=True)
class Plan:
    """What extraction does in every step.

    Attributes:
        stages: All stages, from the shallowest.
        taps: One for each stage; empty where timm's own ``forward_intermediates`` gives the maps.
        tokens: Name of the module that gives the final tokens, if any.
        img_size: Input size that the plan was made for.
    """

    stages: tuple[Stage, ...]
    taps: tuple[Tap, ...]
    tokens: str | None
    img_size: tuple[int, int]


@dataclass(frozen=True)
class _Seen:
    """What a module gave in the pass that looks at all of them."""

    module: nn.Module
    output: Tensor
    version: int

    @property
    def overwritten(self) -> bool:
        return self.output._version != self.version


@torch.no_grad()
def make_plan(network: Network) -> Plan:
    """Run ``network`` on an image that is always the same, and leave it as it was.

    Raises:
        RequestError: If it shows no feature maps.
    """
    net: Any = network.net
    size = (int(network.input.img_size[0]), int(network.input.img_size[1]))
    parameter = next(net.parameters())
    # nothing random: the generators must not be left in another state by the first call than by the next ones
    planes = network.in_chans
    image = torch.linspace(-2.0, 2.0, 2 * planes * size[0] * size[1], device=parameter.device).to(parameter.dtype)
    image = image.view(2, planes, *size)
    with evaluating(net):
        logits, seen = _look(net, image)
        info = _feature_info(net)
        final, maps = _intermediates(net, image) if info else (None, ())
        taps = _named_taps(net, info, seen, size)
        if maps and not _agree(taps, seen, maps):
            # blocks that give tuples, or tokens in an order of their own: timm puts them right
            if _all_same([net.forward_head(final)], [logits]):
                return _timm_plan(network, info, maps, size)
    if not info:
        taps = _observed_taps(network, seen, size)
    if not taps:
        raise RequestError(
            f"'{network.architecture}' shows no feature maps",
            hint="Choose a method that needs none, or another network.",
        )
    tokens = None
    last = None if final is None else _module_giving(final, seen)
    if last is not None and final.ndim == 3:
        tokens = last
    elif last is not None and final.ndim == 4 and taps[-1].kind == "NCHW" and final.shape[1] != taps[-1].channels:
        taps[-1] = Tap(last, "NCHW", final.shape[1], (final.shape[2], final.shape[3]))
    found = tuple(
        Stage(index, tap.name, tap.channels, _stride(tap.grid, size), tap.grid, _layout(network, tap))
        for index, tap in enumerate(taps)
    )
    return Plan(found, tuple(taps), tokens, size)


def _timm_plan(network: Network, info: Sequence[dict[str, Any]], maps: Sequence[Tensor], size: tuple[int, int]) -> Plan:
    layout: Layout = "tokens" if network.family in ("transformer", "mlp") else "map"
    grids = [(each.shape[2], each.shape[3]) for each in maps]
    found = tuple(
        Stage(index, str(item["module"]), each.shape[1], _stride(grid, size), grid, layout)
        for index, (item, each, grid) in enumerate(zip(info, maps, grids, strict=True))
    )
    return Plan(found, (), None, size)


def _layout(network: Network, tap: Tap) -> Layout:
    return "map" if tap.kind == "NCHW" or network.family == "cnn" else "tokens"


def _stride(grid: tuple[int, int], size: tuple[int, int]) -> int:
    return max(1, round(size[0] / grid[0]))


def _feature_info(net: Any) -> list[dict[str, Any]]:
    info = getattr(net, "feature_info", None)
    if not info:
        return []
    return list(info) if isinstance(info, list) else info.get_dicts()


def _look(net: nn.Module, image: Tensor) -> tuple[Tensor, dict[str, _Seen]]:
    """Run ``net`` and return its logits and what each module gave last, in the order of their ends."""
    seen: dict[str, _Seen] = {}

    def recorder(name: str) -> Any:
        def record(module: nn.Module, _: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim in (3, 4) and output.shape[0] == len(image):
                seen.pop(name, None)
                seen[name] = _Seen(module, output, output._version)

        return record

    handles = [module.register_forward_hook(recorder(name)) for name, module in net.named_modules() if name]
    try:
        output = net(image)
    finally:
        for handle in handles:
            handle.remove()
    return main_logits(output), seen


def _intermediates(net: Any, image: Tensor) -> tuple[Tensor | None, Sequence[Tensor]]:
    """Return the final output before the head and all maps as timm gives them; nothing where it gives none."""
    if not hasattr(net, "forward_intermediates"):
        return None, ()
    try:
        final, maps = net.forward_intermediates(image, output_fmt="NCHW")
    except Exception:  # what a network cannot do here says nothing about the network
        return None, ()
    usable = isinstance(final, Tensor) and all(isinstance(each, Tensor) and each.ndim == 4 for each in maps)
    return (final, maps) if usable else (None, ())


def _named_taps(net: Any, info: Sequence[dict[str, Any]], seen: dict[str, _Seen], size: tuple[int, int]) -> list[Tap]:
    """Return how to take the modules that timm names; empty unless all of them can be taken."""
    prefix = getattr(net, "num_prefix_tokens", None)
    taps = [_tap(str(item["module"]), int(item["num_chs"]), seen, size, prefix) for item in info]
    return [tap for tap in taps if tap is not None] if all(taps) else []


def _tap(
    name: str, channels: int | None, seen: dict[str, _Seen], size: tuple[int, int], prefix: int | None = None
) -> Tap | None:
    """Return how the output of a module becomes a map of ``channels`` channels; None where it does not."""
    if name not in seen:
        return None
    shape, overwritten = seen[name].output.shape, seen[name].overwritten
    if len(shape) == 4:
        first, last = (shape[2], shape[3]), (shape[1], shape[2])
        if shape[1] == channels or (channels is None and _has_ratio(first, size)):
            return Tap(name, "NCHW", shape[1], first, overwritten=overwritten)
        if shape[3] == channels or (channels is None and _has_ratio(last, size)):
            return Tap(name, "NHWC", shape[3], last, overwritten=overwritten)
        return None
    if channels not in (None, shape[2]):
        return None
    for count in (0 if prefix is None else prefix, 0, 1, 2):
        grid = _grid(shape[1] - count, size)
        if grid is not None:
            return Tap(name, "NLC", shape[2], grid, count, overwritten)
    return None


def _has_ratio(grid: tuple[int, int], size: tuple[int, int]) -> bool:
    # one pixel is what pooling leaves
    return grid[0] > 1 and grid[1] > 1 and size[0] // grid[0] == size[1] // grid[1] > 0


def _grid(length: int, size: tuple[int, int]) -> tuple[int, int] | None:
    """Return height and width of ``length`` tokens in the ratio of the image, None where there is no such grid."""
    if length < 1:
        return None
    height = round(math.sqrt(length * size[0] / size[1]))
    if height < 1 or length % height or (size[0] == size[1] and height * height != length):
        return None
    return height, length // height


def _observed_taps(network: Network, seen: dict[str, _Seen], size: tuple[int, int]) -> list[Tap]:
    """Take the last output of each resolution before the final norm; where there is one resolution, each block.

    Outputs of outer modules come before those of the modules inside: the next stage's first block widens its input
    while the resolution is still the old one.
    """
    taps: dict[str, Tap] = {}
    for name, each in seen.items():
        kind = type(each.module).__name__
        tokens = each.output.ndim == 3
        if any(word in kind for word in ("Norm", "Permute", "Adaptive")) or (tokens and network.family == "cnn"):
            continue
        if tap := _tap(name, None, seen, size):
            taps[name] = tap
    last: dict[int, Tap] = {}
    for name, tap in taps.items():
        stride = _stride(tap.grid, size)
        if stride not in last or name.count(".") <= last[stride].name.count("."):
            last[stride] = tap
    if len(last) > 1:
        return [last[stride] for stride in sorted(last)]
    siblings: dict[tuple[str, type], list[Tap]] = {}
    for name, tap in taps.items():
        parent = name.rpartition(".")[0]
        siblings.setdefault((parent, type(seen[name].module)), []).append(tap)
    return max(siblings.values(), key=len, default=[])


def as_map(output: Tensor, tap: Tap) -> Tensor:
    """Return a view of a module's output as B x C x H x W."""
    if tap.kind == "NHWC":
        return output.permute(0, 3, 1, 2)
    if tap.kind == "NLC":
        return output[:, tap.prefix :].transpose(1, 2).unflatten(2, tap.grid)
    return output


def _agree(taps: Sequence[Tap], seen: dict[str, _Seen], maps: Sequence[Tensor]) -> bool:
    """Whether the taps give timm's maps, but for those of which only the overwritten output is left."""
    if len(taps) != len(maps):
        return False
    intact = [
        (as_map(seen[tap.name].output, tap), each) for tap, each in zip(taps, maps, strict=True) if not tap.overwritten
    ]
    return all(_all_same([ours], [theirs]) for ours, theirs in intact)


def _module_giving(final: Tensor, seen: dict[str, _Seen]) -> str | None:
    """Return the first module whose output is ``final``; later ones, such as a pooling of one pixel, only repeat it."""
    same = (name for name, each in seen.items() if not each.overwritten and _all_same([each.output], [final]))
    return next(same, None)


def _all_same(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    if len(ours) != len(theirs):
        return False
    return all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(ours, theirs, strict=True)
    )
