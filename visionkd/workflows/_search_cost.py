"""What scoring a candidate costs beside training it: both measured here, on the student that the search found."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional as F

from visionkd.models.network import Network

_STEPS = 3  # timed, after one that is not
_FEW = 8  # images of the first step, which tells whether the whole batch would take too long
_LONG_S = 1.0


@dataclass(frozen=True)
class Cost:
    """Seconds of one candidate.

    Attributes:
        scored_s: Of scoring it, costs included; the search's own time over its candidates.
        trained_s: Of training it, without its teacher: a step's time for the images of all epochs.
        images: Images in all epochs.
    """

    scored_s: float
    trained_s: float
    images: int

    def __str__(self) -> str:
        ratio = self.trained_s / self.scored_s
        return (
            f"Scoring took {_duration(self.scored_s)} a candidate; training the best one for {self.images:,} images"
            f" would take {_duration(self.trained_s)} on this machine, {_rounded(ratio)} times as long"
            " (from the time of a step, without the teacher)"
        )


def training_cost(student: Network, image: Tensor, target: Tensor, *, images: int, scored_s: float) -> Cost:
    """Time steps of ``student`` on one batch, and count what all of them would take.

    Args:
        student: Network with random weights; its gradients and running statistics change.
        image: B x 3 x H x W in [0, 1].
        target: Class indices, B.
        images: Images that a training sees.
        scored_s: Seconds that scoring one candidate took.
    """
    student.train()
    few = min(_FEW, len(image))
    image_s = _step_s(student, image[:few], target[:few]) / few
    if image_s * few < _LONG_S:
        image_s = median(_step_s(student, image, target) for _ in range(_STEPS)) / len(image)
    return Cost(scored_s, image_s * images, images)


def _step_s(student: Network, image: Tensor, target: Tensor) -> float:
    started = time.perf_counter()
    with torch.enable_grad():
        logits = student(image).logits
        assert logits is not None
        F.cross_entropy(logits, target).backward()
    return time.perf_counter() - started


def _duration(seconds: float) -> str:
    if seconds < 60.0:
        return f"{seconds:.2g} s"
    return f"{seconds / 60.0:.0f} min" if seconds < 7200.0 else f"{seconds / 3600.0:.1f} h"


def _rounded(ratio: float) -> str:
    """Return a ratio with two digits that count."""
    return f"{float(f'{ratio:.2g}'):,.0f}" if ratio >= 10.0 else f"{ratio:.2g}"
