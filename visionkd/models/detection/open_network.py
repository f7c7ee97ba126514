"""A detector that names classes it never saw a box of: its classes are texts, and others can take their place.

Wang et al., "Object-Aware Distillation Pyramid for Open-Vocabulary Object Detection", CVPR 2023, arXiv 2303.05892.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from visionkd.errors import Problem, RequestError
from visionkd.models.detection import nets
from visionkd.models.detection.names import split_name
from visionkd.models.detection.network import DetectionNetwork
from visionkd.models.detection.open_heads import OpenRoIHeads, OpenVocabulary
from visionkd.models.network import Network
from visionkd.types import Output


class OpenVocabularyDetector(DetectionNetwork):
    """A two-stage detector whose classes are texts.

    The text encoder is no part of it: ``net`` holds the embeddings of its class names and needs nothing else to answer.
    See :class:`visionkd.models.detection.network.DetectionNetwork` for arguments and answers.
    """

    @property
    def spec(self) -> OpenVocabulary:
        """What it was made with."""
        return OpenVocabulary.from_dict(self.model_args[nets.OPEN_ARG])

    @property
    def second_stage(self) -> OpenRoIHeads:
        """What looks at each box."""
        return self.net.roi_heads

    @property
    def texts(self) -> Tensor:
        """Embeddings of the class names, K x dim."""
        heads = self.second_stage
        return heads.object_classifier.texts[heads.place]

    @property
    def base(self) -> tuple[bool, ...]:
        """Which of the classes had boxes in training, K."""
        return self.spec.base

    def learn(self, image: Tensor, target: Sequence[Mapping[str, Tensor]]) -> tuple[Output, dict[str, Tensor]]:
        """Return the detector's own losses, and the maps of its pyramid by name, for images in train mode.

        Args:
            image: B x 3 x H x W in [0, 1].
            target: As :meth:`forward` takes it.
        """
        images, wanted = self.net.transform(self.prepare(image), [self.wanted(each) for each in target])
        features = self.net.backbone(images.tensors)
        proposals, first = self.net.rpn(images, features, wanted)
        _, second = self.net.roi_heads(features, proposals, images.image_sizes, wanted)
        return Output(losses={**first, **second}), features

    # The classes ------------------------------------------------------------------------------------------------------

    def set_classes(self, names: Sequence[str], texts: Tensor, *, base: Sequence[bool]) -> None:
        """Answer for other classes from here on.

        Args:
            names: K names.
            texts: K x dim, their embeddings by the encoder that the detector was trained with.
            base: Which of them had boxes in training, K.

        Raises:
            ValueError: If the embeddings are of another length, or another number.
        """
        if not len(names) == len(texts) == len(base):
            raise ValueError(f"{len(texts)} texts and {len(base)} kinds for {len(names)} classes")
        self.second_stage.set_classes(texts, base)
        self._change(base=[bool(each) for each in base])
        self._take(len(names), tuple(names))

    def learn_novel(self, learn: bool) -> None:
        """Let the box head learn novel classes too, from boxes that nobody drew; as it is made, it does not."""
        classifier = self.second_stage.box_predictor.classifier
        classifier.num_base = self.num_classes if learn else self.second_stage.num_base

    def _change(self, **values: Any) -> None:
        self.model_args[nets.OPEN_ARG] = {**self.model_args[nets.OPEN_ARG], **values}

    def calibrate(self, base_power: float | None, novel_power: float | None = None) -> None:
        """Set the share of the head that learned from boxes in the scores; see :class:`OpenVocabulary`."""
        heads = self.second_stage
        heads.base_power, heads.novel_power = base_power, novel_power
        self._change(base_power=base_power, novel_power=novel_power)

    def reset_classifier(self, num_classes: int, classes: tuple[str, ...] | None = None) -> None:
        """Put random texts in place of the present ones, all of base classes; :meth:`set_classes` gives real ones."""
        if classes is not None and len(classes) != num_classes:
            raise ValueError(f"{len(classes)} class names for {num_classes} outputs")
        texts = F.normalize(torch.randn(num_classes, self.spec.dim), dim=1)
        self.set_classes(classes or _numbers(num_classes), texts, base=[True] * num_classes)
        self.classes = classes

    @torch.no_grad()
    def select_classes(self, columns: Sequence[int], classes: tuple[str, ...] | None = None) -> None:
        """Keep the classes in ``columns``, in this order, and forget the others.

        Args:
            columns: Indices of the classes to keep.
            classes: Their names; None takes those that they have.
        """
        columns, own = list(columns), self.classes or _numbers(self.num_classes)
        names = classes or tuple(own[column] for column in columns)
        self.set_classes(names, self.texts[columns], base=[self.base[column] for column in columns])


def _numbers(count: int) -> tuple[str, ...]:
    return tuple(str(number) for number in range(count))


def open_vocabulary(
    network: Network, spec: OpenVocabulary, *, names: Sequence[str], texts: Tensor
) -> OpenVocabularyDetector:
    """Return a detector for these classes on the backbone of ``network``; everything else of it is fresh.

    One that is an open-vocabulary detector already goes on with all of its weights.

    Args:
        network: ``fasterrcnn_BACKBONE``.
        spec: What to make of it. Of a detector that is one already, only what no weights depend on is taken.
        names: K class names.
        texts: K x dim.

    Raises:
        RequestError: If it is of another kind, or was made with other sizes.
    """
    if isinstance(network, OpenVocabularyDetector):
        return _gone_on(network, spec, names=names, texts=texts)
    if problem := kind_problem(network):
        raise RequestError(Problem("--student", problem, "Take one such as fasterrcnn_resnet50."))
    args = {**network.model_args, nets.OPEN_ARG: spec.to_dict(), "num_classes": len(names)}
    net = nets.build(network.architecture, args, body=network.net.backbone.body)
    made = OpenVocabularyDetector(
        net, architecture=network.architecture, source="visionkd", input=network.input, model_args=args,
        pretrained_tag=network.pretrained_tag, notes=network.notes,
    )  # fmt: skip
    made.set_classes(names, texts, base=spec.base)
    return made.train(network.training)


def kind_problem(network: Network) -> str | None:
    """Say why no open-vocabulary detector can be made of a network; None where one can."""
    parts = split_name(network.architecture) if network.source == "visionkd" else None
    if parts is not None and parts[0] == "fasterrcnn" and network.quantization is None:
        return None
    said = f"'{network.architecture}' is no fasterrcnn on a backbone of timm"
    if network.source == "torchvision" and network.task == "detection":
        said += ", and was published with boxes of classes that count as novel"
    return said


def _gone_on(
    network: OpenVocabularyDetector, spec: OpenVocabulary, *, names: Sequence[str], texts: Tensor
) -> OpenVocabularyDetector:
    own, problems = network.spec, []
    for name in ("dim", "head_convs", "head_dim"):
        if getattr(own, name) != getattr(spec, name):
            message = f"{getattr(spec, name)} is asked for, and the student has {getattr(own, name)}"
            problems.append(Problem("--teacher" if name == "dim" else f"options.{name}", message))
    if own.identity != spec.identity:
        message = f"the student was trained with the texts of another encoder ('{own.encoder}', {own.identity})"
        problems.append(Problem("--teacher", message, "Take that encoder, or begin with a fresh student."))
    if problems:
        raise RequestError(problems)
    values: dict[str, Any] = spec.to_dict()
    network.model_args[nets.OPEN_ARG] = values
    args = {**network.model_args, "num_classes": len(names)}
    net = nets.build(network.architecture, args, body=network.net.backbone.body)
    kept = {name: value for name, value in network.net.state_dict().items() if not name.endswith(".texts")}
    net.load_state_dict({**net.state_dict(), **kept})
    network.net = net.train(network.training)
    network.set_classes(names, texts, base=spec.base)
    return network
