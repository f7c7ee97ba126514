"""Training without a teacher: teachers and baselines on labels, encoders on images alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from visionkd.config.load import build_options, options_problems
from visionkd.config.schema import TrainConfig
from visionkd.data.captions import captions_of
from visionkd.errors import Problem, RequestError
from visionkd.methods._contrastive import Captions, Contrastive, tokenize_captions
from visionkd.methods._mae import MAE
from visionkd.methods._supervised import Supervised
from visionkd.models.network import Network
from visionkd.tasks.make import task_of
from visionkd.types import DataSet, Listener
from visionkd.workflows._finish import validation_figures
from visionkd.workflows._networks import load_network, probe_classifier
from visionkd.workflows._request import build_config, check_mode, command_line, shared_overrides
from visionkd.workflows._rundir import RunDirectory, open_run
from visionkd.workflows._stages import Stages, data_text, open_for_training, write_environment
from visionkd.workflows._training import budget_text, check_compute, fit, resolve_training, run_path
from visionkd.workflows._unlabeled import check_unlabeled
from visionkd.workflows.results import RunResult

_NAMES = {
    "supervised": "supervised training",
    "mae": "the objective mae",
    "contrastive": "the objective contrastive",
    "linear_probe": "a linear probe",
}
_SHORT = {"supervised": "train", "mae": "mae", "contrastive": "image_text", "linear_probe": "probe"}
_TITLES = {
    "supervised": "Train",
    "mae": "Pre-train",
    "contrastive": "Train on captions",
    "linear_probe": "Fit a classifier on the features of",
}


def train(
    *,
    model: str | None = None,
    objective: str | None = None,
    init: str | None = None,
    linear_probe: bool = False,
    data: str | None = None,
    task: str | None = None,
    config: str | None = None,
    options: Sequence[str] = (),
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    seed: int | None = None,
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
    listener: Listener | None = None,
) -> RunResult:
    """Train ``model`` on ``data``; arguments not named here are those of :func:`visionkd.workflows.distill`.

    Args:
        model: Network to train; None takes that of ``init``.
        objective: ``supervised``, ``mae``, ``contrastive`` or ``linear_probe``.
        init: MODEL whose weights the network begins with, apart from its classifier.
        linear_probe: Short for the objective of that name.

    Raises:
        RequestError: If the request is wrong; all problems are listed.
        WorkError: If the data or the training fails.
        InterruptedRunError: If the user stopped the run; it can be resumed.
    """
    check_mode(resume=resume, overwrite=overwrite)
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
    if linear_probe and objective not in (None, "linear_probe"):
        raise RequestError(Problem("--linear-probe", f"contradicts --objective {objective}", "Give one of the two."))
    overrides |= {
        "model.name": model or (init if config is None else None),
        "model.pretrained": pretrained,
        "init": init,
        "objective": "linear_probe" if linear_probe else objective,
    }
    settings = build_config(TrainConfig, config=config, options=options, overrides=overrides, out=out, resume=resume)
    problems = check_compute(settings)
    if settings.augment.learned is not None:
        message = (
            f"'{settings.augment.learned}' learns where a student and its teacher disagree, and there is no teacher"
        )
        problems.append(Problem("augment.learned", message, "Leave it out, or use 'visionkd distill --augment hard'."))
    if problems:
        raise RequestError(problems)
    encodes = settings.objective in ("mae", "contrastive")
    dataset, network = open_for_training(
        settings, settings.model, classes=tuple if encodes else None, init=settings.init, classifier=not encodes
    )
    if settings.objective == "supervised" and settings.options:
        raise RequestError(Problem("options", "supervised training has no options of its own", "Leave them out."))
    check_unlabeled(settings, dataset, _NAMES[settings.objective], uses_labels=not encodes)
    choices = _settle_mae(settings, network) if settings.objective == "mae" else []
    captions = None
    if settings.objective == "contrastive":
        captions, choices = _settle_contrastive(settings, network, dataset)
    resolve_training(settings, img_size=max(network.input.img_size))
    path = run_path(out, f"{network.architecture}.{_SHORT[settings.objective]}_{dataset.name}")
    command = command_line()
    opened = open_run(
        path, config=settings, command=command, resume=resume, overwrite=overwrite, listener=listener or Listener()
    )
    with opened as (run, told):
        write_environment(run, command)
        stages = Stages(run, told, ["train", "package", "compare", *settings.export.formats, "report"], settings)
        for text in (data_text(settings, dataset), *dataset.messages, *network.notes, *choices):
            told.message(text)
        if settings.objective != "linear_probe":
            told.message(f"{network.architecture}: {budget_text(settings, dataset)}")
        with stages.stage("train", f"{_TITLES[settings.objective]} {network.architecture}") as todo:
            if not todo and run.model.is_dir():
                network = load_network(str(run.model))
            else:
                network = _trained(settings, network, dataset, run, told, captions)
        if not run.writes:
            return RunResult(run.path, {})
        origin = {"method": settings.objective, "run": run.path.name}
        if settings.init is not None:
            origin["init"] = settings.init
        if encodes:
            return stages.finish_pretrained(
                network, data=dataset, origin={**origin, "options": settings.options}, losses=validation_figures(run)
            )
        return stages.finish(network, [], data=dataset, origin=origin)


def _settle_mae(settings: TrainConfig, network: Network) -> list[str]:
    """Check the masked objective and write its options out; return what to say about it."""
    if problems := options_problems(MAE.Options, settings.options):
        raise RequestError(problems)
    options = build_options(MAE.Options, settings.options)
    if settings.data.unlabeled is not None:
        text = "is for methods with a teacher, and this objective needs no labels at all"
        raise RequestError(Problem("data.unlabeled", text, "Give that directory as --data."))
    given: dict[str, Any] = {"student": network, "teachers": (), "config": settings, "options": options}
    if problems := MAE.check(**given):
        raise RequestError(problems)
    settings.options = asdict(options)
    return MAE.settle(**given)


def _settle_contrastive(settings: TrainConfig, network: Network, data: DataSet) -> tuple[Captions, list[str]]:
    """Check the contrast of images and captions and write its options out; return the captions, and what to say."""
    if problems := options_problems(Contrastive.Options, settings.options):
        raise RequestError(problems)
    options = build_options(Contrastive.Options, settings.options)
    if problems := Contrastive.check(student=network, teachers=(), config=settings, options=options):
        raise RequestError(problems)
    settings.options = asdict(options)
    train, val = (captions_of(data.splits[split], settings.data.path) for split in ("train", "val"))
    captions = tokenize_captions(train, val, data.classes, options)
    said = [f"Captions: {len(captions.spec.words)} different words, {captions.train.shape[1]} captions an image"]
    if data.classes and captions.classes is None:
        said.append("Names of classes have words that no caption has: there is no zero-shot accuracy")
    return captions, said


def _trained(
    settings: TrainConfig,
    network: Network,
    data: DataSet,
    run: RunDirectory,
    listener: Listener,
    captions: Captions | None = None,
) -> Network:
    """Return the network as its objective trains it."""
    if settings.objective == "linear_probe":
        return probe_classifier(network, data, settings, listener)
    if settings.objective == "mae":
        build = partial(MAE, student=network, config=settings, options=build_options(MAE.Options, settings.options))
    elif captions is not None:
        options = build_options(Contrastive.Options, settings.options)
        build = partial(Contrastive, student=network, config=settings, options=options, captions=captions)
    else:
        task = task_of(data, settings)
        build = partial(Supervised, student=network, task=task, config=settings)
    module = fit(
        lambda budget: build(budget=budget), data=data, config=settings, student=network,
        img_size=network.input.img_size, run=run, stage="train", listener=listener,
    )  # fmt: skip
    return module.deployed_student
