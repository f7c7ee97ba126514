"""One run of ``visionkd quantize``, stage by stage."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import yaml

from visionkd.config.quantize import QuantizeConfig
from visionkd.config.schema import DistillConfig, RunConfig
from visionkd.data.subset import targets_of
from visionkd.data.unlabeled import RelabeledSource
from visionkd.errors import DataError, Problem, RequestError
from visionkd.methods._base import DistillationModule
from visionkd.methods._supervised import Supervised
from visionkd.models.classes import align_classes, names_or_numbers
from visionkd.models.factory import create_network
from visionkd.models.network import Network
from visionkd.tasks.make import task_of
from visionkd.types import DataSet, Listener, Source
from visionkd.workflows._classification import answer
from visionkd.workflows._int8 import LR_RATIO, calibrate_once, fit_int8, images_for
from visionkd.workflows._int8_boxes import BlankBoxes, RenamedBoxes, answered_boxes
from visionkd.workflows._int8_maps import BlankMaps, RenamedMaps, answered_maps
from visionkd.workflows._labels import labels_for, resolve_label_store
from visionkd.workflows._method import choose_method
from visionkd.workflows._networks import check_fit, load_network, needs_fit, probe_teacher, seeded_network
from visionkd.workflows._request import command_line
from visionkd.workflows._rundir import RunDirectory, open_run
from visionkd.workflows._stages import Stages, data_text, write_environment
from visionkd.workflows._training import budget_text, check_compute, resolve_training, run_path, torch_device
from visionkd.workflows.evaluate import run_of
from visionkd.workflows.results import RunResult

_NO_LABELS = "These images have no labels of the network's classes: figures are agreement with the float model"


class Quantization:
    """Opens what a run needs, so that wrong requests fail first, and runs its stages.

    Args:
        config: Settings; what was left to decide is filled in.
        out: Run directory; None makes a name.
        listener: Is told what happens.
    """

    def __init__(self, config: QuantizeConfig, *, out: str | None, listener: Listener) -> None:
        self.config, self.listener = config, listener
        problems = check_compute(config)
        if config.fit_teacher.mode == "finetune":
            problems.append(Problem("fit_teacher.mode", "'finetune' is not part of 'quantize'", "Use probe or auto."))
        if problems:
            raise RequestError(problems)
        self.network = create_network(config.model, in_training=False)
        self._check_network()
        self.data, self.labeled = self._open_data()
        self.teachers = [
            seeded_network(spec, data=None, seed=config.training.seed, role=f"teacher{number}")
            for number, spec in enumerate(config.teachers)
        ]
        self.distillation = self._distillation() if self.teachers else None
        if config.train and not self.teachers and not self.labeled:
            raise RequestError(
                Problem("--epochs", "these images have no labels of the network's classes to train on"),
                hint=f"Learn from the float model: --teacher {config.model.name}; or leave --epochs out.",
            )
        sizes = [network.input.img_size for network in (self.network, *self.teachers)]
        self.img_size = (max(height for height, _ in sizes), max(width for _, width in sizes))
        self._resolve()
        kind = "qat" if config.train else "ptq"
        self.path = run_path(out, f"{self.network.architecture}.int8_{kind}_{self.data.name}")

    def _check_network(self) -> None:
        name, given = self.config.model.name, self.network.quantization
        if given is None:
            return
        if given.get("kind") != "int8" or not self.config.train:
            has = "INT8" if given.get("kind") == "int8" else "few bits"
            hint = "Train it further with --epochs N." if has == "INT8" else "Name its float model."
            raise RequestError(Problem("MODEL", f"{name} is quantised to {has} already", hint))

    def _open_data(self) -> tuple[DataSet, bool]:
        """Open the data with the network's classes; returns whether it has labels of these."""
        config, network = self.config, self.network
        names = names_or_numbers(network.classes, network.num_classes)
        if config.data.path == "shapes" and config.data.shapes.size is None:
            config.data.shapes.size = min(640, max(32, *network.input.img_size))
        data = images_for(network, config, model=config.model.name, listener=self.listener)
        if not len(data.splits.get("val", ())):
            raise DataError(
                f"{data.name} has no images to measure on.", hint=f"Try 'visionkd data check {config.data.path}'."
            )
        if "train" not in data.splits:
            if config.train:
                raise RequestError(Problem("--data", f"{data.name} has no training images"))
            self.listener.message("There are no training images: ranges come from validation images", level="warning")
            data = replace(data, splits={**data.splits, "train": data.splits["val"]})
        if network.task != "classification":
            return self._open_dense(data, names)
        has_labels = bool((targets_of(data.splits["val"]) >= 0).any())
        aligned = align_classes(network.classes, data.classes, network.num_classes)
        if not has_labels or aligned.columns is None:
            if has_labels:
                self.listener.message(f"The labels are not looked at: {aligned.note}", level="warning")
            return replace(data, classes=names, note=_NO_LABELS), False
        if aligned.identity:
            return data, True
        columns = np.asarray(aligned.columns, np.int64)
        splits = {
            name: RelabeledSource(source, _renamed(targets_of(source), columns)) for name, source in data.splits.items()
        }
        self.listener.message(f"{len(data.classes)} of the network's {network.num_classes} classes are in the data")
        return replace(data, classes=names, splits=splits), True

    def _open_dense(self, data: DataSet, names: tuple[str, ...]) -> tuple[DataSet, bool]:
        """Return data for a network that names pixels or finds boxes, with targets of its own classes if it has any."""
        boxes = self.network.task == "detection"
        if isinstance(data.splits["val"], (BlankMaps, BlankBoxes)):
            return replace(data, note=_NO_LABELS), False
        aligned = align_classes(self.network.classes, data.classes, self.network.num_classes)
        if aligned.identity:
            return data, True
        if aligned.columns is not None:
            renamed = RenamedBoxes if boxes else RenamedMaps
            splits = {name: renamed(source, aligned.columns) for name, source in data.splits.items()}
            return replace(data, classes=names, splits=splits), True
        self.listener.message(
            f"The {'boxes' if boxes else 'maps'} are not looked at: {aligned.note}", level="warning"
        )
        blank_of = BlankBoxes if boxes else BlankMaps
        blank = {name: blank_of(source) for name, source in data.splits.items()}
        return replace(data, classes=names, splits=blank, note=_NO_LABELS), False

    def _distillation(self) -> DistillConfig:
        """Return the settings as those of a distillation, whose sections are the same objects."""
        config = self.config
        shared = {name: getattr(config, name) for name in RunConfig.model_fields}
        found = DistillConfig.model_construct(
            student=config.model, teachers=config.teachers, method=config.method, options=config.options, losses={},
            fit_teacher=config.fit_teacher, label_store=config.label_store, **shared,
        )  # fmt: skip
        if not self.labeled and found.method == "kd":
            found.options = {"task_loss_weight": 0.0, "distill_loss_weight": 1.0, **found.options}
        for spec, teacher in zip(config.teachers, self.teachers, strict=True):
            check_fit(teacher, self.data, found, name=spec.name)
        self.method, self.options = choose_method(
            found, student=self.network, teachers=self.teachers, listener=self.listener
        )
        maps = self.method.student_stages is not DistillationModule.student_stages
        if maps or self.method.needs != {"probabilities"} or len(self.method.stages(found, self.options)) > 1:
            raise RequestError(
                Problem("method", f"'{found.method}' needs more than the logits of a quantised network", "Use kd.")
            )
        config.options = found.options
        return found

    def _resolve(self) -> None:
        config = self.config
        given = config.optimizer.lr
        resolve_training(config, img_size=max(self.img_size))
        if given is None:
            config.optimizer.lr = LR_RATIO * (_lr_of(config) or config.optimizer.lr)
        if self.distillation is not None:
            for text in resolve_label_store(self.distillation, self.method, self.options, self.data):
                self.listener.message(text)

    # Stages -----------------------------------------------------------------------------------------------------------

    def run(self, *, resume: bool, overwrite: bool) -> RunResult:
        """Run what is not done yet."""
        config, command = self.config, command_line()
        opened = open_run(
            self.path, config=config, command=command, resume=resume, overwrite=overwrite, listener=self.listener
        )
        with opened as (run, listener):
            write_environment(run, command)
            names = ["calibrate", *(["fit_teacher"] if self.teachers else []), *(["qat"] if config.train else [])]
            stages = Stages(run, listener, [*names, "package", "compare", *config.export.formats, "report"], config)
            notes = () if self.data.note else self.data.messages
            for text in (data_text(config, self.data), *notes, *self.network.notes):
                listener.message(text)
            if not self.labeled:
                self.data = self._labeled_by_float(listener)
            network = calibrate_once(
                self.network, config.int8, data=self.data, config=config, run=run, listener=listener, stages=stages
            )
            if self.teachers:
                self._fit_teachers(run, listener, stages)
            if config.train:
                network = self._train(network, run, listener, stages)
            if not run.writes:
                return RunResult(run.path, {})
            names = [spec.name for spec in config.teachers]
            return stages.finish(
                network,
                list(zip(names, self.teachers, strict=True)),
                data=self.data,
                origin={
                    "method": (config.method if self.teachers else "supervised") if config.train else "post-training",
                    "float_model": config.model.name,
                    "int8": config.int8.model_dump(mode="json"),
                    "teachers": names,
                    "run": run.path.name,
                },
                baseline=(f"{self.network.architecture} float", self.network),
            )

    def _labeled_by_float(self, listener: Listener) -> DataSet:
        """Put the float model's answers in the place of labels on the validation images."""
        source = self.data.splits["val"]
        if self.network.task == "segmentation":
            answered = answered_maps(self.network, source, config=self.config, listener=listener)
            return replace(self.data, splits={**self.data.splits, "val": answered})
        if self.network.task == "detection":
            boxes = answered_boxes(self.network, source, config=self.config, listener=listener)
            return replace(self.data, splits={**self.data.splits, "val": boxes})
        found = answer(
            self.network, source, device=torch_device(self.config.compute), batch_size=64,
            workers=self.config.data.workers or 0, listener=listener,
        )  # fmt: skip
        if not len(found.indices):
            raise DataError("No validation image can be read.", hint="List them with 'visionkd data check DATA'.")
        targets = np.zeros(len(source), np.int64)
        targets[found.indices] = found.probs.argmax(1)
        relabeled: Source = RelabeledSource(source, targets)
        return replace(self.data, splits={**self.data.splits, "val": relabeled})

    def _fit_teachers(self, run: RunDirectory, listener: Listener, stages: Stages) -> None:
        with stages.stage("fit_teacher", "Look at the teacher") as todo:
            if todo and not run.writes:
                run.wait_for("fit_teacher")
            for number, (teacher, spec) in enumerate(zip(self.teachers, self.config.teachers, strict=True)):
                if needs_fit(teacher, self.data, self.distillation, listener, name=spec.name):
                    probe_teacher(teacher, self.data, self.distillation, run, listener, name=spec.name, number=number)

    def _train(self, network: Network, run: RunDirectory, listener: Listener, stages: Stages) -> Network:
        config, data = self.config, self.data
        with stages.stage("qat", f"Train {network.architecture} with its quantisers on") as todo:
            if not todo and run.model.is_dir():
                return load_network(str(run.model))
            listener.message(f"Quantisation-aware training: {budget_text(config, data)}")
            network = network.train().requires_grad_(True)
            task = task_of(data, config)
            build, labels = partial(Supervised, student=network, task=task, config=config), None
            if self.distillation is not None:
                settings = self.distillation
                build = partial(
                    self.method, student=network, teachers=self.teachers, task=task, config=settings,
                    options=self.options,
                )  # fmt: skip
                labels = labels_for(
                    settings, data=data, teachers=self.teachers,
                    temperature=self.method.label_temperature(self.options), img_size=self.img_size,
                    student=network, listener=listener,
                )  # fmt: skip
            return fit_int8(
                lambda budget: build(budget=budget), student=network, int8=config.int8, data=data, config=config,
                img_size=self.img_size, run=run, stage="qat", listener=listener, labels=labels,
                views=config.label_store if self.distillation is not None else None,
            )  # fmt: skip


def _renamed(targets: np.ndarray, columns: np.ndarray) -> np.ndarray:
    return np.where(targets >= 0, columns[np.maximum(targets, 0)], targets)


def _lr_of(config: QuantizeConfig) -> float | None:
    """Return the learning rate of the run that trained the network, where its optimiser is ours."""
    run = run_of(config.model.name) if Path(config.model.name).exists() else None
    if run is None:
        return None
    optimizer = (yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")) or {}).get("optimizer", {})
    lr = optimizer.get("lr")
    return float(lr) if lr is not None and optimizer.get("name") == config.optimizer.name else None
