"""Settings of ``visionkd quantize``."""

from __future__ import annotations

from typing import Any, Literal

from visionkd.config.int8 import Int8Config
from visionkd.config.schema import (
    FitTeacherConfig,
    LabelStoreConfig,
    NetworkConfig,
    RunConfig,
    ScheduleConfig,
    TeacherConfig,
)


class QuantizeConfig(RunConfig):
    """Quantisation of a trained network, with or without a training afterwards.

    Attributes:
        model: What to quantise.
        bits: Of weights and activations; fewer than 8 are what ``distill --method quantized`` trains.
        int8: How ranges are found, and what is quantised.
        train: Train the quantised network; the budget is that of ``training``. False calibrates only.
        teachers: Whom it learns from in the training; none takes the labels.
        method: File name in ``visionkd/methods``, where there are teachers.
        options: The method's own options.
    """

    model: NetworkConfig
    bits: Literal[8] = 8
    int8: Int8Config = Int8Config()
    train: bool = False
    teachers: list[TeacherConfig] = []
    method: str = "kd"
    options: dict[str, Any] = {}
    fit_teacher: FitTeacherConfig = FitTeacherConfig()
    label_store: LabelStoreConfig = LabelStoreConfig()
    schedule: ScheduleConfig = ScheduleConfig(warmup_epochs=0.0, min_lr_ratio=0.01)
