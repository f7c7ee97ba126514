"""Intermediate maps: which stages a network has, and how to get their outputs together with the logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from visionkd.errors import RequestError
from visionkd.models.detection.network import DetectionNetwork
from visionkd.models.detection.steps import DetectorOutput, stepwise
from visionkd.models.network import Network, main_logits
from visionkd.models.plan import Plan, Stage, Tap, as_map
from visionkd.models.stages import final_width, four_stages, has_class_token, plan_of, stages
from visionkd.types import Output

__all__ = ["FeatureOutput", "Stage", "extract", "final_width", "four_stages", "has_class_token", "stages"]


@dataclass
class FeatureOutput(Output):
    """An output with what the maps leave out.

    Attributes:
        prefix_tokens: For each map of ``features``, the tokens in front of it (class token first), B x P x C; empty
            where the network has none.
    """

    prefix_tokens: tuple[Tensor, ...] = ()


def extract(
    network: Network,
    image: Tensor,
    indices: Sequence[int] | None = None,
    *,
    target: Sequence[Mapping[str, Tensor]] | None = None,
) -> FeatureOutput | DetectorOutput:
    """Run ``network`` and return logits, maps and, for a transformer, tokens.

    The network runs as it would without, in train mode as well: the same logits from the same random numbers. The maps
    of a detector are the levels of its pyramid; see :func:`visionkd.models.detection.steps.stepwise`.

    Args:
        network: Any network.
        image: B x 3 x H x W in [0, 1].
        indices: Stages wanted, negative ones counted from the deepest; None takes all.
        target: What a network that needs its targets is shown in train mode.

    Returns:
        ``logits`` B x C; ``features``, one B x channels x H/stride x W/stride map for each index, in the order of
        ``indices``; ``tokens`` B x N x D where the network ends in tokens.

    Raises:
        RequestError: If the network has no such stage.
    """
    if isinstance(network, DetectionNetwork):
        return stepwise(network, image, target, indices=indices)
    plan = plan_of(network)
    known = plan.stages
    wanted = range(len(known)) if indices is None else indices
    outside = [index for index in wanted if not -len(known) <= index < len(known)]
    if outside:
        raise RequestError(
            f"'{network.architecture}' has no stage {outside[0]}",
            hint="Its stages: " + ", ".join(f"{stage.index} ({stage.name})" for stage in known),
        )
    chosen = [index % len(known) for index in wanted]
    image = network.prepare(image)
    if not plan.taps:
        return _from_timm(network.net, image, chosen)
    return _from_hooks(network, image, plan, [plan.taps[index] for index in chosen])


def _from_timm(net: Any, image: Tensor, chosen: Sequence[int]) -> FeatureOutput:
    order = sorted(set(chosen))  # timm returns maps from shallow to deep, whatever the order asked for
    final, maps = net.forward_intermediates(image, indices=order, output_fmt="NCHW")
    found = dict(zip(order, maps, strict=True))
    tokens = final if final.ndim == 3 else None
    return FeatureOutput(main_logits(net.forward_head(final)), tuple(found[index] for index in chosen), tokens)


def _from_hooks(network: Network, image: Tensor, plan: Plan, taps: Sequence[Tap]) -> FeatureOutput:
    net = network.net
    names = {tap.name: tap.overwritten for tap in taps}
    if plan.tokens is not None:
        names.setdefault(plan.tokens, False)
    seen: dict[str, Tensor] = {}

    def keeper(name: str, copy: bool) -> Any:
        def keep(_: nn.Module, __: Any, output: Tensor) -> None:
            seen[name] = output.clone() if copy else output

        return keep

    handles = [net.get_submodule(name).register_forward_hook(keeper(name, copy)) for name, copy in names.items()]
    try:
        answer = net(image)
    finally:
        for handle in handles:
            handle.remove()
    prefixes = tuple(seen[tap.name][:, : tap.prefix] for tap in taps) if all(tap.prefix for tap in taps) else ()
    return FeatureOutput(
        main_logits(answer),
        tuple(as_map(seen[tap.name], tap) for tap in taps),
        None if plan.tokens is None else seen[plan.tokens],
        aux=network.auxiliary_logits(answer),
        prefix_tokens=prefixes,
    )
