"""Distil one or more teachers into a student."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from visionkd import registry
from visionkd.config.load import build_options
from visionkd.config.schema import DistillConfig, FitTeacherConfig
from visionkd.errors import Problem, RequestError
from visionkd.models.network import Network
from visionkd.tasks.classification import ClassificationTask
from visionkd.types import DataSet, Listener
from visionkd.workflows._networks import (
    check_fit,
    load_network,
    look_at_teacher,
    needs_fit,
    probe_teacher,
    seeded_network,
)
from visionkd.workflows._request import AUTO_METHOD, METHODS, build_config, check_mode, command_line, shared_overrides
from visionkd.workflows._rundir import RunDirectory, open_run
from visionkd.workflows._stages import Stages, data_text, open_for_training, write_environment
from visionkd.workflows._training import budget_text, check_compute, fit, resolve_training, run_path
from visionkd.workflows.results import RunResult


def distill(
    *,
    teacher: str | Sequence[str] | None = None,
    student: str | None = None,
    data: str | None = None,
    method: str | None = None,
    task: str | None = None,
    config: str | None = None,
    options: Sequence[str] = (),
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    seed: int | None = None,
    fit_teacher: str | None = None,
    pretrained: bool | None = None,
    export: str | None = None,
    out: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    accelerator: str | None = None,
    devices: int | str | None = None,
    nodes: int | None = None,
    strategy: str | None = None,
    precision: str | None = None,
    baseline: str | None = None,
    listener: Listener | None = None,
) -> RunResult:
    """Distil ``teacher`` into ``student`` and leave a run directory with model, evaluation and report.

    Args:
        teacher: One or more MODELs; a string may name several, separated by commas.
        student: MODEL to train.
        data: DATA; None takes the recipe's, or the embedded ``shapes``.
        method: File name in ``visionkd/methods``, or ``auto``.
        task: ``classification``, or ``auto`` to let the data decide.
        config: Recipe name or YAML file that the other arguments override.
        options: ``KEY=VALUE`` overrides of any key of the configuration.
        epochs: Passes over the training set.
        batch_size: Images per optimiser step over all devices.
        lr: Peak learning rate.
        seed: Seed of weights, order and views.
        fit_teacher: ``auto``, ``probe``, ``finetune`` or ``none``.
        pretrained: Whether networks start from published weights.
        export: Formats to export at the end, separated by commas.
        out: Run directory; None makes a name from the networks, method and data.
        resume: Continue the run in ``out`` where it was stopped.
        overwrite: Replace the run in ``out``.
        accelerator: ``auto``, ``cpu`` or ``gpu``.
        devices: Number of devices, or ``auto``.
        nodes: Number of machines.
        strategy: ``auto``, ``ddp`` or ``fsdp``.
        precision: ``32``, ``bf16`` or ``16``.
        baseline: Run of the same student trained alone, for the comparison.
        listener: Is told what happens.

    Returns:
        The run directory, the student's metrics, networks side by side, and the files made.

    Raises:
        RequestError: If the request is wrong; all problems are listed.
        WorkError: If the data or the training fails.
        InterruptedRunError: If the user stopped the run; it can be resumed.
    """
    check_mode(resume=resume, overwrite=overwrite)
    names = [teacher] if isinstance(teacher, str) else teacher
    teachers = [{"name": name.strip()} for text in names or () for name in text.split(",") if name.strip()]
    overrides = shared_overrides(
        data=data,
        task=task,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        seed=seed,
        export=export,
        accelerator=accelerator,
        devices=devices,
        nodes=nodes,
        strategy=strategy,
        precision=precision,
    )
    overrides |= {
        "teachers": teachers or None,
        "student.name": student,
        "method": method,
        "fit_teacher.mode": fit_teacher,
        "report.baseline": baseline,
    }
    settings = build_config(DistillConfig, config=config, options=options, overrides=overrides, out=out, resume=resume)
    if pretrained is not None:
        for network in (settings.student, *settings.teachers):
            network.pretrained = pretrained
    return _Distillation(settings, out=out, listener=listener or Listener()).run(resume=resume, overwrite=overwrite)


class _Distillation:
    """One distillation, stage by stage."""

    def __init__(self, config: DistillConfig, *, out: str | None, listener: Listener) -> None:
        self.config = config
        problems = check_compute(config)
        if config.method == "auto":
            config.method = AUTO_METHOD
        method = registry.load(METHODS, config.method, key="--method").METHOD
        self.method = method
        config.options = asdict(build_options(method.Options, config.options))
        if config.report.baseline is not None:
            load_network(config.report.baseline)  # fails now rather than after the training
        if problems:
            raise RequestError(problems)
        self.data, self.student = open_for_training(config, config.student)
        if self.data.task not in method.tasks:
            raise RequestError(
                Problem(
                    "--method",
                    f"'{config.method}' does not support {self.data.task}",
                    f"It supports {', '.join(sorted(method.tasks))}.",
                )
            )
        seed = config.training.seed
        self.teachers = [
            seeded_network(spec, data=None, seed=seed, role=f"teacher{number}")
            for number, spec in enumerate(config.teachers)
        ]
        for spec, teacher in zip(config.teachers, self.teachers, strict=True):
            check_fit(teacher, self.data, config, name=spec.name)
        # views are drawn at the largest size that a network was trained with, and each network resizes for itself
        sizes = [network.input.img_size for network in (self.student, *self.teachers)]
        self.img_size = (max(height for height, _ in sizes), max(width for _, width in sizes))
        resolve_training(config, img_size=max(self.img_size))
        self.names = [spec.name for spec in config.teachers]
        run_name = f"{self.student.architecture}.{config.method}_{'_'.join(self.names)}_{self.data.name}"
        self.path = run_path(out, run_name)
        self.listener = listener

    def run(self, *, resume: bool, overwrite: bool) -> RunResult:
        config, command = self.config, command_line()
        opened = open_run(
            self.path, config=config, command=command, resume=resume, overwrite=overwrite, listener=self.listener
        )
        with opened as (run, listener):
            write_environment(run, command)
            stages = Stages(
                run,
                listener,
                ["fit_teacher", "distill", "package", "compare", *config.export.formats, "report"],
                config,
            )
            self._say_choices(listener)
            self._fit_teachers(run, listener, stages)
            student = self._distill(run, listener, stages)
            if not run.writes:
                return RunResult(run.path, {})
            return stages.finish(
                student,
                list(zip(self.names, self.teachers, strict=True)),
                data=self.data,
                origin={
                    "method": config.method,
                    "options": config.options,
                    "teachers": self.names,
                    "run": run.path.name,
                },
            )

    def _say_choices(self, listener: Listener) -> None:
        config = self.config
        for text in (
            data_text(config, self.data),
            *self.data.messages,
            *self.student.notes,
            *(note for teacher in self.teachers for note in teacher.notes),
        ):
            listener.message(text)
        listener.message(
            f"Method {config.method}: {', '.join(self.names)} -> {self.student.architecture},"
            f" {budget_text(config, self.data)}, views of {self.img_size[0]} x {self.img_size[1]} pixels"
        )

    def _fit_teachers(self, run: RunDirectory, listener: Listener, stages: Stages) -> None:
        with stages.stage("fit_teacher", "Look at the teacher") as todo:
            if not run.writes and todo and self.config.fit_teacher.mode != "finetune":  # which all ranks do together
                run.wait_for("fit_teacher")
            findings = []
            for number, (teacher, name) in enumerate(zip(self.teachers, self.names, strict=True)):
                if needs_fit(teacher, self.data, self.config, listener, name=name):
                    if self.config.fit_teacher.mode == "finetune":
                        self._finetune(number, run, listener)
                    else:
                        probe_teacher(teacher, self.data, self.config, run, listener, name=name, number=number)
                if todo and run.writes:
                    found = look_at_teacher(teacher, self.data, self.config, listener, name=name)
                    findings += [[finding.status, finding.text] for finding in found.findings]
            if todo:
                run.update(preflight=findings)

    def _finetune(self, number: int, run: RunDirectory, listener: Listener) -> None:
        directory = run.path / "teachers" / str(number)
        if not directory.is_dir():
            finetune_teacher(self.teachers[number], directory, number, self.data, self.config, run, listener)
        run.wait_for_path(directory)
        self.teachers[number] = load_network(str(directory))

    def _distill(self, run: RunDirectory, listener: Listener, stages: Stages) -> Network:
        with stages.stage("distill", f"Distil into {self.student.architecture}") as todo:
            if not todo and run.model.is_dir():
                return load_network(str(run.model))
            task = ClassificationTask(
                num_classes=len(self.data.classes), label_smoothing=self.config.training.label_smoothing
            )
            options = build_options(self.method.Options, self.config.options)
            build = partial(
                self.method,
                student=self.student,
                teachers=self.teachers,
                task=task,
                config=self.config,
                options=options,
            )
            module = fit(
                lambda budget: build(budget=budget), data=self.data, config=self.config, student=self.student,
                img_size=self.img_size, run=run, stage="distill", listener=listener,
            )  # fmt: skip
            return module.deployed_student


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
    from visionkd.hub.package import save_package
    from visionkd.methods._supervised import Supervised

    settings: FitTeacherConfig = config.fit_teacher
    tuned = config.model_copy(deep=True)
    tuned.optimizer.lr = settings.lr or (config.optimizer.lr or 1e-3) / 10
    teacher.reset_classifier(len(data.classes), data.classes)
    task = ClassificationTask(num_classes=len(data.classes), label_smoothing=config.training.label_smoothing)
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
