"""Exits: small networks from the features of one stage to class logits, trained beside a student and then dropped.

They follow Hao et al., "One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge Distillation",
NeurIPS 2023, arXiv 2310.19444: separable convolutions on maps, patch merging and transformer blocks on tokens.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

_NUM_HEADS = 4
_TARGET_GRID = (7, 7)  # that tokens are merged down to; also where a Swin ends for images of 224 pixels
_NORM_EPS = 1e-5


class SeparableBlock(nn.Sequential):
    """Halve a map: two depthwise 3 x 3 convolutions, the first with stride 2, each with a 1 x 1, batch norm and ReLU.

    Args:
        in_chs: Channels before.
        out_chs: Channels after.
    """

    def __init__(self, in_chs: int, out_chs: int) -> None:
        layers: list[nn.Module] = []
        for stride, width in ((2, in_chs), (1, out_chs)):
            layers += [
                nn.Conv2d(in_chs, in_chs, 3, stride=stride, padding=1, groups=in_chs, bias=False),
                nn.Conv2d(in_chs, width, 1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
        super().__init__(*layers)


class MapExit(nn.Module):
    """Exit from a feature map.

    Stage ``k`` of four takes ``4 - k`` separable blocks, which double the channels and end at ``width``; the last stage
    takes one 1 x 1 convolution. A map that has come down to one pixel stays one.

    Args:
        channels: Channels of the map.
        stage: 1 to 4, 4 being the deepest.
        width: Channels before the classifier.
        num_classes: Outputs C.

    Shape:
        B x channels x H x W to B x C.
    """

    def __init__(self, *, channels: int, stage: int, width: int, num_classes: int) -> None:
        super().__init__()
        count = 4 - stage
        widths = [channels * 2**number for number in range(count)] + [width]
        self.blocks = nn.Sequential(
            *(SeparableBlock(before, after) for before, after in zip(widths, widths[1:], strict=False))
        )
        self.pool_first = not count  # the convolution commutes with the mean, and one pixel is cheaper than all
        if not count:
            self.blocks.append(nn.Conv2d(channels, width, 1))
        self.head = nn.Linear(width, num_classes)
        self.apply(_initialize)

    def forward(self, feature: Tensor, prefix_tokens: Tensor | None = None) -> Tensor:
        if self.pool_first:
            feature = _pooled(feature)[:, :, None, None]
        return self.head(_pooled(self.blocks(feature)))


class PatchMerging(nn.Module):
    """Join ``size`` x ``size`` neighbours into one token: layer norm, linear, GELU; odd sides are padded with zeros.

    Args:
        channels: Width before.
        width: Width after.
        size: 2, or 1 where only the width changes.
        activation: Whether the GELU follows.
    """

    def __init__(self, channels: int, width: int, *, size: int = 2, activation: bool = True) -> None:
        super().__init__()
        self.size = size
        self.norm = nn.LayerNorm(size * size * channels, eps=_NORM_EPS)
        self.reduction = nn.Linear(size * size * channels, width, bias=False)
        self.act = nn.GELU() if activation else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Take B x H x W x channels, return B x H/size x W/size x width."""
        size = self.size
        rows, columns = -x.shape[1] % size, -x.shape[2] % size
        if rows or columns:
            x = F.pad(x, (0, 0, 0, columns, 0, rows))
        batch, height, width, channels = x.shape
        x = x.reshape(batch, height // size, size, width // size, size, channels)
        # neighbours column by column: (0, 0), (1, 0), (0, 1), (1, 1), counted down first
        x = x.permute(0, 1, 3, 4, 2, 5).flatten(3)
        return self.act(self.reduction(self.norm(x)))


class TokenExit(nn.Module):
    """Exit from tokens that lie on a grid.

    Tokens are merged until the grid is about 7 x 7, then stage ``k`` of four takes ``max(4 - k, 1)`` transformer
    blocks. Their mean is read out, or the class token; there is no final norm. Where the network itself ends in fewer
    tokens, as it does for small images, they are merged until the grid is about that one.

    Args:
        channels: Width of the tokens.
        grid: Height and width of the grid.
        stage: 1 to 4, 4 being the deepest.
        width: Width of the blocks.
        num_classes: Outputs C.
        final_grid: Height and width of the network's deepest map.
        class_token: Let the tokens in front of the grid join the blocks, and read out the first of them.

    Raises:
        ValueError: If class tokens would have to change their width.

    Shape:
        B x channels x H x W, and with ``class_token`` B x P x channels in front, to B x C.
    """

    def __init__(
        self,
        *,
        channels: int,
        grid: tuple[int, int],
        stage: int,
        width: int,
        num_classes: int,
        final_grid: tuple[int, int] = _TARGET_GRID,
        class_token: bool = False,
    ) -> None:
        super().__init__()
        if class_token and channels != width:
            raise ValueError(f"class tokens of width {channels} cannot join blocks of width {width}")
        self.class_token = class_token
        count = num_merges(grid, final_grid)
        self.merging = nn.Sequential()
        for number in range(count):
            # the last of several merges is linear
            activation = number < count - 1 or count == 1
            self.merging.append(PatchMerging(width if number else channels, width, activation=activation))
        if not count and channels != width:
            self.merging.append(PatchMerging(channels, width, size=1))
        self.blocks = nn.Sequential(
            *(
                Block(
                    width,
                    num_heads=math.gcd(width, _NUM_HEADS),
                    mlp_ratio=4.0,
                    qkv_bias=False,
                    norm_layer=partial(nn.LayerNorm, eps=_NORM_EPS),
                )
                for _ in range(max(4 - stage, 1))
            )
        )
        self.head = nn.Linear(width, num_classes)
        self.apply(_initialize)

    def forward(self, feature: Tensor, prefix_tokens: Tensor | None = None) -> Tensor:
        tokens = self.merging(feature.permute(0, 2, 3, 1)).flatten(1, 2)
        if not self.class_token:
            return self.head(self.blocks(tokens).mean(1))
        assert prefix_tokens is not None, "an exit that reads the class token is given it"
        return self.head(self.blocks(torch.cat([prefix_tokens, tokens], dim=1))[:, 0])


def _pooled(feature: Tensor) -> Tensor:
    """Return the mean over the pixels of B x C x H x W."""
    if feature.is_contiguous(memory_format=torch.channels_last):
        return feature.flatten(2).transpose(1, 2).mean(1)  # so that its gradient has channels last too
    return feature.mean((2, 3))


def num_merges(grid: tuple[int, int], final_grid: tuple[int, int] = _TARGET_GRID) -> int:
    """Return how often to halve a grid: ``floor(log2(sqrt(H * W) / side))`` with a side of 7, or the final grid's."""
    height, width = grid
    target = min(math.prod(_TARGET_GRID), math.prod(final_grid))
    count = 0
    while height * width >= target * 4 ** (count + 1) and min(height, width) >= 2 ** (count + 1):
        count += 1
    return count


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
        nn.init.zeros_(module.bias)
