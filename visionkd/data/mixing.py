"""Mixup and CutMix on whole batches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from visionkd.config.schema import AugmentConfig


class BatchMixer:
    """Mixes images of a batch with one another, and whatever is known of them in the same shares.

    Randomness is drawn from torch's default generator.

    Args:
        mixers: Each batch takes one of them.
        num_classes: Number of classes, C.
    """

    def __init__(self, mixers: list[v2.Transform], num_classes: int) -> None:
        self._mix = v2.RandomChoice(mixers) if len(mixers) > 1 else mixers[0]
        self.num_classes = num_classes

    def __call__(
        self, image: Tensor, target: Tensor, teacher_probs: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Mix.

        Args:
            image: B x 3 x H x W, float.
            target: Class indices, B; -1 for an unlabelled image, which becomes a row of zeros.
            teacher_probs: B x C probabilities of the unmixed images, or None.

        Returns:
            Images, targets as probabilities B x C, and the mixed teacher probabilities or None.
        """
        labels = F.one_hot(target.clamp(min=0), self.num_classes).float() * (target >= 0).float()[:, None]
        if teacher_probs is None:
            return *self._mix(image, labels), None
        image, both = self._mix(image, torch.cat([labels, teacher_probs.float()], dim=1))
        return image, both[:, : self.num_classes], both[:, self.num_classes :]


def batch_mixer(augment: AugmentConfig, *, num_classes: int) -> BatchMixer | None:
    """Return what mixes a batch, or None where nothing is to be mixed."""
    mixers: list[v2.Transform] = []
    if augment.mixup_alpha > 0:
        mixers.append(v2.MixUp(alpha=augment.mixup_alpha))
    if augment.cutmix_alpha > 0:
        mixers.append(v2.CutMix(alpha=augment.cutmix_alpha))
    return BatchMixer(mixers, num_classes) if mixers else None
