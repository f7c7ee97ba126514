"""Which students of the space ``cifar_resnet`` are distilled: sizes spread, and groups of equal cost among them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from visionkd.config.schema import NetworkConfig
from visionkd.search.spaces import GridSpace, open_space

MOST_MACS_G = 0.05  # of any student: what 80 trainings on one core leave time for
SEED = 0
COUNT = 42
TOLERANCE = 0.02  # within which costs count as equal
MACS_BANDS_G = ((0.015, 6), (0.025, 8), (0.030, 8))
PARAMS_BANDS_M = ((0.20, 5), (0.40, 6))


@dataclass(frozen=True)
class Student:
    """A CIFAR ResNet of the space.

    Attributes:
        blocks: Of each stage.
        channels: Of each stage.
        params_m: Parameters with ten classes, millions.
        macs_g: Multiply-accumulates for one image of 32 x 32 pixels, 10^9.
    """

    blocks: tuple[int, int, int]
    channels: tuple[int, int, int]
    params_m: float
    macs_g: float

    @property
    def config(self) -> NetworkConfig:
        args = {"blocks": list(self.blocks), "channels": list(self.channels)}
        return NetworkConfig(name="cifar_resnet", pretrained=False, args=args)


def chosen(count: int = COUNT, seed: int = SEED) -> list[Student]:
    """Return the students of the benchmark, the cheapest first: bands of equal cost, and the rest spread in size."""
    rng = Random(seed)
    known = [student for student in all_students() if student.macs_g <= MOST_MACS_G]
    rng.shuffle(known)
    found: list[Student] = []
    for macs_g, most in MACS_BANDS_G:
        band = [student for student in known if abs(student.macs_g / macs_g - 1) <= TOLERANCE]
        found += [student for student in _spread(band, most, _params) if student not in found]
    for params_m, most in PARAMS_BANDS_M:
        band = [student for student in known if abs(student.params_m / params_m - 1) <= TOLERANCE]
        found += [student for student in _spread(band, most, _macs) if student not in found]
    rest = [student for student in known if student not in found]
    found += _spread(rest, count - len(found), _params)
    return sorted(found, key=lambda student: (student.macs_g, student.params_m))


def all_students() -> list[Student]:
    """Return the whole space."""
    space = open_space("cifar_resnet")
    assert isinstance(space, GridSpace)
    blocks = itertools.product(*(space.axes[f"blocks.{stage}"] for stage in range(3)))
    channels = list(itertools.product(*(space.axes[f"channels.{stage}"] for stage in range(3))))
    return [Student(each, widths, *costs(each, widths)) for each in blocks for widths in channels]


def costs(blocks: Sequence[int], channels: Sequence[int], *, classes: int = 10, px: int = 32) -> tuple[float, float]:
    """Return parameters in millions and MACs in 10^9 without building the network."""
    inputs, places = channels[0], px * px
    params, macs = 29 * inputs, 27 * inputs * places
    for stage, (count, outputs) in enumerate(zip(blocks, channels, strict=True)):
        places = places if stage == 0 else places // 4
        for block in range(count):
            weights = 9 * inputs * outputs + 9 * outputs * outputs
            params += 4 * outputs
            if stage > 0 and block == 0:
                weights += inputs * outputs  # the shortcut's convolution, and its norm
                params += 2 * outputs
            params, macs, inputs = params + weights, macs + weights * places, outputs
    return (params + (inputs + 1) * classes) / 1e6, (macs + inputs * classes) / 1e9


def _spread(students: Sequence[Student], count: int, key: Callable[[Student], float]) -> list[Student]:
    """Return ``count`` students whose ``key`` goes from the smallest to the largest in steps of equally many."""
    ordered = sorted(students, key=key)
    if count >= len(ordered):
        return ordered
    return [ordered[round(place * (len(ordered) - 1) / max(1, count - 1))] for place in range(count)]


def _params(student: Student) -> float:
    return student.params_m


def _macs(student: Student) -> float:
    return student.macs_g
