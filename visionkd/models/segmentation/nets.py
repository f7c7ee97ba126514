"""Plain segmentation networks: logits at their own stride, and in train mode those of an auxiliary head beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torchvision.models import get_model_builder

from visionkd.models.segmentation.blocks import classifier, conv, initialise
from visionkd.models.segmentation.heads import SPECS, Level, build_head
from visionkd.models.segmentation.names import split_name

#: Arguments of ``HEAD_BACKBONE``; all others go to the backbone.
OWN_ARGS = ("aux", "output_stride", "in_chans", "channels", "separable", "dropout", "plane_std")
#: Arguments of torchvision's networks.
TORCHVISION_ARGS = ("aux", "in_chans", "plane_std")
OUTPUT_STRIDES = (8, 16, 32)
PLANE_STD = 0.1
_AUX_CHANNELS = 64


class Segmenter(nn.Module):
    """A backbone of timm, a head, a classifier, and perhaps an auxiliary head on the map before the deepest.

    Args:
        backbone: Built with ``features_only``.
        head: Name of the head.
        num_classes: Classes.
        channels: Width of the head.
        separable: Whether the head's 3 x 3 convolutions are separable.
        dropout: Before the classifier.
        aux: Add the auxiliary head.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: str,
        *,
        num_classes: int,
        channels: int,
        separable: bool,
        dropout: float,
        aux: bool,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        #: Swin transformers and their like put the channels last.
        self.channels_last = str(getattr(getattr(backbone, "output_fmt", None), "value", "NCHW")) == "NHWC"
        info: Any = backbone.feature_info
        levels = [Level(*each) for each in zip(info.channels(), info.reduction(), strict=True)]
        self.head = build_head(head, levels, channels=channels, separable=separable)
        self.dropout = nn.Dropout(dropout)
        self.classifier = classifier(channels, num_classes)
        self.aux_level = max(0, len(levels) - 2)
        self.aux_head: nn.Sequential | None = None
        if aux:
            self.aux_head = nn.Sequential(conv(levels[self.aux_level].channels, _AUX_CHANNELS, 3))
            initialise(self.aux_head)
            self.aux_head.append(nn.Dropout(dropout))
            self.aux_head.append(classifier(_AUX_CHANNELS, num_classes))
        names = _module_names(backbone)
        self.feature_info = [
            {"module": f"backbone.{name}", "num_chs": level.channels, "reduction": level.stride}
            for name, level in zip(names, levels, strict=True)
            if name is not None
        ]
        self.feature_info.append({"module": "head", "num_chs": channels, "reduction": 0})

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Return logits B x C x h x w for ``image``, normalised; in train mode with those of the auxiliary head."""
        maps = self._maps(image)
        logits = self.classifier(self.dropout(self.head(maps)))
        if self.aux_head is None or not self.training:
            return logits
        return logits, self.aux_head(maps[self.aux_level])

    def forward_features(self, image: Tensor) -> Tensor:
        """Return the deepest map of the backbone."""
        return self._maps(image)[-1]

    def _maps(self, image: Tensor) -> list[Tensor]:
        maps = self.backbone(image)
        return [each.permute(0, 3, 1, 2) for each in maps] if self.channels_last else maps

    def get_classifier(self) -> nn.Module:
        """Return the layer that gives the logits."""
        return self.classifier

    def reset_classifier(self, num_classes: int) -> None:
        """Put fresh classifiers in place, the auxiliary one among them."""
        self.classifier = classifier(self.classifier.in_channels, num_classes)
        if self.aux_head is not None:
            self.aux_head[-1] = classifier(_AUX_CHANNELS, num_classes)


class TorchvisionSegmenter(nn.Module):
    """One of torchvision's networks, under its own names of parameters, without its resizing to the image's size.

    Args:
        model: As torchvision builds it.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.backbone = model.backbone
        self.classifier = model.classifier
        self.aux_classifier: nn.Sequential | None = getattr(model, "aux_classifier", None)
        self.sum_of_two = hasattr(self.classifier, "low_classifier")
        modules = [(name, _out_channels(module)) for name, module in self.backbone.named_children()]
        ends = [name for name in self.backbone if name in self.backbone.return_layers or name.startswith("layer")]
        widths = dict(modules)
        self.feature_info = [{"module": f"backbone.{name}", "num_chs": widths[name], "reduction": 0} for name in ends]
        layers = list(self.classifier.named_children())
        before, channels = ("cbr", _out_channels(self.classifier.cbr)) if self.sum_of_two else (
            next(name for name, layer in reversed(layers) if isinstance(layer, nn.ReLU)),
            self.classifier[-1].in_channels,
        )  # fmt: skip
        self.feature_info.append({"module": f"classifier.{before}", "num_chs": channels, "reduction": 0})

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Return logits B x C x h x w for ``image``, normalised; in train mode with those of the auxiliary head."""
        maps = self.backbone(image)
        logits = self.classifier(maps if self.sum_of_two else maps["out"])
        if self.aux_classifier is None or not self.training:
            return logits
        return logits, self.aux_classifier(maps["aux"])

    def forward_features(self, image: Tensor) -> Tensor:
        """Return the deepest map of the backbone."""
        maps = self.backbone(image)
        return maps["high" if self.sum_of_two else "out"]

    def get_classifier(self) -> nn.Module | tuple[nn.Module, ...]:
        """Return the layers that give the logits; LR-ASPP adds those of two."""
        if self.sum_of_two:
            return self.classifier.low_classifier, self.classifier.high_classifier
        return self.classifier[-1]

    def reset_classifier(self, num_classes: int) -> None:
        """Put fresh classifiers in place, the auxiliary one among them."""
        if self.sum_of_two:
            for name in ("low_classifier", "high_classifier"):
                setattr(self.classifier, name, classifier(getattr(self.classifier, name).in_channels, num_classes))
        else:
            self.classifier[-1] = classifier(self.classifier[-1].in_channels, num_classes)
        if self.aux_classifier is not None:
            self.aux_classifier[-1] = classifier(self.aux_classifier[-1].in_channels, num_classes)


def build_torchvision(architecture: str, args: Mapping[str, Any]) -> TorchvisionSegmenter:
    """Build one of torchvision's networks with random weights.

    Args:
        architecture: Its name.
        args: ``num_classes``, and any of :data:`TORCHVISION_ARGS`.
    """
    rest = {} if architecture.startswith("lraspp") else {"aux_loss": bool(args.get("aux", False))}
    builder = get_model_builder(architecture)
    net = TorchvisionSegmenter(builder(weights=None, weights_backbone=None, num_classes=args["num_classes"], **rest))
    widen_input(net, args.get("in_chans", 3), args.get("plane_std", PLANE_STD))
    return net


def complete_args(architecture: str, args: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of ``HEAD_BACKBONE`` with the head's own values where none are given, but the stride."""
    spec = SPECS[split_name(architecture)[0]]
    defaults = {"aux": False, "in_chans": 3, "channels": spec.channels, "separable": spec.separable, "dropout": 0.1}
    return {**defaults, **args}


