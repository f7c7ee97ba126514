"""Plain detectors of torchvision, built on its own backbones or on any of timm.

Each is torchvision's module under torchvision's names of parameters, except that its ``transform`` leaves images and
boxes as they are: size and statistics of the images are the business of whoever shows them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import timm
import torch
from timm.layers import freeze_batch_norm_2d
from torch import Tensor, nn
from torchvision.models import get_model_builder
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.fcos import FCOSClassificationHead, FCOSHead, FCOSRegressionHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool, LastLevelP6P7

from visionkd.models.detection.names import split_name
from visionkd.models.detection.open_heads import OpenRoIHeads, OpenVocabulary, open_faster_rcnn

#: What decides which boxes are answered, for every detector: torchvision's name of each differs.
ANSWER_ARGS = ("score_threshold", "nms_threshold", "max_detections")
#: Arguments of torchvision's networks.
TORCHVISION_ARGS = ("frozen_norm", *ANSWER_ARGS)
#: Arguments of ``DETECTOR_BACKBONE``; all others go to the backbone.
OWN_ARGS = ("channels", "head_convs", "head_dim", "min_stride", "anchor_scale", *TORCHVISION_ARGS)
#: What makes a detector one whose classes are texts; nobody sets it by hand.
OPEN_ARG = "open_vocabulary"
#: Stride of the finest map that each looks at, and side of its anchors in strides.
_MIN_STRIDE = {"fcos": 8, "retinanet": 8, "fasterrcnn": 4}
_ANCHOR_SCALE = {"fcos": 1.0, "retinanet": 4.0, "fasterrcnn": 8.0}
_MOST_MAPS = {"fcos": 3, "retinanet": 3, "fasterrcnn": 4}
#: Channels of a group of group norm: 256 channels have 32 groups, as usual.
GROUP = 8
#: Published with batch norm that adds nothing to the variance, as Caffe2 had it.
_NO_EPS = ("fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn")
_PRIOR = 0.01


class AsItIs(nn.Module):
    """Stands where torchvision resizes and normalises: images and boxes come as the network wants them."""

    def forward(self, images: Tensor, targets: Any = None) -> tuple[ImageList, Any]:
        """Return ``images``, B x 3 x H x W, as torchvision's list of images, and the targets."""
        height, width = images.shape[-2:]
        return ImageList(images, [(int(height), int(width))] * len(images)), targets

    def postprocess(self, result: Any, image_sizes: Any, original_sizes: Any) -> Any:
        return result


class TimmPyramid(nn.Module):
    """A backbone of timm with a feature pyramid on it, as torchvision's detectors take one.

    "Feature Pyramid Networks for Object Detection" (Lin et al., 2017).

    Args:
        body: Built with ``features_only``.
        channels: Channels of every level.
        min_stride: Stride of the finest map that is taken.
        most: Most maps of the backbone that are taken, the deepest ones.
        two_more: Add two levels by strided convolutions; else one by pooling.
        norm: Put batch norms behind the pyramid's convolutions.
    """

    def __init__(
        self, body: nn.Module, *, channels: int, min_stride: int, most: int, two_more: bool, norm: bool = False
    ) -> None:
        super().__init__()
        self.body = body
        self.channels_last = str(getattr(getattr(body, "output_fmt", None), "value", "NCHW")) == "NHWC"
        info: Any = body.feature_info
        strides, widths = info.reduction(), info.channels()
        last = {stride: index for index, stride in enumerate(strides)}  # of several maps of one stride the deepest
        taken = [index for stride, index in last.items() if stride >= min_stride] or list(last.values())
        self.taken = taken[-most:]
        extra = LastLevelP6P7(channels, channels) if two_more else LastLevelMaxPool()
        self.fpn = FeaturePyramidNetwork(
            [widths[index] for index in self.taken], channels, extra_blocks=extra,
            norm_layer=nn.BatchNorm2d if norm else None,
        )  # fmt: skip
        own = [int(strides[index]) for index in self.taken]
        self.strides = [*own, 2 * own[-1], 4 * own[-1]] if two_more else [*own, 2 * own[-1]]
        self.out_channels = channels

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Return the levels of the pyramid for ``image``, B x 3 x H x W, by name, the finest first."""
        maps = self.body(image)
        if self.channels_last:
            maps = [each.permute(0, 3, 1, 2) for each in maps]
        return self.fpn({str(number): maps[index] for number, index in enumerate(self.taken)})


def complete_args(architecture: str, args: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of ``DETECTOR_BACKBONE`` with the detector's own values where none are given."""
    detector, _ = split_name(architecture)
    defaults = {
        "channels": 128,
        "min_stride": _MIN_STRIDE[detector],
        "anchor_scale": _ANCHOR_SCALE[detector],
        **({"head_dim": 512} if detector == "fasterrcnn" else {"head_convs": 4}),
    }
    return {**defaults, **args}


