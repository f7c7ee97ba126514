"""Heads of segmentation networks: the maps of a backbone in, the map that the classifier reads out.

They are small: students run them on devices. ``channels`` makes them as wide as in their papers.

- ``fcn``: "Fully Convolutional Networks for Semantic Segmentation" (Long, Shelhamer and Darrell, 2015), in the form of
  one convolution on a dilated backbone.
- ``pspnet``: "Pyramid Scene Parsing Network" (Zhao et al., 2017).
- ``deeplabv3``: "Rethinking Atrous Convolution for Semantic Image Segmentation" (Chen et al., 2017).
- ``deeplabv3plus``: "Encoder-Decoder with Atrous Separable Convolution" (Chen et al., 2018).
- ``fpn``: "Panoptic Feature Pyramid Networks" (Kirillov et al., 2019), with one separable convolution after each sum in
  place of a tower for each level.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from visionkd.models.segmentation.blocks import AtrousPyramid, conv, initialise, pooled, resize_like

_BINS = (1, 2, 3, 6)
_LOW_CHANNELS = 48  # of the stride-4 map in DeepLabV3+, where the head has 256
_RATES = (6, 12, 18)  # at stride 16


@dataclass(frozen=True)
class Level:
    """A map of the backbone: its channels, and pixels of the image for one step in it."""

    channels: int
    stride: int


@dataclass(frozen=True)
class HeadSpec:
    """How a head is built.

    Attributes:
        build: Makes it of levels, channels, and whether its convolutions are separable.
        channels: Width where none is asked for.
        separable: Whether its 3 x 3 convolutions are separable where nothing is asked for.
        output_stride: Stride to which the backbone is dilated where none is asked for; 32 leaves it as it is.
    """

    build: Callable[[Sequence[Level], int, bool], nn.Module]
    channels: int
    separable: bool
    output_stride: int


class FCNHead(nn.Module):
    """One convolution on the deepest map."""

    def __init__(self, levels: Sequence[Level], channels: int, separable: bool) -> None:
        super().__init__()
        self.conv = conv(levels[-1].channels, channels, 3, separable=separable)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Return B x channels x h x w at the stride of the deepest map."""
        return self.conv(maps[-1])


class PSPHead(nn.Module):
    """The deepest map beside its means over grids of 1, 2, 3 and 6 windows a side."""

    def __init__(self, levels: Sequence[Level], channels: int, separable: bool) -> None:
        super().__init__()
        width = max(1, channels // len(_BINS))
        deep = levels[-1].channels
        self.pools = nn.ModuleList([pooled(deep, width, bins) for bins in _BINS])
        self.conv = conv(deep + width * len(_BINS), channels, 3, separable=separable)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Return B x channels x h x w at the stride of the deepest map."""
        deep = maps[-1]
        return self.conv(torch.cat([deep, *(resize_like(pool(deep), deep) for pool in self.pools)], 1))


class DeepLabV3Head(nn.Module):
    """An atrous pyramid on the deepest map, and one convolution."""

    def __init__(self, levels: Sequence[Level], channels: int, separable: bool) -> None:
        super().__init__()
        self.pyramid = AtrousPyramid(levels[-1].channels, channels, _rates(levels[-1].stride), separable=separable)
        self.conv = conv(channels, channels, 3, separable=separable)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Return B x channels x h x w at the stride of the deepest map."""
        return self.conv(self.pyramid(maps[-1]))


class DeepLabV3PlusHead(nn.Module):
    """An atrous pyramid on the deepest map, then two convolutions beside the map of stride 4."""

    def __init__(self, levels: Sequence[Level], channels: int, separable: bool) -> None:
        super().__init__()
        self.low = low_level(levels)
        width = max(8, channels * _LOW_CHANNELS // 256)
        self.pyramid = AtrousPyramid(levels[-1].channels, channels, _rates(levels[-1].stride), separable=separable)
        self.reduce = conv(levels[self.low].channels, width)
        self.fuse = nn.Sequential(
            conv(channels + width, channels, 3, separable=separable), conv(channels, channels, 3, separable=separable)
        )

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Return B x channels x h x w at the stride of the low map."""
        low = self.reduce(maps[self.low])
        return self.fuse(torch.cat([resize_like(self.pyramid(maps[-1]), low), low], 1))


class FPNHead(nn.Module):
    """Maps from deep to shallow, each added to the next and smoothed."""

    def __init__(self, levels: Sequence[Level], channels: int, separable: bool) -> None:
        super().__init__()
        self.first = low_level(levels)
        used = levels[self.first :]
        self.laterals = nn.ModuleList([nn.Conv2d(level.channels, channels, 1) for level in used])
        self.smooth = nn.ModuleList([conv(channels, channels, 3, separable=separable) for _ in used[:-1]])

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Return B x channels x h x w at the stride of the shallowest map used."""
        maps = [lateral(each) for lateral, each in zip(self.laterals, maps[self.first :], strict=True)]
        top = maps[-1]
        for smooth, lateral in zip(reversed(self.smooth), reversed(maps[:-1]), strict=True):
            top = smooth(lateral + resize_like(top, lateral))
        return top


SPECS = {
    "deeplabv3plus": HeadSpec(DeepLabV3PlusHead, 128, True, 16),
    "fpn": HeadSpec(FPNHead, 64, True, 32),
    "deeplabv3": HeadSpec(DeepLabV3Head, 128, False, 16),
    "pspnet": HeadSpec(PSPHead, 128, False, 16),
    "fcn": HeadSpec(FCNHead, 128, False, 16),
}


def build_head(name: str, levels: Sequence[Level], *, channels: int, separable: bool) -> nn.Module:
    """Return a head with fresh weights.

    Args:
        name: One of :data:`SPECS`.
        levels: Maps of the backbone, from the shallowest.
        channels: Width of the map that it gives.
        separable: Whether its 3 x 3 convolutions are depthwise and 1 x 1.
    """
    head = SPECS[name].build(levels, channels, separable)
    initialise(head)
    return head


def low_level(levels: Sequence[Level]) -> int:
    """Return the index of the map that carries the detail: the deepest one of stride 4 or less, but not the last."""
    fine = [index for index, level in enumerate(levels[:-1]) if level.stride <= 4]
    return fine[-1] if fine else 0


def _rates(stride: int) -> tuple[int, ...]:
    """Return the dilations that see as far at ``stride`` as those of the paper do at 16."""
    return tuple(max(1, rate * 16 // stride) for rate in _RATES)
