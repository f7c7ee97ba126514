"""The steps of a detector's pass: the maps of its pyramid, and what the two stages of a two-stage one looked at.

torchvision computes the losses of a detector in one call. That call is made as it is, and what its modules are given
and answer is noted on the way: the losses are those of the plain detector, from the same random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.rpn import concat_box_prediction_layers

from visionkd.errors import RequestError
from visionkd.models.detection import nets
from visionkd.models.detection.network import DetectionNetwork
from visionkd.models.modes import evaluating
from visionkd.models.plan import Stage
from visionkd.types import Output

#: What torchvision calls a level that only repeats pixels of the one before it.
_POOLED = "pool"
_LEVELS = "_pyramid_levels"  # attribute of a network: its levels by the images' size, each looked at once


@dataclass(frozen=True)
class TwoStage:
    """What the two stages of a detector looked at in one pass in train mode, and what they answered.

    Anchors of a batch stand image by image, each image's level by level, as torchvision's losses take them.

    Attributes:
        image_sizes: Height and width of each of the B images.
        objectness: Logits of all anchors, B * A.
        anchor_deltas: Their boxes in the coder's units, B * A x 4.
        sampled_anchors: Indices of the anchors that the first stage's loss was computed on.
        proposals: For each image the R proposals that the second stage's loss was computed on, R x 4 pixels; true boxes
            are among them. Without gradient.
        labels: Their classes, sum of R; 0 is the background.
        class_logits: Of these proposals, sum of R x (K + 1), the background first.
        box_deltas: Their boxes in the coder's units, sum of R x 4 (K + 1).
    """

    image_sizes: tuple[tuple[int, int], ...]
    objectness: Tensor
    anchor_deltas: Tensor
    sampled_anchors: Tensor
    proposals: tuple[Tensor, ...]
    labels: Tensor
    class_logits: Tensor
    box_deltas: Tensor


@dataclass
class DetectorOutput(Output):
    """What a detector answers, with its steps.

    Attributes:
        image_size: Height and width of the images in pixels.
        two_stage: Of a two-stage detector in train mode, what its stages did; else None.
    """

    image_size: tuple[int, int] = (0, 0)
    two_stage: TwoStage | None = None


def is_two_stage(network: Any) -> bool:
    """Whether a network proposes boxes first and then looks at each of them, with a fixed set of classes."""
    return isinstance(network, DetectionNetwork) and network.two_stage and not nets.is_open(network.net)


def stepwise(
    network: DetectionNetwork,
    image: Tensor,
    target: Sequence[Mapping[str, Tensor]] | None = None,
    *,
    indices: Sequence[int] | None = None,
) -> DetectorOutput:
    """Run a detector and return the maps of its pyramid with what it answers.

    In train mode it is the pass that ``network(image, target)`` makes, with the same losses. In eval mode only the
    pyramid is computed: a network that teaches is asked for no boxes.

    Args:
        network: A detector.
        image: B x 3 x H x W in [0, 1].
        target: As the network takes it; in train mode alone.
        indices: Levels wanted in ``features``, the finest is 0; None takes all.

    Raises:
        RequestError: If the pyramid has no such level.
    """
    size = (int(image.shape[-2]), int(image.shape[-1]))
    if not network.training:
        maps = network.pyramid(image)
        return DetectorOutput(features=_chosen(network, maps, indices), image_size=size)
    if not is_two_stage(network):
        with _noted(network.net.backbone) as seen:
            losses = network(image, target).losses
        maps = tuple(seen["answer"].values())
        return DetectorOutput(features=_chosen(network, maps, indices), losses=losses, image_size=size)
    losses, maps, steps = two_stage(network, image, target)
    features = _chosen(network, tuple(maps.values()), indices)
    return DetectorOutput(features=features, losses=losses, image_size=size, two_stage=steps)


def two_stage(
    network: DetectionNetwork, image: Tensor, target: Sequence[Mapping[str, Tensor]] | None
) -> tuple[Mapping[str, Tensor], dict[str, Tensor], TwoStage]:
    """Run a two-stage detector in train mode.

    Args:
        network: A detector for which :func:`is_two_stage` holds.
        image: B x 3 x H x W in [0, 1].
        target: As the network takes it.

    Returns:
        The losses by name, the maps by level as the heads take them, and what both stages did.
    """
    net: Any = network.net
    rpn, heads = net.rpn, net.roi_heads
    with (
        _noted(net.backbone) as body, _noted(rpn.head) as first, _noted(heads.box_roi_pool) as pooled,
        _noted(heads.box_predictor) as second, _sampling(rpn) as anchors, _sampling(heads) as boxes,
    ):  # fmt: skip
        losses = network(image, target).losses
    objectness, deltas = concat_box_prediction_layers(*first["answer"])
    _, proposals, sizes = pooled["given"]
    logits, box_deltas = second["answer"]
    steps = TwoStage(
        image_sizes=tuple(sizes),
        objectness=objectness.flatten(),
        anchor_deltas=deltas,
        sampled_anchors=torch.cat(anchors.drawn).nonzero().flatten(),
        proposals=tuple(each.detach() for each in proposals),
        labels=torch.cat([labels[drawn] for labels, drawn in zip(boxes.labels, boxes.drawn, strict=True)]),
        class_logits=logits,
        box_deltas=box_deltas,
    )
    return losses, body["answer"], steps


def look_at_anchors(network: DetectionNetwork, maps: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return what the first stage says of all anchors: objectness, B * A, and deltas, B * A x 4.

    Args:
        network: A two-stage detector.
        maps: All levels of its pyramid, by name.
    """
    net: Any = network.net
    objectness, deltas = concat_box_prediction_layers(*net.rpn.head(list(maps.values())))
    return objectness.flatten(), deltas


