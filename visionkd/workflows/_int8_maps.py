"""Maps of classes that a quantised segmentation network is compared with, where the data's own do not do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from visionkd.config.schema import RunConfig
from visionkd.models.network import Network
from visionkd.types import IGNORE, Listener, Source
from visionkd.workflows._int8_targets import OtherTargets, ask
from visionkd.workflows._segmentation import class_map


class RenamedMaps(OtherTargets):
    """A source whose maps count the classes as a network does.

    Args:
        base: Whose images and maps these are.
        columns: Output of the network for each class of the maps.
    """

    maps = True

    def __init__(self, base: Source, columns: Sequence[int]) -> None:
        super().__init__(base)
        self.columns = tuple(columns)

    def target(self, index: int) -> np.ndarray:
        table = np.full(256, IGNORE, np.uint8)
        table[: len(self.columns)] = self.columns
        return table[self.base.target(index)]


class BlankMaps(OtherTargets):
    """A source of images without maps: no pixel has a label."""

    maps = True

    def target(self, index: int) -> np.ndarray:
        image = self.base.load(index)
        return np.full((image.height, image.width), IGNORE, np.uint8)


class AnsweredMaps(OtherTargets):
    """A source with the answers of a network as its maps.

    Args:
        base: Whose images these are.
        answers: Class of each pixel, uint8 H x W, for each image; None for one that cannot be read.
    """

    maps = True

    def __init__(self, base: Source, answers: Sequence[np.ndarray | None]) -> None:
        super().__init__(base)
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

    def question(picture: Any, device: Any) -> np.ndarray:
        return class_map(network, picture, config=config, device=device)

    return AnsweredMaps(*ask(network, source, question, config=config, listener=listener))
