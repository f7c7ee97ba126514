"""The stages of a network: where maps of each resolution, or the blocks of a transformer, can be looked at.

They are found in one pass over the network, and what was found is kept on it, so that a training step never searches.
"""

from __future__ import annotations

from visionkd.models.detection.network import DetectionNetwork
from visionkd.models.detection.steps import levels
from visionkd.models.network import Network
from visionkd.models.plan import Plan, Stage, make_plan

_PLAN = "_feature_plan"  # attribute of a network


def plan_of(network: Network) -> Plan:
    """Return the plan of ``network``, made at the first call and kept on it.

    Raises:
        RequestError: If the network shows no feature maps.
    """
    plan: Plan | None = getattr(network, _PLAN, None)
    if plan is None or plan.img_size != tuple(network.input.img_size):
        plan = make_plan(network)
        setattr(network, _PLAN, plan)
    return plan


def forget_plan(network: Network) -> None:
    """Have the plan of ``network``, whose modules have changed, made anew when it is asked for."""
    vars(network).pop(_PLAN, None)


def stages(network: Network) -> tuple[Stage, ...]:
    """Return the stages of ``network``: those that timm names, or else the last map of each resolution.

    A transformer without resolutions has one for each block. Where a last convolution widens the deepest map
    (EfficientNet, MobileNetV2), its output is the deepest stage. All maps are taken before the final norm. Those of a
    detector are the levels of its pyramid.

    Raises:
        RequestError: If the network shows no feature maps.
    """
    return levels(network) if isinstance(network, DetectionNetwork) else plan_of(network).stages


def four_stages(network: Network) -> dict[int, Stage]:
    """Return at most four stages by number, 4 being the deepest, as methods that compare networks stage by stage count.

    Of a network with resolutions they are the last four stages; one with three has the numbers 2 to 4. Of one whose
    blocks are all alike they are blocks at the depths at which the stages of a Swin-T end: 2, 4, 10 and 12 of 12. A
    stem that gives what the first stage gives is not counted.

    Raises:
        RequestError: If the network shows no feature maps.
    """
    known = stages(network)
    depth = len(known)
    alike = [(stage.channels, stage.stride) == (known[0].channels, known[0].stride) for stage in known]
    if depth > 4 and all(alike):
        ends = [max(number, round(depth * share / 12)) for number, share in enumerate((2, 4, 10, 12), start=1)]
        chosen = [known[min(end, depth - 4 + number) - 1] for number, end in enumerate(ends, start=1)]
    else:
        has_stem = known[0].layout == "map" and not all(alike) and alike[1]
        chosen = list(known[1:] if has_stem else known)[-4:]
    return dict(zip(range(5 - len(chosen), 5), chosen, strict=True))


def has_class_token(network: Network) -> bool:
    """Whether the network's blocks carry a class token in front of the others."""
    taps = plan_of(network).taps
    own = getattr(network.net, "has_class_token", getattr(network.net, "cls_token", True))
    return bool(taps) and all(tap.prefix > 0 for tap in taps) and own is not None and own is not False


def final_width(network: Network) -> int:
    """Return the width of the last features before pooling, which a hidden layer of the head may widen."""
    width = getattr(network.net, "num_features", None)
    return int(width) if isinstance(width, int) and width else network.embedding_dim
