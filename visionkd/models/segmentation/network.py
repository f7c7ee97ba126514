"""A network that names the class of every pixel, with the face of every other network."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from visionkd.errors import WorkError
from visionkd.models.modes import evaluating
from visionkd.models.network import Network, main_logits
from visionkd.types import Output, TaskName


class SegmentationNetwork(Network):
    """A segmentation network that brings its images to its own statistics, but not to its own size.

    Training crops may have any size; whoever evaluates decides about the size of the images. See
    :class:`visionkd.models.network.Network` for the arguments; ``source`` is ``torchvision``, or ``visionkd`` for a
    head of this project on a backbone of timm.

    Attributes:
        stride: Pixels of the image for one step in the logits.
    """

    task: TaskName = "segmentation"
    auxiliary = ("aux_head.", "aux_classifier.")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stride = self._measured_stride()

    def prepare(self, image: Tensor) -> Tensor:
        """Bring ``image``, B x C x H x W in [0, 1], to the network's statistics.

        Planes beside red, green and blue stay as they are; they are zero where the image has none.
        """
        planes = image.shape[1]
        if planes not in (3, self.in_chans):
            raise ValueError(f"'{self.architecture}' takes images of {self.in_chans} planes, not of {planes}")
        if planes < self.in_chans:
            image = torch.cat([image, image.new_zeros(len(image), self.in_chans - planes, *image.shape[2:])], 1)
        return self.normalize(image)

    def forward(self, image: Tensor) -> Output:
        """Return the logits for ``image``, B x C x H x W in [0, 1], and in train mode those of auxiliary heads.

        Both are B x classes x h x w; the logits lie at :attr:`stride`.
        """
        answer = self.net(self.prepare(image))
        return Output(logits=main_logits(answer), aux=self.auxiliary_logits(answer))

    def auxiliary_logits(self, answer: Any) -> tuple[Tensor, ...]:
        return tuple(answer[1:]) if isinstance(answer, tuple) else ()

    def at_input_size(self, output: Output, img_size: tuple[int, int] | None = None) -> Tensor:
        """Return the logits of ``output`` resized bilinearly, B x classes x H x W.

        Args:
            output: What :meth:`forward` returned.
            img_size: Height and width; None takes the network's own input size.
        """
        size = self.input.img_size if img_size is None else img_size
        return F.interpolate(output.logits, size=tuple(size), mode="bilinear", align_corners=False)

    def forward_features(self, image: Tensor) -> Tensor:
        """Return the deepest map of the backbone."""
        if self.heads:
            return super().forward_features(image)  # raises
        return self.net.forward_features(self.prepare(image))

    def embed(self, image: Tensor) -> Tensor:
        """Raise: a map of classes has no pooled embedding."""
        raise WorkError(
            f"'{self.architecture}' names pixels and has no embedding of a whole image",
            hint="A teacher for pixels is trained on them: visionkd train --model HEAD_BACKBONE --data DATA",
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, stride {self.stride}"

    def _measured_stride(self) -> int:
        """Look at the logits of an image whose sides all strides divide, or else of one of the network's own size."""
        rounded = (-(-side // 64) * 64 for side in self.input.img_size)
        for height, width in (tuple(rounded), self.input.img_size):
            with torch.no_grad(), evaluating(self.net):
                try:  # shapes alone: nothing is computed
                    blank = torch.empty(1, self.in_chans, height, width, device="meta")
                    logits = main_logits(copy.deepcopy(self.net).to("meta")(blank))
                except (NotImplementedError, RuntimeError, AssertionError):
                    continue
            return max(1, round(height / logits.shape[-2]))
        raise WorkError(f"'{self.architecture}' does not take images of {self.input.img_size}")
