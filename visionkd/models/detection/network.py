"""A network that answers with boxes, with the face of every other network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from visionkd.errors import WorkError
from visionkd.models.detection import nets
from visionkd.models.network import Network
from visionkd.types import Detections, Output, TaskName


class DetectionNetwork(Network):
    """A detector of torchvision that brings its images to its own statistics, but not to its own size.

    Images of a batch are of one size, each with its picture at the upper left. See
    :class:`visionkd.models.network.Network` for the arguments; ``source`` is ``torchvision``, or ``visionkd`` for a
    detector on a backbone of timm. Labels count from 0; a background class lies hidden in the network.
    """

    task: TaskName = "detection"
    needs_targets = True

    def prepare(self, image: Tensor) -> Tensor:
        """Bring ``image``, B x 3 x H x W in [0, 1], to the network's statistics."""
        return self.normalize(image)

    def forward(self, image: Tensor, target: Sequence[Mapping[str, Tensor]] | None = None) -> Output:
        """Return the boxes in ``image``, B x 3 x H x W in [0, 1]; in train mode the losses instead.

        Args:
            image: Images of one size.
            target: For each image ``boxes``, N x 4 (left, top, right, bottom in its pixels), ``labels``, N, and
                ``crowd``, N, where boxes that stand for many objects are marked: these are not learnt from. Only
                train mode looks at it, and needs it.

        Raises:
            ValueError: In train mode without a target.
        """
        if not self.training:
            return Output(boxes=tuple(self._found(each) for each in self.net(self.prepare(image))))
        if target is None:
            raise ValueError("a detector in train mode needs the targets of its images")
        return Output(losses=self.net(self.prepare(image), [self._wanted(each) for each in target]))

    def _found(self, answer: Mapping[str, Tensor]) -> Detections:
        offset = int(nets.has_background(self.net))
        return Detections(answer["boxes"], answer["scores"], answer["labels"] - offset)

    def _wanted(self, target: Mapping[str, Tensor]) -> dict[str, Tensor]:
        boxes, labels = target["boxes"].float().reshape(-1, 4), target["labels"].long()
        kept = ((boxes[:, 2:] - boxes[:, :2]) > 0).all(1)  # a box without area fits nothing
        if "crowd" in target:
            kept &= ~target["crowd"].bool()
        return {"boxes": boxes[kept], "labels": labels[kept] + int(nets.has_background(self.net))}

    def pyramid(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return the maps that the heads look at, the finest first, B x C x h x w each."""
        return tuple(self.net.backbone(self.prepare(image)).values())

    def forward_features(self, image: Tensor) -> Tensor:
        """Return the coarsest map that the heads look at."""
        return self.pyramid(image)[-1]

    def embed(self, image: Tensor) -> Tensor:
        """Raise: boxes have no pooled embedding."""
        raise WorkError(
            f"'{self.architecture}' finds objects and has no embedding of a whole image",
            hint="A detector is trained on boxes: visionkd train --model DETECTOR_BACKBONE --data DATA",
        )

    # The classes ------------------------------------------------------------------------------------------------------

    def class_layers(self) -> tuple[str, ...]:
        return nets.class_layers(self.net)

    def reset_classifier(self, num_classes: int, classes: tuple[str, ...] | None = None) -> None:
        """Put fresh class layers in place of the present ones; a second stage gets fresh boxes with them."""
        if classes is not None and len(classes) != num_classes:
            raise ValueError(f"{len(classes)} class names for {num_classes} outputs")
        nets.set_classes(self.net, num_classes, num_classes=self.num_classes)
        self._take(num_classes, classes)

    @torch.no_grad()
    def select_classes(self, columns: Sequence[int], classes: tuple[str, ...] | None = None) -> None:
        """Keep the classes in ``columns``, in this order, and forget the others.

        Args:
            columns: Indices of the classes to keep.
            classes: Their names; None takes those that they have.
        """
        if classes is None and self.classes is not None:
            classes = tuple(self.classes[column] for column in columns)
        nets.set_classes(self.net, list(columns), num_classes=self.num_classes)
        self._take(len(columns), classes)

    def _take(self, num_classes: int, classes: tuple[str, ...] | None) -> None:
        self.num_classes = num_classes
        self.model_args["num_classes"] = num_classes
        self.classes = classes

    def set_classifier(self, weight: Tensor, bias: Tensor, classes: tuple[str, ...] | None = None) -> None:
        """Raise: no linear layer on an embedding finds boxes."""
        raise self._no_linear_head("no probe can take its place")
