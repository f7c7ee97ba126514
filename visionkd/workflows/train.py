"""Supervised training: teachers and baselines."""

from __future__ import annotations

from collections.abc import Sequence

from visionkd.config.schema import TrainConfig
from visionkd.errors import RequestError
from visionkd.methods._supervised import Supervised
from visionkd.tasks.classification import ClassificationTask
from visionkd.types import Listener
from visionkd.workflows._networks import load_network
from visionkd.workflows._request import build_config, check_mode, command_line, shared_overrides
from visionkd.workflows._rundir import open_run
from visionkd.workflows._stages import Stages, data_text, open_for_training, write_environment
from visionkd.workflows._training import budget_text, check_compute, fit, resolve_training, run_path
from visionkd.workflows._unlabeled import check_unlabeled
from visionkd.workflows.results import RunResult


def train(
    *,
    model: str | None = None,
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
    """Train ``model`` on the labels of ``data``; the arguments are those of :func:`visionkd.workflows.distill`.

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
    overrides |= {"model.name": model, "model.pretrained": pretrained}
    settings = build_config(TrainConfig, config=config, options=options, overrides=overrides, out=out, resume=resume)
    if problems := check_compute(settings):
        raise RequestError(problems)
    dataset, network = open_for_training(settings, settings.model)
    check_unlabeled(settings, dataset, "supervised training", uses_labels=True)
    resolve_training(settings, img_size=max(network.input.img_size))
    path = run_path(out, f"{network.architecture}.train_{dataset.name}")
    command = command_line()
    opened = open_run(
        path, config=settings, command=command, resume=resume, overwrite=overwrite, listener=listener or Listener()
    )
    with opened as (run, told):
        write_environment(run, command)
        stages = Stages(run, told, ["train", "package", "compare", *settings.export.formats, "report"], settings)
        for text in (data_text(settings, dataset), *dataset.messages, *network.notes):
            told.message(text)
        told.message(f"{network.architecture}: {budget_text(settings, dataset)}")
        with stages.stage("train", f"Train {network.architecture}") as todo:
            if not todo and run.model.is_dir():
                network = load_network(str(run.model))
            else:
                task_ = ClassificationTask(
                    num_classes=len(dataset.classes), label_smoothing=settings.training.label_smoothing
                )
                module = fit(
                    lambda budget: Supervised(student=network, task=task_, config=settings, budget=budget),
                    data=dataset,
                    config=settings,
                    student=network,
                    img_size=network.input.img_size,
                    run=run,
                    stage="train",
                    listener=told,
                )
                network = module.deployed_student
        if not run.writes:
            return RunResult(run.path, {})
        return stages.finish(network, [], data=dataset, origin={"method": "supervised", "run": run.path.name})
