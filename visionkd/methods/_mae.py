"""A masked autoencoder: the objective ``mae`` of ``visionkd train``. Not a distillation method, hence the underscore.

    L = sum_l mask_l * mean_q (pred_l - target_l)^2 / sum_l mask_l

over the removed patches of the whole batch, with pixels standardised within each patch unless ``normalize_pixels`` is
off. The encoder sees the kept patches alone, a light decoder fills in the others.

He, Chen, Xie, Li, Dollar and Girshick, "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022, arXiv 2111.06377.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from visionkd.methods._masked import MaskedModule, MaskedOptions
from visionkd.models.masked import Masking


@dataclass(frozen=True)
class MAEOptions(MaskedOptions):
    """Options of the objective ``mae``.

    Attributes:
        mask_ratio: Share of the patches that is removed; a fraction of a patch is removed too.
        visible_patches: Patches to keep, in place of the ratio.
        decoder_width: Channels of the decoder.
        decoder_depth: Its blocks.
        decoder_heads: Its attention heads.
        positions: ``sincos`` gives an untrained network the fixed table and never trains it, ``learned`` trains it.
        normalize_pixels: Predict each patch without its mean and spread.
    """

    normalize_pixels: bool = True


class MAE(MaskedModule):
    """Reconstructs removed patches."""

    needs: ClassVar[frozenset[str]] = frozenset()
    Options: ClassVar[type] = MAEOptions
    options: MAEOptions

    def masked_terms(self, image: Tensor, found: Masking) -> dict[str, Tensor]:
        return {"reconstruction_loss": self.reconstruction(image, found)[0]}

    def loss_weights(self) -> Mapping[str, float]:
        return {"reconstruction_loss": 1.0}
