"""Distil one or more teachers into a student."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from visionkd.config.schema import DistillConfig
from visionkd.data.unlabeled import with_unlabeled
from visionkd.errors import Problem, RequestError
from visionkd.hub.package import save_package
from visionkd.methods._optimizer import Budget
from visionkd.methods._stage import TrainingStage
from visionkd.models.classes import names_or_numbers
from visionkd.models.network import Network
from visionkd.tasks.make import task_of
from visionkd.types import Listener
from visionkd.workflows._distill_int8 import Int8Tail, check_int8
from visionkd.workflows._embeddings import STAGE as EMBED
from visionkd.workflows._embeddings import EncoderWork
from visionkd.workflows._finetune import finetune_teacher
from visionkd.workflows._finish import validation_figures
from visionkd.workflows._labels import labels_for, resolve_label_store
from visionkd.workflows._method import choose_method, method_name, methods_for, takes_encoder, trains_own_teacher
from visionkd.workflows._networks import (
    check_fit,
    load_network,
    look_at_teacher,
    needs_fit,
    probe_teacher,
    refuse_privileged,
    seeded_network,
)
from visionkd.workflows._request import build_config, check_mode, command_line, shared_overrides
from visionkd.workflows._rundir import RunDirectory, open_run
from visionkd.workflows._stage_settings import stage_config, stage_data
from visionkd.workflows._stages import FLOAT, Stages, data_text, open_for_training, stages_of_export, write_environment
from visionkd.workflows._tasks import check_task
from visionkd.workflows._training import budget_text, check_compute, fit, resolve_training, run_path
from visionkd.workflows._unlabeled import STAGE as UNLABELED
from visionkd.workflows._unlabeled import check_unlabeled, needs_preparation, open_pool, prepare_unlabeled
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
    cache_teacher: bool | None = None,
    unlabeled: str | None = None,
    augment: str | None = None,
    pretrained: bool | None = None,
    int8: bool | None = None,
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
        task: ``classification``, ``segmentation``, or ``auto`` to let the data decide.
        config: Recipe name or YAML file that the other arguments override.
        options: ``KEY=VALUE`` overrides of any key of the configuration.
        epochs: Passes over the training set.
        batch_size: Images per optimiser step over all devices.
        lr: Peak learning rate.
        seed: Seed of weights, order and views.
        fit_teacher: ``auto``, ``probe``, ``finetune`` or ``none``.
        cache_teacher: Keep what the teachers say of each view in a label store; None decides.
        unlabeled: Directory of images to train on beside the labelled ones.
        augment: ``hard`` trains an augmentor against the student.
        pretrained: Whether networks start from published weights.
        int8: Bring the distilled student to INT8, train it on with the teacher, and export it for the targets of the
            section ``int8``; the run fails, with all but the file made, where INT8 loses too much or is no faster.
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
        "label_store.mode": None if cache_teacher is None else "on" if cache_teacher else "off",
        "data.unlabeled": unlabeled,
        "augment.learned": augment,
        "report.baseline": baseline,
        "int8.enabled": int8,
    }
    settings = build_config(DistillConfig, config=config, options=options, overrides=overrides, out=out, resume=resume)
    if pretrained is not None:
        for network in (settings.student, *settings.teachers):
            network.pretrained = pretrained
    return _Distillation(settings, out=out, listener=listener or Listener()).run(resume=resume, overwrite=overwrite)


class _Distillation:
    """One distillation, stage by stage."""

    def __init__(self, config: DistillConfig, *, out: str | None, listener: Listener) -> None:
        self.config, self.listener = config, listener
        problems = check_compute(config)
        if config.report.baseline is not None:
            load_network(config.report.baseline)  # fails now rather than after the training
        if problems:
            raise RequestError(problems)
        self.pool = open_pool(config)
        self.teachers: list[Network] = []
        self.data, self.student = open_for_training(config, config.student, classes=self._teacher_classes)
        self.encodes = takes_encoder(config, self.student)
        if not self.encodes:
            self._load_teachers(own=trains_own_teacher(config, self.student))
        self.method, self.options = choose_method(
            config, student=self.student, teachers=self.teachers, listener=listener,
            unlabeled=needs_preparation(self.data, self.pool),
        )  # fmt: skip
        if config.int8.enabled:
            check_int8(config, self.student)
        self.encoder: EncoderWork | None = None
        if self.encodes:
            self.encoder = EncoderWork(config, self.options, self.data, listener)
            self.student = self.encoder.student(self.student)
        self.trainings = self.method.stages(config, self.options)
        #: Whether the outcome is an encoder without a classifier.
        self.pretrains = self.method.pretrains(self.options)
        #: Numbers of the teachers whose classes matter.
        asked = () if self.method.trains_teacher else enumerate(self.teachers)
        self.asked = [number for number, teacher in asked if self.method.asks(teacher, self.options)]
        for number in self.asked:
            check_task(config.teachers[number].name, self.teachers[number].task, self.data.task, key="--teacher")
            check_fit(self.teachers[number], self.data, config, name=config.teachers[number].name)
        check_unlabeled(
            config, self.data, method_name(config), uses_labels=self.method.uses_labels and not self.pretrains,
            teachers=self.teachers if self.asked else (),
        )  # fmt: skip
        if self.data.task not in self.method.tasks:
            raise RequestError(
                Problem(
                    "--method",
                    f"'{method_name(config)}' does not support {self.data.task}",
                    f"It supports {', '.join(sorted(self.method.tasks))}. For {self.data.task} there is:"
                    f" {', '.join(methods_for(self.data.task))}.",
                )
            )
        # views are drawn at the largest size that a network was trained with, and each network resizes for itself
        sizes = [network.input.img_size for network in (self.student, *self.teachers)]
        self.img_size = (max(height for height, _ in sizes), max(width for _, width in sizes))
        resolve_training(config, img_size=max(self.img_size), weight_decay=self.method.default_weight_decay)
        most = self.data if self.pool is None else with_unlabeled(self.data, self.pool)
        for text in resolve_label_store(config, self.method, self.options, most):
            listener.message(text)
        self.names = [spec.name for spec in config.teachers]
        run_name = f"{self.student.architecture}.{method_name(config)}_{'_'.join(self.names)}_{self.data.name}"
        self.path = run_path(out, run_name)

    def _load_teachers(self, *, own: bool = False) -> None:
        """Create the teachers; those that are the method's ``own`` are trained in the run, on the data's classes."""
        if not self.teachers:
            self.teachers = [
                seeded_network(
                    spec, data=self.data if own else None, seed=self.config.training.seed, role=f"teacher{number}"
                )
                for number, spec in enumerate(self.config.teachers)
            ]
            for teacher, spec in zip(() if own else self.teachers, self.config.teachers, strict=False):
                refuse_privileged(teacher, spec.name)

    def _teacher_classes(self) -> tuple[str, ...]:
        """Names for the classes of data that has no labels."""
        self._load_teachers()
        return names_or_numbers(self.teachers[0].classes, self.teachers[0].num_classes)

    def run(self, *, resume: bool, overwrite: bool) -> RunResult:
        config, command = self.config, command_line()
        opened = open_run(
            self.path, config=config, command=command, resume=resume, overwrite=overwrite, listener=self.listener
        )
        with opened as (run, listener):
            write_environment(run, command)
            names = [training.name for training in self.trainings]
            if needs_preparation(self.data, self.pool) and (self.asked or self.pool is not None):
                names.insert(0, UNLABELED)
            if self.encoder is not None and self.encoder.options.distills:
                names.insert(len(names) - 1, EMBED)
            tail = self._int8_tail()
            names += tail.stages if tail is not None else []
            exports = stages_of_export(config, int8=config.int8 if tail is not None else None)
            stages = Stages(run, listener, ["fit_teacher", *names, "package", "compare", *exports, "report"], config)
            self._say_choices(listener)
            self._fit_teachers(run, listener, stages)
            if UNLABELED in names:
                self._prepare_unlabeled(run, listener, stages)
            self._say_method(listener)
            student = self.student
            for training in self.trainings:
                if self.encoder is not None:
                    self._embed(training, run, stages)
                if training.trains == "teacher":
                    self.teachers = [self._train(self.teachers[0], training, run, listener, stages).eval()]
                else:
                    student = self._train(student, training, run, listener, stages)
            plain = None
            if tail is not None:
                student, plain = tail.run(
                    student, teachers=[self.teachers[number] for number in self.asked], data=self.data, run=run,
                    listener=listener, stages=stages,
                )  # fmt: skip
            if not run.writes:
                return RunResult(run.path, {})
            origin = {
                "method": method_name(config),
                "options": config.options or {name: loss.model_dump() for name, loss in config.losses.items()},
                "teachers": self.names,
                "run": run.path.name,
            }
            if self.pretrains:
                return stages.finish_pretrained(student, data=self.data, origin=origin, losses=validation_figures(run))
            asked = [(self.names[number], self.teachers[number]) for number in self.asked]
            if plain is None or tail is None:
                return stages.finish(student, asked, data=self.data, origin=origin)
            return stages.finish(
                student, asked, data=self.data, origin={**origin, "int8": config.int8.model_dump(mode="json")},
                baseline=(f"{student.architecture} float", plain), int8=config.int8,
            )  # fmt: skip

    def _int8_tail(self) -> Int8Tail | None:
        """Return what follows the trainings with ``--int8``."""
        if not self.config.int8.enabled:
            return None
        return Int8Tail(self.config, img_size=self.img_size, uses_labels=self.method.uses_labels, task=self.data.task)

    def _embed(self, training: TrainingStage, run: RunDirectory, stages: Stages) -> None:
        """Have the encoder look at the training images before the last training, which takes what it says."""
        assert self.encoder is not None
        self.regions = None
        if run.is_done(training.name):
            return
        if training != self.trainings[-1] or not self.encoder.options.distills:
            self.data = self.encoder.data_of_base()
            return
        with stages.stage(EMBED, "Show the training images to the encoder") as todo:
            if todo and not run.writes:
                run.wait_for(EMBED)
            self.regions, self.data = self.encoder.regions(run)

    def _say_choices(self, listener: Listener) -> None:
        config = self.config
        for text in (
            data_text(config, self.data),
            *self.data.messages,
            *self.student.notes,
            *(note for teacher in self.teachers for note in teacher.notes),
        ):
            listener.message(text)

    def _say_method(self, listener: Listener) -> None:
        config = self.config
        crop = config.segmentation.crop_size if self.data.task == "segmentation" else None
        height, width = self.img_size if crop is None else (crop, crop) if isinstance(crop, int) else crop
        listener.message(
            f"Method {method_name(config)}: {', '.join(self.names)} -> {self.student.architecture},"
            f" {budget_text(config, self.data)}, views of {height} x {width} pixels"
        )

    def _fit_teachers(self, run: RunDirectory, listener: Listener, stages: Stages) -> None:
        with stages.stage("fit_teacher", "Look at the teacher") as todo:
            if not run.writes and todo and self.config.fit_teacher.mode != "finetune":  # which all ranks do together
                run.wait_for("fit_teacher")
            findings = []
            for number, (teacher, name) in enumerate(zip(self.teachers, self.names, strict=not self.encodes)):
                if number not in self.asked:
                    continue
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

    def _prepare_unlabeled(self, run: RunDirectory, listener: Listener, stages: Stages) -> None:
        with stages.stage(UNLABELED, "Look at the unlabelled images") as todo:
            if todo and not run.writes:
                run.wait_for(UNLABELED)
            self.data = prepare_unlabeled(
                self.data,
                self.pool,
                self.teachers if self.asked else (),
                config=self.config,
                run=run,
                listener=listener,
            )

    def _finetune(self, number: int, run: RunDirectory, listener: Listener) -> None:
        directory = run.path / "teachers" / str(number)
        if not directory.is_dir():
            finetune_teacher(self.teachers[number], directory, number, self.data, self.config, run, listener)
        run.wait_for_path(directory)
        self.teachers[number] = load_network(str(directory))

    def _train(
        self, student: Network, training: TrainingStage, run: RunDirectory, listener: Listener, stages: Stages
    ) -> Network:
        """Run one training of the method, which goes on with the weights of the one before."""
        kept, of_teacher = run.path / "stages" / training.name, training.trains == "teacher"
        title = training.title if of_teacher else f"{training.title} into {student.architecture}"
        with stages.stage(training.name, title) as todo:
            places = (kept,) if of_teacher else (run.path / FLOAT, run.model, kept)
            made = [path for path in places if path.is_dir()]
            if not todo and made:
                return load_network(str(made[0]), with_labels=of_teacher).train()
            config, data = stage_config(self.config, training), stage_data(self.data, training)
            student = self.method.prepare_student(student, training, config, self.options)
            # of all data, for a training on the labelled images too: they come first, so their labels are the same
            labels = labels_for(
                config, data=self.data, teachers=self.teachers,
                temperature=self.method.label_temperature(self.options), img_size=self.img_size,
                student=student, listener=listener,
            )  # fmt: skip
            task = task_of(data, config)
            build = partial(
                self.method.module_of(training, self.options), student=student,
                teachers=() if of_teacher else self.teachers, task=task, config=config, options=self.options,
                **({} if self.encoder is None else {"regions": self.regions}),
            )  # fmt: skip
            if training.epochs == 0:  # the method makes something of the student as it is
                module = build(budget=Budget(steps_per_epoch=0, epochs=0))
            else:
                module = fit(
                    lambda budget: build(budget=budget), data=data, config=config, student=student,
                    img_size=self.img_size, run=run, stage=training.name, listener=listener,
                    views=config.label_store, labels=labels,
                )  # fmt: skip
            if run.writes and training != self.trainings[-1]:
                origin = {"method": method_name(config), "role": "teacher"} if of_teacher else {}
                save_package(
                    module.deployed_student.cpu(), kept, task=data.task, classes=data.classes, metrics={},
                    origin=origin,
                )  # fmt: skip
                if of_teacher:  # what it was shown makes its figures no figures of the run
                    run.update(teacher_metrics=run.take_metrics())
            return module.deployed_student
