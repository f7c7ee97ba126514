"""What one training of a method takes of a run: its settings, and its data."""

from __future__ import annotations

from dataclasses import replace

from visionkd.config.schema import DistillConfig
from visionkd.methods._stage import TrainingStage
from visionkd.types import DataSet


def stage_config(config: DistillConfig, training: TrainingStage) -> DistillConfig:
    """Return the configuration of one training of a method."""
    changed = config.model_copy(deep=True)
    assert changed.optimizer.lr is not None
    changed.optimizer.lr *= training.lr_ratio
    changed.training.epochs = training.epochs or config.training.epochs
    for key, value in training.settings.items():
        section, _, name = key.rpartition(".")
        setattr(getattr(changed, section), name, value)
    return changed


def stage_data(data: DataSet, training: TrainingStage) -> DataSet:
    """Return the data of one training of a method: all of it, or without the unlabelled images."""
    if not training.labeled_only or "labeled" not in data.splits:
        return data
    splits = {**data.splits, "train": data.splits["labeled"]}
    return replace(data, splits=splits, fingerprint=f"{data.fingerprint}.labeled")
