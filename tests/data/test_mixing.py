from __future__ import annotations

import torch

from visionkd.config.schema import AugmentConfig
from visionkd.data.mixing import batch_mixer


def test_nothing_to_mix():
    assert batch_mixer(AugmentConfig(), num_classes=3) is None


def test_mixup_and_cutmix_mix_images_as_they_mix_labels():
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 16, 16).contiguous()
    targets = torch.arange(4)
    for settings in ({"mixup_alpha": 1.0}, {"cutmix_alpha": 1.0}):
        torch.manual_seed(0)
        mixed, probs, _ = batch_mixer(AugmentConfig(**settings), num_classes=4)(images, targets)
        torch.testing.assert_close(probs.sum(1), torch.ones(4))
        # each image is the mean of its sources, weighted by its labels
        torch.testing.assert_close(mixed.mean((1, 2, 3)), probs @ torch.arange(4.0))
    assert batch_mixer(AugmentConfig(mixup_alpha=1.0, cutmix_alpha=1.0), num_classes=4) is not None