def backbone_args(args: Mapping[str, Any]) -> dict[str, Any]:
    """Return those arguments of ``DETECTOR_BACKBONE`` that its backbone is built with."""
    return {name: value for name, value in args.items() if name not in (*OWN_ARGS, "num_classes", OPEN_ARG)}


def build(architecture: str, args: Mapping[str, Any], *, body: nn.Module | None = None) -> nn.Module:
    """Build ``DETECTOR_BACKBONE``.

    Args:
        architecture: Its name, without a tag.
        args: ``num_classes``, any of :data:`OWN_ARGS`, and what the backbone takes.
        body: A backbone that was built with the same arguments; None builds one with random weights.
    """
    detector, name = split_name(architecture)
    args = complete_args(architecture, args)
    if body is None:
        body = timm.create_model(name, features_only=True, **backbone_args(args))
    pyramid = TimmPyramid(
        body, channels=args["channels"], min_stride=args["min_stride"], most=_MOST_MAPS[detector],
        two_more=detector != "fasterrcnn", norm=OPEN_ARG in args,
    )  # fmt: skip
    net = {"fcos": _fcos, "retinanet": _retinanet, "fasterrcnn": _faster_rcnn}[detector](pyramid, args)
    return _settled(net, args, eps=None)


def build_torchvision(architecture: str, args: Mapping[str, Any]) -> nn.Module:
    """Build one of torchvision's networks with random weights.

    Args:
        architecture: Its name.
        args: ``num_classes``, and any of :data:`TORCHVISION_ARGS`.
    """
    builder = get_model_builder(architecture)
    outputs = args["num_classes"] + (0 if architecture.startswith(("retinanet", "fcos")) else 1)
    net = builder(weights=None, weights_backbone=None, num_classes=outputs)
    return _settled(net, args, eps=0.0 if architecture in _NO_EPS else None)


def rebuild(source: str, architecture: str, kwargs: Mapping[str, Any]) -> nn.Module:
    """Build the plain network of a package, of the library ``source``, with random weights."""
    return (build_torchvision if source == "torchvision" else build)(architecture, kwargs)


def _settled(net: nn.Module, args: Mapping[str, Any], *, eps: float | None) -> nn.Module:
    """Give a detector its way to answer, and take its own handling of images away."""
    net.transform = AsItIs()
    where = net.roi_heads if hasattr(net, "roi_heads") else net
    for name, theirs in zip(ANSWER_ARGS, ("score_thresh", "nms_thresh", "detections_per_img"), strict=True):
        if args.get(name) is not None:
            setattr(where, theirs, args[name])
    if args.get("frozen_norm"):
        freeze_norm(net, eps=eps)
    return net


def freeze_norm(net: nn.Module, *, eps: float | None) -> None:
    """Let the batch norms of the backbone keep their statistics and weights: small batches have poor ones.

    Args:
        net: A detector; its names of parameters stay.
        eps: What is added to the variance; None keeps each norm's own.
    """
    if is_open(net):  # its pyramid has norms of its own, which begin untrained
        net.backbone.body = freeze_batch_norm_2d(net.backbone.body)
    else:
        net.backbone = freeze_batch_norm_2d(net.backbone)
    if eps is not None:
        for module in net.backbone.modules():
            if isinstance(module, FrozenBatchNorm2d):
                module.eps = eps


# The three kinds ------------------------------------------------------------------------------------------------------


def _fcos(pyramid: TimmPyramid, args: Mapping[str, Any]) -> nn.Module:
    anchors = _anchors(pyramid, args, scales=(1.0,), ratios=(1.0,))
    head = FCOSHead(args["channels"], 1, args["num_classes"], num_convs=0)
    rest = {"num_convs": args["head_convs"], "norm_layer": _norm(args)}  # which its branches alone take
    head.classification_head = FCOSClassificationHead(args["channels"], 1, args["num_classes"], **rest)
    head.regression_head = FCOSRegressionHead(args["channels"], 1, **rest)
    return FCOS(pyramid, args["num_classes"], anchor_generator=anchors, head=head)


def _retinanet(pyramid: TimmPyramid, args: Mapping[str, Any]) -> nn.Module:
    anchors = _anchors(pyramid, args, scales=(1.0, 2 ** (1 / 3), 2 ** (2 / 3)), ratios=(0.5, 1.0, 2.0))
    per_place = anchors.num_anchors_per_location()[0]
    head = RetinaNetHead(args["channels"], per_place, args["num_classes"], norm_layer=_norm(args))
    head.regression_head._loss_type = "giou"
    for branch in (head.classification_head, head.regression_head):
        branch.conv = branch.conv[: args["head_convs"]]
    return RetinaNet(pyramid, args["num_classes"], anchor_generator=anchors, head=head)


