"""Train a whole teacher on the data's labels before it teaches."""

from __future__ import annotations

from pathlib import Path

from visionkd.config.schema import DistillConfig, FitTeacherConfig
from visionkd.hub.package import save_package
from visionkd.methods._supervised import Supervised
from visionkd.models.network import Network
from visionkd.tasks.make import task_of
from visionkd.types import DataSet, Listener
from visionkd.workflows._rundir import RunDirectory
from visionkd.workflows._training import fit


def finetune_teacher(
    teacher: Network,
    directory: Path,
    number: int,
    data: DataSet,
    config: DistillConfig,
    run: RunDirectory,
    listener: Listener,
) -> None:
    """Train a whole teacher on the data's labels and package it in ``directory``."""
    settings: FitTeacherConfig = config.fit_teacher
    tuned = config.model_copy(deep=True)
    tuned.optimizer.lr = settings.lr or (config.optimizer.lr or 1e-3) / 10
    teacher.reset_classifier(len(data.classes), data.classes)
    task = task_of(data, config)
    module = fit(
        lambda budget: Supervised(student=teacher, task=task, config=tuned, budget=budget), data=data, config=tuned,
        student=teacher, img_size=teacher.input.img_size, run=run, stage=f"finetune_teacher{number}", listener=listener,
        epochs=settings.epochs,
    )  # fmt: skip
    if run.writes:
        metrics = {name.removeprefix("val/"): value for name, value in module.epoch_metrics.items()}
        origin = {"method": "finetune", "teacher": config.teachers[number].name}
        save_package(
            module.deployed_student.cpu(),
            directory,
            task=data.task,
            classes=data.classes,
            metrics=metrics,
            origin=origin,
        )
