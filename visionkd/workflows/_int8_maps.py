"""Maps of classes that a quantised segmentation network is compared with, where the data's own do not do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from visionkd.config.schema import RunConfig
from visionkd.data.subset import SubsetSource
from visionkd.errors import DataError, UnreadableImageError
from visionkd.models.network import Network
from visionkd.types import IGNORE, Listener, Progress, Source
from visionkd.workflows._segmentation import class_map, some
from visionkd.workflows._training import torch_device

#: Images whose answers are kept: they speak for the rest, and large ones would fill the memory.
_MOST_ANSWERED = 256


class RenamedMaps:
    """A source whose maps count the classes as a network does.

    Args:
        base: Whose images and maps these are.
        columns: Output of the network for each class of the maps.
    """

    maps = True

    def __init__(self, base: Source, columns: Sequence[int]) -> None:
        self.base, self.columns = base, tuple(columns)
        self.targets = np.full(len(base), -1, np.int64)  # no image has one class

    def __len__(self) -> int:
        return len(self.base)

    def load(self, index: int) -> Any:
        return self.base.load(index)

    def target(self, index: int) -> np.ndarray:
        table = np.full(256, IGNORE, np.uint8)
        table[: len(self.columns)] = self.columns
        return table[self.base.target(index)]

    def name(self, index: int) -> str:
        return self.base.name(index)


class BlankMaps(RenamedMaps):
    """A source of images without maps: no pixel has a label.

    Args:
        base: Whose images these are.
    """

    def __init__(self, base: Source) -> None:
        super().__init__(base, ())

    def target(self, index: int) -> np.ndarray:
        image = self.base.load(index)
        return np.full((image.height, image.width), IGNORE, np.uint8)


class AnsweredMaps(RenamedMaps):
    """A source with the answers of a network as its maps.

    Args:
        base: Whose images these are.
        answers: Class of each pixel, uint8 H x W, for each image; None for one that cannot be read.
    """

    def __init__(self, base: Source, answers: Sequence[np.ndarray | None]) -> None:
        super().__init__(base, ())
        self.answers = list(answers)

    def target(self, index: int) -> np.ndarray:
        found = self.answers[index]
        return np.full((1, 1), IGNORE, np.uint8) if found is None else found


def answered_maps(network: Network, source: Source, *, config: RunConfig, listener: Listener) -> AnsweredMaps:
    """Put a network's answers in the place of maps, for some hundred images at most.

    Args:
        network: In float.
        source: Images.
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
    answers: list[np.ndarray | None] = []
    for index in range(len(source)):
        try:
            answers.append(class_map(network, source.load(index), config=config, device=device))
        except UnreadableImageError:
            answers.append(None)
        listener.progress(Progress("evaluate", index + 1, len(source)))
    if all(answer is None for answer in answers):
        raise DataError("No validation image can be read.", hint="List them with 'visionkd data check DATA'.")
    return AnsweredMaps(source, answers)
