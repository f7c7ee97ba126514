"""The training stages that a method consists of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class TrainingStage:
    """One training of the student; the next one goes on with its weights, unless it trained the teacher.

    Attributes:
        name: Short and unique within the run; names checkpoints and metrics.
        title: What the user reads.
        epochs: Length; None takes the configuration's, and 0 leaves the student as it is.
        lr_ratio: Share of the configuration's learning rate.
        labeled_only: Train on the labelled data set alone, without the unlabelled images.
        kind: Which part of the method it is, where its trainings differ in more than their settings.
        settings: What of the configuration it changes, by dotted key.
        trains: Which network it trains; a teacher takes the place of the one that the run began with.
    """

    name: str
    title: str
    epochs: int | None = None
    lr_ratio: float = 1.0
    labeled_only: bool = False
    kind: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    trains: Literal["student", "teacher"] = "student"
