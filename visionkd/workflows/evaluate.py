"""Measure a model on labelled data. An ONNX file is measured without torch, as a device would."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from visionkd.config.load import load_config
from visionkd.config.schema import RunConfig
from visionkd.data.open import open_data
from visionkd.data.subset import SubsetSource
from visionkd.errors import DataError, Problem, RequestError, did_you_mean
from visionkd.runtime.bundle_file import file_to_run
from visionkd.runtime.session import backend_of, is_model_file, open_session
from visionkd.runtime.zoo_name import is_zoo_name
from visionkd.types import DataSet, Listener, Source
from visionkd.workflows._tasks import Answers, check_task, work_of
from visionkd.workflows.results import EvalResult


def evaluate(
    *,
    model: str,
    data: str | None = None,
    split: str | None = None,
    batch_size: int | None = None,
    limit: int | None = None,
    accelerator: str | None = None,
    backend: str | None = None,
    options: Sequence[str] = (),
    listener: Listener | None = None,
) -> EvalResult:
    """Measure ``model`` on a split of ``data``.

    Args:
        model: MODEL; a run directory stands for its packaged student.
        data: DATA; None takes what the run was trained on.
        split: Split to measure on; None takes ``val``, or the whole of a folder that has no splits.
        batch_size: Images at a time.
        limit: Most images, spread over the classes.
        accelerator: ``auto``, ``cpu`` or ``gpu``.
        backend: ``torch``, ``onnxruntime`` or ``tensorrt``; None takes what the model's format needs.
        options: ``KEY=VALUE`` overrides, such as ``data.shapes.num_val=1000``.
        listener: Is told what happens.

    Raises:
        RequestError: If a name is unknown, or the model does not know the data's classes.
        DataError: If no image can be read.
    """
    listener = listener or Listener()
    given, model = model, file_to_run(model, backend)
    run = run_of(model)
    config = data_config(data, run=run, options=options)
    is_file = is_model_file(model)
    if is_file and backend not in (None, backend_of(model)):
        hint = "Give the run or package it came from." if backend == "torch" else "Leave it out."
        raise RequestError(Problem("--backend", f"{model} runs in {backend_of(model)}, not in {backend}", hint))
    if not is_file and backend in ("onnxruntime", "tensorrt"):
        format, kind = ("onnx", "an ONNX file") if backend == "onnxruntime" else ("tensorrt", "an engine file")
        raise RequestError(
            Problem("--backend", f"{model} is not {kind}", f"Run: visionkd export {model} --format {format}")
        )
    loaded: Any = open_session(model, accelerator=accelerator or "auto") if is_file else _network(model)  # type: ignore[arg-type]
    model = given if is_zoo_name(given) else model  # from here on for messages: not where the cache keeps it
    size = max(loaded.input.img_size)
    task = loaded.task if config.task == "auto" and config.data.path == "shapes" else config.task
    dataset = open_data(config.data.path, config=config.data, seed=config.data.split_seed, img_size=size, task=task)
    check_task(model, loaded.task, dataset.task, key="MODEL")
    work = work_of(dataset.task)
    name, source = choose_split(dataset, split, trained_here=run is not None and data is None)
    for text in dataset.messages if name != "all" else (f"{dataset.name} has no splits: measured on all of it",):
        listener.message(text)
    if limit is not None and limit < len(source):
        source = SubsetSource(source, work.some(source, limit, seed=config.data.split_seed))
    columns, note = match_classes(loaded.classes, dataset.classes, loaded.num_classes, model)
    if note:
        listener.message(note)
    if is_file:
        found = work.answer_file(
            loaded, source, config=config, batch_size=batch_size or 64, listener=listener, columns=columns
        )
    else:
        found = _run_network(loaded, source, batch_size or 64, accelerator, config, listener, columns)
    if not len(found.indices):
        raise DataError(
            f"None of the {len(source)} images can be read.",
            hint=f"Look at them with 'visionkd data check {config.data.path}'.",
        )
    by_class = found.per_class()
    return EvalResult(
        model=model,
        data=config.data.path,
        split=name,
        num_images=len(found.indices),
        metrics=found.metrics(),
        per_class={
            label: float(value) for label, value in zip(dataset.classes, by_class, strict=True) if not np.isnan(value)
        },
        skipped=found.skipped,
        measure=work.PER_CLASS,
    )


def run_of(model: str) -> Path | None:
    """Return the run directory that ``model`` is or lies in, None where there is none."""
    path = Path(model)
    return next(
        (folder for folder in (path, path.parent, path.parent.parent) if (folder / "config.yaml").is_file()), None
    )


def data_config(data: str | None, *, run: Path | None, options: Sequence[str] = ()) -> RunConfig:
    """Return the data settings of a run with ``data`` and ``options`` put over them.

    Raises:
        RequestError: If there is neither data nor a run to take it from, or an option is wrong.
    """
    if data is None and run is None:
        raise RequestError(
            Problem("--data", "is required: the model does not come from a run", "Example: --data path/to/images")
        )
    text = None
    if run is not None:
        known = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")) or {}
        kept = {name: known[name] for name in ("data", "segmentation", "detection", "task") if name in known}
        kept.setdefault("data", {})
        if data is not None and data != kept["data"].get("path"):
            kept["data"]["path"] = data
            kept["data"].pop("novel", None)  # of the data that the run was trained on
        text = yaml.safe_dump(kept)
    return load_config(
        RunConfig,
        text=text,
        where=f"{run}/config.yaml",
        overrides={"data.path": data},
        options=options,
        spelled={"data.path": "--data"},
    )


def choose_split(data: DataSet, split: str | None, *, trained_here: bool) -> tuple[str, Source]:
    """Return the split to measure on and its name."""
    if split is None:
        split = "all" if "all" in data.splits and not trained_here else "val"
    if split not in data.splits:
        known = sorted(data.splits)
        raise RequestError(
            Problem(
                "--split",
                f"{data.name} has no split '{split}'",
                did_you_mean(split, known) or f"It has {', '.join(known)}",
            )
        )
    return split, data.splits[split]


def match_classes(
    model_classes: Sequence[str] | None, data_classes: Sequence[str], num_outputs: int, model: str
) -> tuple[Sequence[int] | None, str]:
    """Return the model's output for each class of the data, None where they are the same, and what to say about it.

    Raises:
        RequestError: If the model does not know the classes.
    """
    try:
        from visionkd.models.classes import align_classes
    except ImportError:  # no timm here: go by the names
        names = list(model_classes or ())
        if names == list(data_classes) or (not names and num_outputs == len(data_classes)):
            return None, ""
        if set(data_classes) <= set(names):
            return [
                names.index(label) for label in data_classes
            ], "The model's classes are matched to the data's by name."
    else:
        found = align_classes(model_classes, data_classes, num_outputs)
        if found.columns is not None:
            return (None if found.identity else found.columns), "" if found.identity and model_classes else found.note
    shown = ", ".join(list(data_classes)[:5]) + (", ..." if len(data_classes) > 5 else "")
    raise RequestError(
        Problem("--data", f"{model} has {num_outputs} classes that are not the data's {len(data_classes)} ({shown})"),
        hint="Give it data with its own classes, or train it on these: 'visionkd train' or 'visionkd distill'.",
    )


def _network(model: str) -> Any:
    from visionkd.workflows._networks import load_classifier

    return load_classifier(model)


def _run_network(
    network: Any,
    source: Source,
    batch_size: int,
    accelerator: str | None,
    config: RunConfig,
    listener: Listener,
    columns: Sequence[int] | None,
) -> Answers:
    from visionkd.data.loader import default_workers
    from visionkd.workflows._training import check_compute, torch_device

    if accelerator is not None:
        config.compute.accelerator = accelerator  # type: ignore[assignment]
        if problems := check_compute(config):
            raise RequestError(problems)
    workers = default_workers() if config.data.workers is None else config.data.workers
    return work_of(network.task).answer(
        network, source, config=config, device=torch_device(config.compute), batch_size=batch_size, workers=workers,
        listener=listener, columns=columns,
    )  # fmt: skip
