"""Mixup and CutMix on whole batches."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torchvision.transforms import v2

from visionkd.config.schema import AugmentConfig

Mixer = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def batch_mixer(augment: AugmentConfig, *, num_classes: int) -> Mixer | None:
    """Return what mixes a batch, or None where nothing is to be mixed.

    The mixer takes float images, B x 3 x H x W, and class indices, B; it returns images and probabilities, B x C.
    Randomness is drawn from torch's default generator.
    """
    mixers: list[v2.Transform] = []
    if augment.mixup_alpha > 0:
        mixers.append(v2.MixUp(alpha=augment.mixup_alpha, num_classes=num_classes))
    if augment.cutmix_alpha > 0:
        mixers.append(v2.CutMix(alpha=augment.cutmix_alpha, num_classes=num_classes))
    if not mixers:
        return None
    return v2.RandomChoice(mixers) if len(mixers) > 1 else mixers[0]