def look_at_boxes(
    network: DetectionNetwork,
    maps: Mapping[str, Tensor],
    boxes: Sequence[Tensor],
    image_sizes: Sequence[tuple[int, int]],
) -> tuple[Tensor, Tensor]:
    """Return what the second stage says of boxes: class logits, N x (K + 1), and deltas, N x 4 (K + 1).

    Args:
        network: A two-stage detector.
        maps: All levels of its pyramid, by name.
        boxes: For each image R x 4 pixels; N is the sum of R.
        image_sizes: Height and width of each image.
    """
    heads: Any = network.net.roi_heads
    return heads.box_predictor(heads.box_head(heads.box_roi_pool(dict(maps), list(boxes), list(image_sizes))))


# Levels ---------------------------------------------------------------------------------------------------------------


def levels(network: DetectionNetwork, img_size: tuple[int, int] | None = None) -> tuple[Stage, ...]:
    """Return the levels of a detector's pyramid, the finest first; their names are those of the pyramid's maps.

    Args:
        network: A detector.
        img_size: Height and width of the images, for the size of the maps; None takes the network's own.

    Raises:
        RequestError: If its maps are not to be had.
    """
    if network.shell is not None:
        raise RequestError(
            f"the maps of a quantised '{network.architecture}' are not to be had", hint="Take its float model."
        )
    size = tuple(int(side) for side in (network.input.img_size if img_size is None else img_size))
    known: dict[tuple[int, ...], tuple[Stage, ...]] = vars(network).setdefault(_LEVELS, {})
    if size not in known:
        known[size] = tuple(
            Stage(number, name, int(each.shape[1]), _stride(size, each.shape[2:]), tuple(each.shape[2:]), "map")
            for number, (name, each) in enumerate(_maps(network.net.backbone, size).items())
        )
    return known[size]


def matched_levels(student: Sequence[Stage], teacher: Sequence[Stage]) -> tuple[tuple[int, int], ...]:
    """Return which levels of two pyramids belong together, the finest first: maps of one size, so of one stride.

    Of several of one size the deeper ones are paired. A level that is pooled from another one says nothing new, and is
    left out.

    Args:
        student: Levels of the student's pyramid for images of some size.
        teacher: Levels of the teacher's for images of the same size.

    Returns:
        Indices of the student's and the teacher's level.
    """
    free = [level for level in teacher if level.name != _POOLED]
    pairs = []
    for own in reversed([level for level in student if level.name != _POOLED]):
        other = next((level for level in reversed(free) if level.grid == own.grid), None)
        if other is not None:
            free.remove(other)
            pairs.append((own.index, other.index))
    return tuple(reversed(pairs))


def _stride(size: Sequence[int], grid: Sequence[int]) -> int:
    # maps of sizes that are no multiple of it are rounded up, least so along the longer side
    return 2 ** round(math.log2(max(pixels / cells for pixels, cells in zip(size, grid, strict=True))))


@torch.no_grad()
def _maps(backbone: nn.Module, size: Sequence[int]) -> dict[str, Tensor]:
    parameter = next(backbone.parameters())
    with evaluating(backbone):
        return backbone(torch.zeros(1, 3, *size, device=parameter.device, dtype=parameter.dtype))


def _chosen(network: DetectionNetwork, maps: Sequence[Tensor], indices: Sequence[int] | None) -> tuple[Tensor, ...]:
    if indices is None:
        return tuple(maps)
    outside = [index for index in indices if not -len(maps) <= index < len(maps)]
    if outside:
        text = f"the pyramid of '{network.architecture}' has {len(maps)} levels, and no level {outside[0]}"
        raise RequestError(text, hint=f"Count from 0, the finest, to {len(maps) - 1}.")
    return tuple(maps[index] for index in indices)


# Taking notes ---------------------------------------------------------------------------------------------------------


@contextmanager
def _noted(module: nn.Module) -> Iterator[dict[str, Any]]:
    """Remember what a module is given (``given``) and what it answers (``answer``) in one pass."""
    notes: dict[str, Any] = {}

    def note(_: nn.Module, given: Any, answer: Any) -> None:
        notes.update(given=given, answer=answer)

    handle = module.register_forward_hook(note)
    try:
        yield notes
    finally:
        handle.remove()


class _Sampler:
    """Stands for a sampler of torchvision, and remembers what it drew from.

    Attributes:
        labels: For each image, of all there is to draw from.
        drawn: For each image, what was drawn, as a mask.
    """

    def __init__(self, sampler: Any) -> None:
        self._sampler = sampler
        self.labels: list[Tensor] = []
        self.drawn: list[Tensor] = []

    def __call__(self, labels: Sequence[Tensor]) -> Any:
        self.labels = list(labels)  # a list of its own: torchvision goes on to write into its one
        positive, negative = self._sampler(labels)
        self.drawn = [(one | two).bool() for one, two in zip(positive, negative, strict=True)]
        return positive, negative


@contextmanager
def _sampling(part: Any) -> Iterator[_Sampler]:
    """Remember what a stage of a detector samples in one pass."""
    own = part.fg_bg_sampler
    part.fg_bg_sampler = _Sampler(own)
    try:
        yield part.fg_bg_sampler
    finally:
        part.fg_bg_sampler = own
