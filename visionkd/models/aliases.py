"""Short names, each for one documented architecture."""

from __future__ import annotations

ALIASES: dict[str, str] = {
    # Vision transformers
    "vit_ti": "vit_tiny_patch16_224",
    "vit_s": "vit_small_patch16_224",
    "vit_b": "vit_base_patch16_224",
    "vit_l": "vit_large_patch16_224",
    "deit_ti": "deit_tiny_patch16_224",
    "deit_s": "deit_small_patch16_224",
    "deit_b": "deit_base_patch16_224",
    "deit3_s": "deit3_small_patch16_224",
    "deit3_b": "deit3_base_patch16_224",
    "deit3_l": "deit3_large_patch16_224",
    "beit_b": "beit_base_patch16_224",
    "beit_l": "beit_large_patch16_224",
    "dinov2_s": "vit_small_patch14_dinov2",
    "dinov2_b": "vit_base_patch14_dinov2",
    "dinov2_l": "vit_large_patch14_dinov2",
    "swin_ti": "swin_tiny_patch4_window7_224",
    "swin_t": "swin_tiny_patch4_window7_224",
    "swin_s": "swin_small_patch4_window7_224",
    "swin_b": "swin_base_patch4_window7_224",
    "swin_l": "swin_large_patch4_window7_224",
    # MLPs
    "mixer_s": "mixer_s16_224",
    "mixer_b": "mixer_b16_224",
    "mixer_l": "mixer_l16_224",
    # Convolutional networks
    "convnext_t": "convnext_tiny",
    "convnext_s": "convnext_small",
    "convnext_b": "convnext_base",
    "convnext_l": "convnext_large",
    "mobilenetv2": "mobilenetv2_100",
    "mobilenet_v2": "mobilenetv2_100",
    "mobilenetv3": "mobilenetv3_large_100",
    "mobilenetv3_large": "mobilenetv3_large_100",
    "mobilenet_v3_large": "mobilenetv3_large_100",
    "mobilenetv3_small": "mobilenetv3_small_100",
    "mobilenet_v3_small": "mobilenetv3_small_100",
    "mobilenetv4_s": "mobilenetv4_conv_small",
    "mobilenetv4_m": "mobilenetv4_conv_medium",
    "wide_resnet50": "wide_resnet50_2",
    "resnext50": "resnext50_32x4d",
    "shufflenetv2": "torchvision/shufflenet_v2_x1_0",
    "squeezenet": "torchvision/squeezenet1_1",
}
