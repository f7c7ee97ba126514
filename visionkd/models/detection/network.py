"""A network that answers with boxes, with the face of every other network."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from visionkd.errors import WorkError
from visionkd.models.detection import nets, two_stages
from visionkd.models.detection.core import PRECISE, Core, Shell, anchors_of, candidates, rule_of
from visionkd.models.modes import evaluating
from visionkd.models.network import Network
from visionkd.runtime.boxes import BoxRule
from visionkd.types import Detections, Output, TaskName


class DetectionNetwork(Network):
    """A detector of torchvision that brings its images to its own statistics, but not to its own size.

    Images of a batch are of one size, each with its picture at the upper left. See
    :class:`visionkd.models.network.Network` for the arguments; ``source`` is ``torchvision``, or ``visionkd`` for a
    detector on a backbone of timm. Labels count from 0; a background class lies hidden in the network.
    """

    task: TaskName = "detection"
    needs_targets = True
    precise = PRECISE

    def __init__(self, net: nn.Module, **settings: Any) -> None:
        super().__init__(net, **settings)
        #: Whether a second stage looks at each proposal of the first.
        self.two_stage = hasattr(net, "roi_heads")
        #: What makes losses and boxes of a graph's answers; None where ``net`` is a whole detector.
        self.shell: Shell | None = None
        self._anchors: dict[tuple[int, ...], list[Tensor]] = {}
        self._offset = int(nets.has_background(net))

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
        image = self.prepare(image)
        if not self.training:
            return Output(boxes=tuple(self._found(each) for each in self._run(image, None)))
        if target is None:
            raise ValueError("a detector in train mode needs the targets of its images")
        return Output(losses=self._run(image, [self.wanted(each) for each in target]))

    def _run(self, image: Tensor, target: Any) -> Any:
        return self.net(image, target) if self.shell is None else self.shell(image, *self.net(image), target)

    def _found(self, answer: Mapping[str, Tensor]) -> Detections:
        return Detections(answer["boxes"], answer["scores"], answer["labels"] - self._offset)

    def wanted(self, target: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what is learnt from the targets of one image: ``boxes``, and ``labels`` as torchvision counts them."""
        boxes, labels = target["boxes"].float().reshape(-1, 4), target["labels"].long()
        kept = ((boxes[:, 2:] - boxes[:, :2]) > 0).all(1)  # a box without area fits nothing
        if "crowd" in target:
            kept &= ~target["crowd"].bool()
        return {"boxes": boxes[kept], "labels": labels[kept] + self._offset}

    def pyramid(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return the maps that the heads look at, the finest first, B x C x h x w each."""
        image = self.prepare(image)
        return tuple(self.net.backbone(image).values()) if self.shell is None else tuple(self.net(image)[1])

    def forward_features(self, image: Tensor) -> Tensor:
        """Return the coarsest map that the heads look at."""
        return self.pyramid(image)[-1]

    def embed(self, image: Tensor) -> Tensor:
        """Raise: boxes have no pooled embedding."""
        raise WorkError(
            f"'{self.architecture}' finds objects and has no embedding of a whole image",
            hint="A detector is trained on boxes: visionkd train --model DETECTOR_BACKBONE --data DATA",
        )

    # Model files ------------------------------------------------------------------------------------------------------

    def core(self) -> nn.Module:
        if self.two_stage or self.shell is not None:
            return self.net
        return Core(self.net).train(self.net.training)

    def take_graph(self, graph: nn.Module) -> None:
        """Put a graph of :meth:`core` in the place of the detector; what has no weights of it stays."""
        if self.shell is None:
            self.shell = Shell(self.net)
        self.net = graph

    def candidates(self, image: Tensor, anchors: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return every box with its scores, as a model file does: before thresholds, and with many on one object.

        Args:
            image: B x 3 x H x W in [0, 1].
            anchors: Those of an image of this size, from :meth:`anchors`, joined; None makes them.

        Returns:
            Boxes, B x N x 4 in pixels of the image and within it, and scores, B x N x K. Of two stages N is the most
            proposals that an image may have, what is behind the last one is 0, and boxes are B x N x K x 4 where each
            class has its own.
        """
        size = (int(image.shape[-2]), int(image.shape[-1]))
        if anchors is None:
            anchors = torch.cat(self.anchors(size)).to(image.device)
        if self.two_stage:
            maps = self.net.backbone(self.prepare(image))
            return two_stages.candidates(self.net, maps, anchors, self._anchors_of_levels(size), size)
        answers, _ = self.core()(self.prepare(image))
        return candidates(self._detector, answers, anchors, size)

    def anchors(self, img_size: tuple[int, int] | None = None) -> list[Tensor]:
        """Return the anchors of an image for each level of the pyramid, N x 4 in pixels.

        Args:
            img_size: Height and width; None takes the network's own.
        """
        size = tuple(img_size or self.input.img_size)
        if size in self._anchors:
            return self._anchors[size]
        graph = copy.deepcopy(self.net.backbone if self.two_stage else self.core()).to("meta")
        with torch.no_grad(), evaluating(graph):
            answer = graph(torch.empty(1, 3, *size, device="meta"))
        sizes = [tuple(each.shape[-2:]) for each in (answer.values() if self.two_stage else answer[1])]
        if self.two_stage:
            two_stages.settle(self.net, dict(zip(answer, sizes, strict=True)), size)
        self._anchors[size] = anchors_of(self._detector, sizes, size)
        return self._anchors[size]

    def _anchors_of_levels(self, img_size: tuple[int, int] | None = None) -> list[int]:
        return [len(each) for each in self.anchors(img_size)]

    @property
    def num_candidates(self) -> int:
        """Rows of :meth:`candidates` about an image of the network's own size."""
        levels = self._anchors_of_levels()
        return two_stages.count(self.net, levels) if self.two_stage else sum(levels)

    def rule(self, img_size: tuple[int, int] | None = None) -> BoxRule:
        """Return how :meth:`forward` chooses among the candidates of an image; the argument is as above."""
        return two_stages.rule_of(self.net) if self.two_stage else rule_of(self._detector, self.anchors(img_size))

    def no_plain_graph(self) -> WorkError:
        """Return the error about a second stage where a plain graph is needed, as INT8 needs one."""
        return WorkError(
            f"'{self.architecture}' looks at its image in two stages, and which parts of it the second one sees depends"
            " on the first: INT8 is placed in plain graphs only",
            hint="Export it in float, without --int8; or distil it into a detector of a single stage: fcos_BACKBONE,"
            " retinanet_BACKBONE or ssdlite320_mobilenet_v3_large.",
        )

    @property
    def _detector(self) -> nn.Module:
        return self.net if self.shell is None else self.shell.net

    # The classes ------------------------------------------------------------------------------------------------------

    def class_layers(self) -> tuple[str, ...]:
        return self.heads or nets.class_layers(self.net)

    def _check_classes(self) -> None:
        if self.shell is not None:
            raise WorkError(
                f"the classes of a quantised '{self.architecture}' cannot be changed",
                hint="Change those of its float model, then quantise the result.",
            )

    def reset_classifier(self, num_classes: int, classes: tuple[str, ...] | None = None) -> None:
        """Put fresh class layers in place of the present ones; a second stage gets fresh boxes with them."""
        if classes is not None and len(classes) != num_classes:
            raise ValueError(f"{len(classes)} class names for {num_classes} outputs")
        self._check_classes()
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
        self._check_classes()
        nets.set_classes(self.net, list(columns), num_classes=self.num_classes)
        self._take(len(columns), classes)

    def _take(self, num_classes: int, classes: tuple[str, ...] | None) -> None:
        self.num_classes = num_classes
        self.model_args["num_classes"] = num_classes
        self.classes = classes

    def set_classifier(self, weight: Tensor, bias: Tensor, classes: tuple[str, ...] | None = None) -> None:
        """Raise: no linear layer on an embedding finds boxes."""
        raise self._no_linear_head("no probe can take its place")
