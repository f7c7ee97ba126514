"""The contrast of images and texts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from visionkd.losses.contrastive import contrastive_loss


def unit(rows: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_it_is_the_mean_of_both_cross_entropies() -> None:
    images, texts, target = unit(5, 0), unit(5, 1), torch.arange(5)
    logits = 10 * images @ texts.T
    expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    found = contrastive_loss(image_embedding=images, text_embedding=texts, scale=10.0)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert contrastive_loss(image_embedding=texts, text_embedding=texts, scale=100.0) < 0.01


def test_equal_texts_share_their_images() -> None:
    images, texts = unit(3, 0), unit(2, 1)[[0, 0, 1]]
    same = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.bool)
    images.requires_grad_()
    shared = contrastive_loss(image_embedding=images, text_embedding=texts, scale=10.0, same=same)
    order = [1, 0, 2]
    swapped = contrastive_loss(image_embedding=images[order], text_embedding=texts, scale=10.0, same=same)
    assert swapped.item() == pytest.approx(shared.item(), rel=1e-5)  # which of them belongs to which does not matter
    plain = contrastive_loss(image_embedding=texts, text_embedding=texts, scale=100.0)
    assert plain.item() == pytest.approx(2 / 3 * 0.6931, rel=1e-2)  # two of three cannot be told apart
