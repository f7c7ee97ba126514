"""Boxes that a quantised detector is compared with, where the data's own do not do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from visionkd.config.schema import RunConfig
from visionkd.data.boxes import novel_of
from visionkd.data.subset import SubsetSource
from visionkd.errors import DataError, UnreadableImageError
from visionkd.models.network import Network
from visionkd.runtime.boxes import FoundBoxes
from visionkd.types import Listener, Progress, Source
from visionkd.workflows._detection import some
from visionkd.workflows._found import found_boxes
from visionkd.workflows._training import torch_device

#: Images whose answers are kept: they speak for the rest.
_MOST_ANSWERED = 256
#: Score from which on what the float network finds counts as being there.
_SURE = 0.3


class RenamedBoxes:
    """A source whose boxes count the classes as a network does.

    Args:
        base: Whose images and boxes these are.
        columns: Output of the network for each class of the boxes.
    """

    boxed = True

    def __init__(self, base: Source, columns: Sequence[int]) -> None:
        self.base, self.columns = base, np.asarray(columns, np.int64)
        self.targets = np.full(len(base), -1, np.int64)  # no image has one class
        #: Classes to measure apart, as the network counts them.
        self.novel = tuple(self.columns[list(novel_of(base))].tolist()) if len(self.columns) else ()

    def __len__(self) -> int:
        return len(self.base)

    def load(self, index: int) -> Any:
        return self.base.load(index)

    def target(self, index: int) -> Mapping[str, np.ndarray]:
        target = self.base.target(index)
        return {**target, "labels": self.columns[target["labels"]]}

    def name(self, index: int) -> str:
        return self.base.name(index)


class BlankBoxes(RenamedBoxes):
    """A source of images of which nobody knows what they show.

    Args:
        base: Whose images these are.
    """

    def __init__(self, base: Source) -> None:
        super().__init__(base, ())

    def target(self, index: int) -> Mapping[str, np.ndarray]:
        return _target(np.zeros((0, 4), np.float32), np.zeros(0, np.int64))


class AnsweredBoxes(RenamedBoxes):
    """A source with the answers of a network as its boxes.

    Args:
        base: Whose images these are.
        answers: What is on each image; None for one that cannot be read.
    """

    def __init__(self, base: Source, answers: Sequence[FoundBoxes | None]) -> None:
        super().__init__(base, ())
        self.answers = list(answers)

    def target(self, index: int) -> Mapping[str, np.ndarray]:
        found = self.answers[index]
        if found is None:
            return _target(np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
        return _target(found.boxes, found.labels)


def _target(boxes: np.ndarray, labels: np.ndarray) -> Mapping[str, np.ndarray]:
    return {"boxes": boxes, "labels": labels, "crowd": np.zeros(len(labels), bool)}


def answered_boxes(network: Network, source: Source, *, config: RunConfig, listener: Listener) -> AnsweredBoxes:
    """Put what a network is sure of in the place of boxes, for some hundred images at most.

    Args:
        network: In float.
        source: Images.
        config: Settings of the run.
        listener: Is told what happens.

    Raises:
        DataError: If no image can be read, or the network finds nothing on any.
    """
    if len(source) > _MOST_ANSWERED:
        listener.message(f"Agreement is measured on {_MOST_ANSWERED} of {len(source)} images")
        source = SubsetSource(source, some(source, _MOST_ANSWERED, seed=0))
    device = torch_device(config.compute)
    network.to(device).eval()
    answers: list[FoundBoxes | None] = []
    for index in range(len(source)):
        try:
            answers.append(found_boxes(network, source.load(index), device=device).above(_SURE))
        except UnreadableImageError:
            answers.append(None)
        listener.progress(Progress("evaluate", index + 1, len(source)))
    if all(answer is None for answer in answers):
        raise DataError("No validation image can be read.", hint="List them with 'visionkd data check DATA'.")
    if not any(answers):
        raise DataError(
            f"The float model finds nothing on these images with a score of {_SURE:g} or more, so that there is nothing"
            " to compare the quantised one with",
            hint="Give images of what it was trained on, or data with boxes.",
        )
    return AnsweredBoxes(source, answers)

