"""A detector of two stages as one graph: a fixed number of proposals, and what the second stage says of each of them.

torchvision chooses proposals image by image, in lists whose lengths depend on the image. Here an image has as many as
its detector takes at most; where fewer are found, the others count for nothing. The layers are torchvision's own, and
so is what they are given: the same boxes are found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.rpn import concat_box_prediction_layers
from torchvision.ops import MultiScaleRoIAlign, clip_boxes_to_image, nms

from visionkd.models.detection.open_heads import SMALLEST, AlignedPool, OpenRoIHeads
from visionkd.models.detection.pooling import pool_levels
from visionkd.runtime.boxes import BoxRule

#: Score of what is no proposal; all others are 0 or more.
NONE = -1.0


@torch.library.custom_op("visionkd::uncovered", mutates_args=())
def uncovered(boxes: Tensor, scores: Tensor, threshold: float, most: int) -> Tensor:
    """Keep the scores of boxes that no surer one covers, image by image.

    It is an operator of its own because the exporter has to see it as one: see ``export/operators.py``.

    Args:
        boxes: B x N x 4.
        scores: B x N; those below 0 do not take part.
        threshold: Intersection over union above which a box is covered.
        most: Boxes that are kept in an image at most, the surest ones.

    Returns:
        B x N: scores, or :data:`NONE` of those that are not kept.
    """
    kept = torch.full_like(scores, NONE)
    for own, values, result in zip(boxes, scores, kept, strict=True):
        part = (values >= 0).nonzero()[:, 0]
        chosen = part[nms(own[part], values[part], threshold)[:most]]
        result[chosen] = values[chosen]
    return kept


@uncovered.register_fake
def _(boxes: Tensor, scores: Tensor, threshold: float, most: int) -> Tensor:
    return torch.empty_like(scores)


def settle(net: nn.Module, maps: Mapping[str, tuple[int, int]], img_size: tuple[int, int]) -> None:
    """Let torchvision's pooling see a pyramid once: the first one that it sees settles its scales, which no graph can.

    Args:
        net: A detector of two stages.
        maps: Height and width of each level by name.
        img_size: Height and width of the image.
    """
    pool = net.roi_heads.box_roi_pool
    if isinstance(pool, MultiScaleRoIAlign) and pool.scales is None:
        pool({name: torch.zeros(1, 1, *size) for name, size in maps.items()}, [torch.zeros(1, 4)], [img_size])


def count(net: nn.Module, levels: Sequence[int]) -> int:
    """Return how many proposals an image has, of ``levels`` anchors on each level."""
    rpn: Any = net.rpn
    return min(rpn._post_nms_top_n["testing"], sum(min(each, rpn._pre_nms_top_n["testing"]) for each in levels))


def candidates(
    net: nn.Module, maps: Mapping[str, Tensor], anchors: Tensor, levels: Sequence[int], img_size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Return what the second stage says of each proposal, before any choice among them.

    Args:
        net: The detector, in eval mode.
        maps: Its pyramid, by level.
        anchors: Of all levels, A x 4.
        levels: How many of them are of each level.
        img_size: Height and width of the image, at whose edges boxes are cut.

    Returns:
        Boxes, B x N x K x 4, or B x N x 4 where a proposal has one for all classes, and scores, B x N x K. Where there
        is no proposal all of it is 0.
    """
    boxes, found = _proposals(net, maps, anchors, levels, img_size)
    proposals = boxes.flatten(0, 1)
    heads: Any = net.roi_heads
    pooled = _pooled(heads.box_roi_pool, maps, boxes)
    logits, codes = heads.box_predictor(heads.box_head(pooled))
    corrected = heads.box_coder.decode_single(codes, proposals).reshape(codes.shape[0], -1, 4)
    corrected = clip_boxes_to_image(corrected, img_size)
    if isinstance(heads, OpenRoIHeads):
        scores, corrected = heads.scores(logits, pooled), corrected[:, 0]
    else:
        scores, corrected = torch.softmax(logits, -1)[:, 1:], corrected[:, 1:]
    kept = found.reshape(-1, *[1] * (corrected.ndim - 1))
    corrected = torch.where(kept, corrected, torch.zeros_like(corrected))
    scores = torch.where(found.reshape(-1, 1), scores, torch.zeros_like(scores))
    shape = boxes.shape[:2]
    return corrected.reshape(*shape, *corrected.shape[1:]), scores.reshape(*shape, -1)


def rule_of(net: nn.Module) -> BoxRule:
    """Return how a detector of two stages chooses among its candidates."""
    heads: Any = net.roi_heads
    return BoxRule(
        score_threshold=float(heads.score_thresh),
        nms_threshold=float(heads.nms_thresh),
        max_detections=int(heads.detections_per_img),
        min_side=SMALLEST,
        own_boxes=not isinstance(heads, OpenRoIHeads),
    )


def _proposals(
    net: nn.Module, maps: Mapping[str, Tensor], anchors: Tensor, levels: Sequence[int], img_size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Return B x N x 4 proposals, the surest first and cut at the image's edge, and which of them there are, B x N."""
    rpn: Any = net.rpn
    objectness, codes = concat_box_prediction_layers(*rpn.head(list(maps.values())))
    batch = next(iter(maps.values())).shape[0]
    flat = anchors.expand(batch, *anchors.shape).reshape(-1, 4)
    boxes = rpn.box_coder.decode_single(codes, flat).reshape(batch, -1, 4)
    logits, places, first = [], [], 0
    for own in objectness.reshape(batch, -1).split(list(levels), 1):
        values, place = own.topk(min(own.shape[1], rpn.pre_nms_top_n()), dim=1)
        logits.append(values)
        places.append(place + first)
        first += own.shape[1]
    boxes = clip_boxes_to_image(_rows(boxes, torch.cat(places, 1)), img_size)
    scores = torch.sigmoid(torch.cat(logits, 1))
    fit = ((boxes[..., 2:] - boxes[..., :2]) >= rpn.min_size).all(-1) & (scores >= rpn.score_thresh)
    scores = torch.where(fit, scores, torch.full_like(scores, NONE))
    most, sizes = count(net, levels), [each.shape[1] for each in logits]
    parts = zip(boxes.split(sizes, 1), scores.split(sizes, 1), strict=True)
    kept = torch.cat([uncovered(own, values, rpn.nms_thresh, most) for own, values in parts], 1)
    kept, chosen = kept.topk(most, dim=1)
    found = kept >= 0
    return torch.where(found[..., None], _rows(boxes, chosen), torch.zeros(4, device=boxes.device)), found


def _rows(boxes: Tensor, places: Tensor) -> Tensor:
    """Return B x M x 4, the boxes at B x M places."""
    return boxes.gather(1, places[..., None].expand(-1, -1, 4))


def _pooled(pool: Any, maps: Mapping[str, Tensor], boxes: Tensor) -> Tensor:
    """Return what a pooling of torchvision or of ours gives for B x N x 4 boxes, B * N x C x height x width."""
    owner = torch.arange(boxes.shape[0], device=boxes.device, dtype=boxes.dtype)
    owner = owner[:, None, None].expand(-1, boxes.shape[1], 1)
    rois = torch.cat([owner, boxes], -1).flatten(0, 1)
    if isinstance(pool, AlignedPool):
        return pool.of(maps, rois)
    own = [maps[name] for name in pool.featmap_names if name in maps]
    size = tuple(pool.output_size)
    levels = pool.map_levels([rois[:, 1:]])
    return pool_levels(
        own, rois, levels, scales=pool.scales, size=size, sampling_ratio=pool.sampling_ratio, aligned=False
    )