def _faster_rcnn(pyramid: TimmPyramid, args: Mapping[str, Any]) -> nn.Module:
    anchors = _anchors(pyramid, args, scales=(1.0,), ratios=(0.5, 1.0, 2.0))
    if OPEN_ARG in args:
        return open_faster_rcnn(pyramid, anchors, OpenVocabulary.from_dict(args[OPEN_ARG]))
    levels = [str(number) for number in range(len(pyramid.taken))]
    pool = MultiScaleRoIAlign(featmap_names=levels, output_size=7, sampling_ratio=2)
    return FasterRCNN(
        pyramid,
        num_classes=None,
        rpn_anchor_generator=anchors,
        box_roi_pool=pool,
        box_head=TwoMLPHead(args["channels"] * 7**2, args["head_dim"]),
        box_predictor=FastRCNNPredictor(args["head_dim"], args["num_classes"] + 1),
    )


def _norm(args: Mapping[str, Any]) -> Any:
    return partial(nn.GroupNorm, args["channels"] // GROUP)


def _anchors(
    pyramid: TimmPyramid, args: Mapping[str, Any], *, scales: tuple[float, ...], ratios: tuple[float, ...]
) -> AnchorGenerator:
    sizes = tuple(tuple(args["anchor_scale"] * stride * scale for scale in scales) for stride in pyramid.strides)
    return AnchorGenerator(sizes, (ratios,) * len(sizes))


# Class layers ---------------------------------------------------------------------------------------------------------


def class_layers(net: nn.Module) -> tuple[str, ...]:
    """Return the names of the layers whose outputs stand for classes."""
    if is_open(net):
        return ()
    if hasattr(net, "roi_heads"):
        return ("roi_heads.box_predictor.cls_score", "roi_heads.box_predictor.bbox_pred")
    head = net.head.classification_head
    if hasattr(head, "cls_logits"):
        return ("head.classification_head.cls_logits",)
    return tuple(f"head.classification_head.module_list.{number}.1" for number in range(len(head.module_list)))


def is_open(net: nn.Module) -> bool:
    """Whether its classes are texts, which no layer stands for."""
    return isinstance(getattr(net, "roi_heads", None), OpenRoIHeads)


def has_background(net: nn.Module) -> bool:
    """Whether the first of its classes is none."""
    return hasattr(net, "roi_heads") or not hasattr(net.head.classification_head, "cls_logits")


def outputs_per_class(net: nn.Module) -> tuple[int, ...]:
    """Return how many outputs of each class layer belong to one class: anchors in a place, or sides of a box."""
    if hasattr(net, "roi_heads"):
        return () if is_open(net) else (1, 4)
    return tuple(net.anchor_generator.num_anchors_per_location()[: len(class_layers(net))])


@torch.no_grad()
def set_classes(net: nn.Module, columns: list[int] | int, *, num_classes: int) -> None:
    """Put other class layers in place.

    Args:
        net: A detector.
        columns: Classes to keep, in this order; or a number of fresh ones.
        num_classes: Classes that it has now, without the background.
    """
    offset = int(has_background(net))
    count = columns if isinstance(columns, int) else len(columns)
    kept = None if isinstance(columns, int) else [*range(offset), *(column + offset for column in columns)]
    layers = zip(class_layers(net), outputs_per_class(net), strict=True)
    for name, per_class in layers:
        old = net.get_submodule(name)
        rows = per_class * (count + offset)
        if isinstance(old, nn.Linear):
            new: nn.Module = nn.Linear(old.in_features, rows)
        else:
            new = nn.Conv2d(old.in_channels, rows, old.kernel_size, padding=old.padding)
            begin(new, background=bool(offset))
        new.to(device=old.weight.device, dtype=old.weight.dtype)
        if kept is not None:
            for mine, theirs in ((new.weight, old.weight), (new.bias, old.bias)):
                mine.copy_(_picked(theirs, kept, per_class, num_classes + offset, boxes=name.endswith("bbox_pred")))
        net.set_submodule(name, new)
    if not hasattr(net, "roi_heads"):
        head = net.head.classification_head
        setattr(head, "num_columns" if offset else "num_classes", count + offset)


def begin(layer: nn.Conv2d, *, background: bool) -> None:
    """Draw the weights of the layer that gives the logits of a single stage, as torchvision does."""
    nn.init.normal_(layer.weight, std=0.03 if background else 0.01)
    nn.init.constant_(layer.bias, 0.0 if background else -math.log((1 - _PRIOR) / _PRIOR))


def _picked(values: Tensor, kept: list[int], per_class: int, old_count: int, *, boxes: bool) -> Tensor:
    """Keep the outputs of some classes: boxes have the class in front of the side, logits behind the anchor."""
    rest = values.shape[1:]
    if boxes:
        return values.view(old_count, per_class, *rest)[kept].reshape(-1, *rest)
    return values.view(per_class, old_count, *rest)[:, kept].reshape(-1, *rest)
