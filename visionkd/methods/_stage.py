"""The training stages that a method consists of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainingStage:
    """One training of the student; the next one goes on with its weights.

    Attributes:
        name: Short and unique within the run; names checkpoints and metrics.
        title: What the user reads.
        epochs: Length; None takes the configuration's.
        lr_ratio: Share of the configuration's learning rate.
        labeled_only: Train on the labelled data set alone, without the unlabelled images.
    """

    name: str
    title: str
    epochs: int | None = None
    lr_ratio: float = 1.0
    labeled_only: bool = False
