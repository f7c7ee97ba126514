"""MobileNetV2 with free depth, kernel and expansion in each stage, as a timm model.

"MobileNetV2: Inverted Residuals and Linear Bottlenecks" (Sandler et al., 2018), table 2. timm's own MobileNetV2 scales
all stages together; this one, built of timm's blocks, is what a search for a student varies. Importing the module
registers ``mobilenetv2_free`` with timm.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._efficientnet_builder import decode_arch_def, round_channels
from timm.models.efficientnet import EfficientNet
from torch import nn

_CHANNELS = (24, 32, 64, 96, 160, 320)
DEPTHS = (2, 3, 4, 3, 3, 1)
STRIDES = (2, 2, 2, 1, 2, 1)

default_cfgs = generate_default_cfgs(
    {
        "mobilenetv2_free.untrained": {
            "url": "",
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "pool_size": (7, 7),
            "crop_pct": 0.875,
            "interpolation": "bicubic",
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "first_conv": "conv_stem",
            "classifier": "classifier",
        }
    }
)


class FreeMobileNetV2(EfficientNet):
    """MobileNetV2.

    Args:
        width: Multiplier of the channels of all stages; the last 1280 are never narrowed, as in the paper.
        depths: Blocks of each of the six stages behind the first.
        kernels: Kernel of their depthwise convolutions, odd.
        expansions: By how much their blocks are widened inside.
        strides: Their strides; ``(1, 2, 2, 1, 2, 1)`` suits images of 32 to 64 pixels.
        kwargs: Arguments of timm's ``EfficientNet``.

    Shape:
        Input B x 3 x H x W, output B x num_classes.
    """

    def __init__(
        self,
        width: float = 1.0,
        depths: Sequence[int] = DEPTHS,
        kernels: Sequence[int] = (3,) * 6,
        expansions: Sequence[int] = (6,) * 6,
        strides: Sequence[int] = STRIDES,
        **kwargs: Any,
    ) -> None:
        lists = {"depths": depths, "kernels": kernels, "expansions": expansions, "strides": strides}
        for name, values in lists.items():
            if len(values) != len(_CHANNELS) or any(type(value) is not int or value < 1 for value in values):
                raise ValueError(f"{name} {values} are not {len(_CHANNELS)} whole numbers from 1 up")
        if any(kernel % 2 == 0 for kernel in kernels):
            raise ValueError(f"kernels {kernels} are not all odd")
        stages = zip(depths, kernels, strides, expansions, _CHANNELS, strict=True)
        definition = [["ds_r1_k3_s1_c16"], *([f"ir_r{d}_k{k}_s{s}_e{e}_c{c}"] for d, k, s, e, c in stages)]
        super().__init__(
            block_args=decode_arch_def(definition),
            num_features=max(1280, round_channels(1280, width)),
            round_chs_fn=partial(round_channels, multiplier=width),
            act_layer=kwargs.pop("act_layer", nn.ReLU6),
            **kwargs,
        )


@register_model
def mobilenetv2_free(pretrained: bool = False, **kwargs: Any) -> FreeMobileNetV2:
    """MobileNetV2 with free depth, kernel and expansion; 3.5 M parameters where nothing is said."""
    features = {"flatten_sequential": True}  # the maps that timm's features_only gives lie between its blocks
    return build_model_with_cfg(FreeMobileNetV2, "mobilenetv2_free", pretrained, feature_cfg=features, **kwargs)