def backbone_args(args: Mapping[str, Any]) -> dict[str, Any]:
    """Return those arguments of ``HEAD_BACKBONE`` that its backbone is built with."""
    rest = {name: value for name, value in args.items() if name not in (*OWN_ARGS, "num_classes")}
    stride = args.get("output_stride")
    return {**rest, **({"output_stride": stride} if stride not in (None, 32) else {})}


def build(architecture: str, args: Mapping[str, Any], *, backbone: nn.Module | None = None) -> Segmenter:
    """Build ``HEAD_BACKBONE``.

    Args:
        architecture: Its name, without a tag.
        args: ``num_classes``, any of :data:`OWN_ARGS`, and what the backbone takes.
        backbone: A backbone that was built with the same arguments; None builds one with random weights.
    """
    head, name = split_name(architecture)
    args = complete_args(architecture, args)
    if backbone is None:
        backbone = timm.create_model(name, features_only=True, **backbone_args(args))
    kept = ("num_classes", "channels", "separable", "dropout", "aux")
    net = Segmenter(backbone, head, **{each: args[each] for each in kept})
    widen_input(net, args["in_chans"], args.get("plane_std", PLANE_STD))
    return net


def rebuild(source: str, architecture: str, kwargs: Mapping[str, Any]) -> nn.Module:
    """Build the plain network of a package, of the library ``source``, with random weights."""
    return (build_torchvision if source == "torchvision" else build)(architecture, kwargs)


@torch.no_grad()
def widen_input(net: nn.Module, in_chans: int, std: float) -> None:
    """Let the first convolution take planes beside red, green and blue; what it makes of these stays.

    The weights of the new planes are drawn from N(0, std), as those of the label plane in LAD (Qiu et al., 2024).
    """
    if in_chans == 3:
        return
    first = next(module for module in net.modules() if isinstance(module, nn.Conv2d) and module.in_channels == 3)
    old = first.weight
    new = torch.empty(old.shape[0], in_chans - 3, *old.shape[2:], device=old.device, dtype=old.dtype).normal_(0.0, std)
    first.weight = nn.Parameter(torch.cat([old, new], 1))
    first.in_channels = in_chans


def _module_names(backbone: nn.Module) -> list[str | None]:
    """Return the modules that give the maps, by their names inside; None for one that cannot be told."""
    known = {name for name, _ in backbone.named_modules()}
    found: list[str | None] = []
    for name in backbone.feature_info.module_name():
        candidates = (name, name.replace(".", "_", 1), f"model.{name}")  # as is, flattened, behind a getter
        found.append(next((each for each in candidates if each in known), None))
    return found


def _out_channels(module: nn.Module) -> int:
    """Return the channels of what a block gives: those of its widest last convolution or norm."""
    last = [each for each in module.modules() if isinstance(each, nn.BatchNorm2d)]
    return last[-1].num_features if last else 0
