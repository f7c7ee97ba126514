"""What a dense quantised network is compared with, where the data's own targets do not do: for maps and for boxes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from visionkd.config.schema import RunConfig
from visionkd.data.subset import SubsetSource
from visionkd.errors import DataError, UnreadableImageError
from visionkd.models.network import Network
from visionkd.types import Listener, Progress, Source
from visionkd.workflows._segmentation import some
from visionkd.workflows._training import torch_device

#: Images whose answers are kept: they speak for the rest, and large maps would fill the memory.
_MOST_ANSWERED = 256

Answer = TypeVar("Answer")


class OtherTargets:
    """The images of a source; a subclass says which kind of targets they get, and which.

    Args:
        base: Whose images these are.
    """

    def __init__(self, base: Source) -> None:
        self.base = base
        self.targets = np.full(len(base), -1, np.int64)  # no image has one class

    def __len__(self) -> int:
        return len(self.base)

    def load(self, index: int) -> Any:
        return self.base.load(index)

    def target(self, index: int) -> Any:
        raise NotImplementedError

    def name(self, index: int) -> str:
        return self.base.name(index)


def ask(
    network: Network,
    source: Source,
    question: Callable[[Any, Any], Answer],
    *,
    config: RunConfig,
    listener: Listener,
) -> tuple[Source, list[Answer | None]]:
    """Return some hundred images at most, and what a network says of each; None of one that cannot be read.

    Args:
        network: In float.
        source: Images.
        question: Takes a picture and a device, and gives the answer.
        config: Settings of the run.
        listener: Is told what happens.

    Raises:
        DataError: If no image can be read.
    """
    if len(source) > _MOST_ANSWERED:
        listener.message(f"Agreement is measured on {_MOST_ANSWERED} of {len(source)} images")
        source = SubsetSource(source, some(source, _MOST_ANSWERED, seed=0))
    device = torch_device(config.compute)
    network.to(device).eval()
    answers: list[Answer | None] = []
    for index in range(len(source)):
        try:
            answers.append(question(source.load(index), device))
        except UnreadableImageError:
            answers.append(None)
        listener.progress(Progress("evaluate", index + 1, len(source)))
    if all(answer is None for answer in answers):
        raise DataError("No validation image can be read.", hint="List them with 'visionkd data check DATA'.")
    return source, answers
