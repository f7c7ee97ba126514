"""Parts of segmentation heads. torch.fx follows all of them, and none looks at its data to decide what it computes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def resize_like(x: Tensor, other: Tensor) -> Tensor:
    """Resize ``x``, B x C x h x w, bilinearly to height and width of ``other``."""
    return F.interpolate(x, size=other.shape[-2:], mode="bilinear", align_corners=False)


def conv(
    in_channels: int, channels: int, kernel: int = 1, *, dilation: int = 1, separable: bool = False
) -> nn.Sequential:
    """Return a convolution of stride 1 with norm and activation.

    Args:
        in_channels: Channels of its input.
        channels: Channels of its output.
        kernel: Odd size of the kernel.
        dilation: Pixels from one tap of the kernel to the next.
        separable: A depthwise convolution, its norm and activation, then 1 x 1 (Chollet, 2017; DeepLabV3+): about
            ``kernel`` squared times fewer products.
    """
    padding = dilation * (kernel // 2)
    layers: list[nn.Module] = []
    if separable and kernel > 1:
        layers = [
            nn.Conv2d(in_channels, in_channels, kernel, 1, padding, dilation, groups=in_channels, bias=False),
            nn.BatchNorm2d(in_channels),
            nn.ReLU(inplace=True),
        ]
        kernel, padding, dilation = 1, 0, 1
    layers += [
        nn.Conv2d(in_channels, channels, kernel, 1, padding, dilation, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
    ]
    return nn.Sequential(*layers)


class GridMean(nn.Module):
    """Means over a grid of ``bins`` x ``bins`` windows that cover the map.

    Where the sides divide by ``bins`` this is adaptive average pooling; elsewhere the windows overlap a little. All are
    of one size, which every engine knows, and adaptive pooling is not. A map smaller than the grid is pooled to its own
    size.
    """

    def __init__(self, bins: int) -> None:
        super().__init__()
        self.bins = bins

    def forward(self, x: Tensor) -> Tensor:
        """Pool ``x``, B x C x H x W, to B x C x bins x bins."""
        if self.bins == 1:
            return x.mean((2, 3), keepdim=True)
        counts = [min(self.bins, side) for side in x.shape[-2:]]
        strides = [side // count for side, count in zip(x.shape[-2:], counts, strict=True)]
        kernels = [side - (n - 1) * s for side, n, s in zip(x.shape[-2:], counts, strides, strict=True)]
        return F.avg_pool2d(x, kernels, strides)

    def extra_repr(self) -> str:
        return f"{self.bins} x {self.bins}"


def pooled(in_channels: int, channels: int, bins: int = 1) -> nn.Sequential:
    """Return a branch that looks at means over a grid.

    It has a bias where others have a norm: one image has too few means for the statistics of a norm.
    """
    return nn.Sequential(GridMean(bins), nn.Conv2d(in_channels, channels, 1), nn.ReLU(inplace=True))


class AtrousPyramid(nn.Module):
    """Atrous spatial pyramid pooling: one map seen at several dilations, and its mean.

    "Rethinking Atrous Convolution for Semantic Image Segmentation" (Chen et al., 2017), section 3.3.

    Args:
        in_channels: Channels of its input.
        channels: Channels of each branch and of the output.
        rates: Dilations of the 3 x 3 branches, beside the 1 x 1 branch and the mean.
        separable: Build the 3 x 3 branches of depthwise convolutions.
    """

    def __init__(self, in_channels: int, channels: int, rates: Sequence[int], *, separable: bool) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [conv(in_channels, channels)]
            + [conv(in_channels, channels, 3, dilation=rate, separable=separable) for rate in rates]
        )
        self.mean = pooled(in_channels, channels)
        self.project = conv((len(rates) + 2) * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return B x channels x H x W for ``x``, B x in_channels x H x W."""
        maps = [branch(x) for branch in self.branches]
        return self.project(torch.cat([*maps, resize_like(self.mean(x), x)], 1))


def initialise(module: nn.Module) -> None:
    """Draw the weights of a head: He's for convolutions; classifiers are begun small by their makers."""
    for each in module.modules():
        if isinstance(each, nn.Conv2d):
            nn.init.kaiming_normal_(each.weight, mode="fan_out", nonlinearity="relu")
            if each.bias is not None:
                nn.init.zeros_(each.bias)


def classifier(channels: int, num_classes: int) -> nn.Conv2d:
    """Return the 1 x 1 convolution that gives the logits, begun so small that all classes are about as likely."""
    layer = nn.Conv2d(channels, num_classes, 1)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
    return layer
