"""Contrast of images and texts: each finds its partner among those of the batch.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021, arXiv 2103.00020.
"""

from __future__ import annotations

import torch
from torch import Tensor

from visionkd.losses.full_precision import product


def contrastive_loss(
    *, image_embedding: Tensor, text_embedding: Tensor, scale: Tensor | float, same: Tensor | None = None
) -> Tensor:
    """Return the mean cross-entropy of images to texts and of texts to images.

    Args:
        image_embedding: B x D, of length 1.
        text_embedding: B x D, of length 1; row i is the partner of image i.
        scale: Factor of the cosines, 1 / temperature.
        same: B x B of bool, which texts say the same, the diagonal among them: an image then has all of those as its
            partners, in equal shares. None takes texts that all differ.
    """
    logits = scale * product(image_embedding, text_embedding.T)
    if same is None:
        same = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    target = same.float() / same.sum(1, keepdim=True)
    to_texts = -(target * logits.log_softmax(1)).sum(1).mean()
    to_images = -(target * logits.T.log_softmax(1)).sum(1).mean()
    return (to_texts + to_images) / 2
