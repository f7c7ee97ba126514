"""Boxes that a quantised detector is compared with, where the data's own do not do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from visionkd.config.schema import RunConfig
from visionkd.data.boxes import novel_of
from visionkd.errors import DataError
from visionkd.models.network import Network
from visionkd.runtime.boxes import FoundBoxes
from visionkd.types import Listener, Source
from visionkd.workflows._found import found_boxes
from visionkd.workflows._int8_targets import OtherTargets, ask

#: Score from which on what the float network finds counts as being there.
_SURE = 0.3


class RenamedBoxes(OtherTargets):
    """A source whose boxes count the classes as a network does.

    Args:
        base: Whose images and boxes these are.
        columns: Output of the network for each class of the boxes.
    """

    boxed = True

    def __init__(self, base: Source, columns: Sequence[int]) -> None:
        super().__init__(base)
        self.columns = np.asarray(columns, np.int64)
        #: Classes to measure apart, as the network counts them.
        self.novel = tuple(self.columns[list(novel_of(base))].tolist())

    def target(self, index: int) -> Mapping[str, np.ndarray]:
        target = self.base.target(index)
        return {**target, "labels": self.columns[target["labels"]]}


class BlankBoxes(OtherTargets):
    """A source of images of which nobody knows what they show."""

    boxed = True

    def target(self, index: int) -> Mapping[str, np.ndarray]:
        return _target(None)


class AnsweredBoxes(OtherTargets):
    """A source with the answers of a network as its boxes.

    Args:
        base: Whose images these are.
        answers: What is on each image; None for one that cannot be read.
    """

    boxed = True

    def __init__(self, base: Source, answers: Sequence[FoundBoxes | None]) -> None:
        super().__init__(base)
        self.answers = list(answers)

    def target(self, index: int) -> Mapping[str, np.ndarray]:
        return _target(self.answers[index])


def _target(found: FoundBoxes | None) -> Mapping[str, np.ndarray]:
    boxes = np.zeros((0, 4), np.float32) if found is None else found.boxes
    labels = np.zeros(0, np.int64) if found is None else found.labels
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

    def question(picture: Any, device: Any) -> FoundBoxes:
        return found_boxes(network, picture, device=device).above(_SURE)

    source, answers = ask(network, source, question, config=config, listener=listener)
    if not any(answers):
        raise DataError(
            f"The float model finds nothing on these images with a score of {_SURE:g} or more, so that there is nothing"
            " to compare the quantised one with",
            hint="Give images of what it was trained on, or data with boxes.",
        )
    return AnsweredBoxes(source, answers)
