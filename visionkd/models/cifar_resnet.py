"""The ResNets of He et al. for small images, as timm models.

"Deep Residual Learning for Image Recognition", section 4.2: a 3 x 3 stem without pooling, three stages of
``(depth - 2) / 6`` basic blocks with 16, 32 and 64 channels, and strides 1, 2, 2. Importing this module registers
``cifar_resnet8`` to ``cifar_resnet110`` with timm, so that ``timm.create_model("cifar_resnet20")`` works from then on,
and ``cifar_resnet``, whose ``blocks`` and ``channels`` are free in each stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from timm.layers import DropPath, create_classifier
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F

CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2470, 0.2435, 0.2616)


class PadShortcut(nn.Module):
    """Shortcut without parameters: every ``stride``-th pixel, new channels filled with zeros (the paper's option A)."""

    def __init__(self, in_chs: int, out_chs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.extra = out_chs - in_chs

    def forward(self, x: Tensor) -> Tensor:
        low = self.extra // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, low, self.extra - low))


class Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut."""

    def __init__(self, in_chs: int, out_chs: int, stride: int, shortcut: str, drop_path: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chs, out_chs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_chs)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out_chs, out_chs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_chs)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.act2 = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_chs != out_chs:
            if shortcut == "conv":
                conv = nn.Conv2d(in_chs, out_chs, 1, stride=stride, bias=False)
                self.downsample = nn.Sequential(conv, nn.BatchNorm2d(out_chs))
            else:
                self.downsample = PadShortcut(in_chs, out_chs, stride)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.drop_path(self.bn2(self.conv2(x)))
        return self.act2(x + shortcut)


def _stage_blocks(depth: int | None, blocks: Sequence[int] | None) -> tuple[int, ...]:
    """Return the blocks of each stage."""
    if blocks is None:
        each, rest = divmod((20 if depth is None else depth) - 2, 6)
        if rest or each < 1:
            raise ValueError(f"depth {depth} is not 6 n + 2")
        return (each,) * 3
    if depth is not None:
        raise ValueError(f"blocks {blocks} contradict depth {depth}: 'cifar_resnet' takes blocks")
    if len(blocks) != 3 or any(type(count) is not int or count < 1 for count in blocks):
        raise ValueError(f"blocks {blocks} are not three whole numbers from 1 up")
    return tuple(blocks)


class CifarResNet(nn.Module):
    """ResNet for small images.

    Args:
        depth: Number of weighted layers, ``6 n + 2``; None where ``blocks`` says how many there are.
        num_classes: Outputs; 0 leaves the classifier out.
        in_chans: Channels of the images.
        width: Multiplier of all channel counts (16, 32, 64).
        shortcut: ``conv`` takes a 1 x 1 convolution where the shape changes, ``pad`` the paper's option A.
        global_pool: timm's name of the pooling before the classifier.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Largest stochastic depth rate; it grows linearly with depth.
        blocks: Blocks of each of the three stages, in place of ``depth``.
        channels: Channels of each stage before ``width`` multiplies them.

    Shape:
        Input B x in_chans x H x W, output B x num_classes.
    """

    def __init__(
        self,
        depth: int | None = None,
        num_classes: int = 10,
        in_chans: int = 3,
        width: float = 1.0,
        shortcut: Literal["conv", "pad"] = "conv",
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        blocks: Sequence[int] | None = None,
        channels: Sequence[int] = (16, 32, 64),
    ) -> None:
        super().__init__()
        counts = _stage_blocks(depth, blocks)
        if shortcut not in ("conv", "pad"):
            raise ValueError(f"shortcut '{shortcut}' is neither 'conv' nor 'pad'")
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        if len(channels) != 3 or any(type(base) is not int or base < 1 for base in channels):
            raise ValueError(f"channels {channels} are not three whole numbers from 1 up")
        channels = [max(1, round(base * width)) for base in channels]
        self.conv1 = nn.Conv2d(in_chans, channels[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels[0])
        self.act1 = nn.ReLU(inplace=True)
        self.feature_info = [{"num_chs": channels[0], "reduction": 1, "module": "act1"}]
        rates = iter(torch.linspace(0, drop_path_rate, sum(counts), device="cpu").tolist())
        in_chs = channels[0]
        for stage, out_chs in enumerate(channels):
            layers = []
            for index in range(counts[stage]):
                stride = 2 if stage > 0 and index == 0 else 1
                layers.append(Block(in_chs, out_chs, stride, shortcut, next(rates)))
                in_chs = out_chs
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
            self.feature_info.append({"num_chs": out_chs, "reduction": 2**stage, "module": f"layer{stage + 1}"})
        self.num_features = self.head_hidden_size = in_chs
        self.global_pool, self.fc = create_classifier(in_chs, num_classes, pool_type=global_pool)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        return {"stem": r"^conv1|bn1", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        if enable:
            raise NotImplementedError("cifar_resnet networks are too small to need gradient checkpointing")

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str = "avg") -> None:
        """Replace the classifier by a fresh one with ``num_classes`` outputs."""
        self.num_classes = num_classes
        device, dtype = self.conv1.weight.device, self.conv1.weight.dtype
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=global_pool)
        self.fc.to(device=device, dtype=dtype)

    def _stages(self, x: Tensor) -> list[Tensor]:
        maps = [self.act1(self.bn1(self.conv1(x)))]
        for layer in (self.layer1, self.layer2, self.layer3):
            maps.append(layer(maps[-1]))
        return maps

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | tuple[int, ...] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Return the maps of the stages in ``indices`` (0 is the stem; an int takes the last so many).

        ``norm`` and ``stop_early`` are part of timm's interface and change nothing here.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt '{output_fmt}' is not 'NCHW'")
        maps = self._stages(x)
        if indices is None:
            chosen = list(range(len(maps)))
        elif isinstance(indices, int):
            chosen = list(range(len(maps) - indices, len(maps)))
        else:
            chosen = [index % len(maps) for index in indices]
        picked = [maps[index] for index in chosen]
        return picked if intermediates_only else (maps[-1], picked)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last map, B x D x H/4 x W/4."""
        return self._stages(x)[-1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits, or the pooled embedding B x D with ``pre_logits``."""
        x = self.global_pool(x)
        if self.drop_rate > 0:
            x = F.dropout(x, p=self.drop_rate, training=self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


DEPTHS = (8, 14, 20, 32, 44, 56, 110)
default_cfgs = generate_default_cfgs(
    {
        f"cifar_resnet{name}.untrained": {
            "url": "",
            "num_classes": 10,
            "input_size": (3, 32, 32),
            "pool_size": (8, 8),
            "crop_pct": 1.0,
            "interpolation": "bilinear",
            "mean": CIFAR_MEAN,
            "std": CIFAR_STD,
            "first_conv": "conv1",
            "classifier": "fc",
        }
        for name in ("", *DEPTHS)
    }
)


_FEATURES = {"out_indices": (0, 1, 2, 3)}  # of the maps that timm's features_only gives


def _create(depth: int, pretrained: bool, **kwargs: Any) -> CifarResNet:
    return build_model_with_cfg(
        CifarResNet, f"cifar_resnet{depth}", pretrained, depth=depth, feature_cfg=_FEATURES, **kwargs
    )


@register_model
def cifar_resnet(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet with free ``blocks`` and ``channels`` in each stage; ResNet-20 where nothing is said."""
    return build_model_with_cfg(CifarResNet, "cifar_resnet", pretrained, feature_cfg=_FEATURES, **kwargs)


@register_model
def cifar_resnet8(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-8, 0.08 M parameters."""
    return _create(8, pretrained, **kwargs)


@register_model
def cifar_resnet14(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-14, 0.18 M parameters."""
    return _create(14, pretrained, **kwargs)


@register_model
def cifar_resnet20(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-20, 0.27 M parameters."""
    return _create(20, pretrained, **kwargs)


@register_model
def cifar_resnet32(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-32, 0.47 M parameters."""
    return _create(32, pretrained, **kwargs)


@register_model
def cifar_resnet44(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-44, 0.66 M parameters."""
    return _create(44, pretrained, **kwargs)


@register_model
def cifar_resnet56(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-56, 0.86 M parameters."""
    return _create(56, pretrained, **kwargs)


@register_model
def cifar_resnet110(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-110, 1.73 M parameters."""
    return _create(110, pretrained, **kwargs)
