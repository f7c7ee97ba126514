"""The list of stages that a run consists of, and what opens and closes every run."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import visionkd
from visionkd.benchmark.record import processor, versions
from visionkd.config.int8 import Int8RunConfig
from visionkd.config.schema import NetworkConfig, RunConfig
from visionkd.data.open import open_data
from visionkd.errors import DataError, Problem, RequestError
from visionkd.export.gate import Refused
from visionkd.files import write_text
from visionkd.models.network import Network
from visionkd.tasks.make import task_of
from visionkd.types import DataSet, Listener
from visionkd.workflows import _finish
from visionkd.workflows._networks import load_network, refuse_privileged, seeded_network
from visionkd.workflows._rundir import RunDirectory
from visionkd.workflows._tasks import check_task, work_of
from visionkd.workflows._training import world_size
from visionkd.workflows.results import RunResult

_LIBRARIES = ("torch", "torchvision", "timm", "lightning", "torchmetrics", "numpy", "pillow", "onnx", "onnxruntime")


def open_for_training(
    config: RunConfig,
    network: NetworkConfig,
    *,
    classes: Callable[[], Sequence[str]] | None = None,
    init: str | None = None,
    classifier: bool = True,
) -> tuple[DataSet, Network]:
    """Open the data and create the network that trains on it, with the data's classes.

    Args:
        config: Settings of the run.
        network: What to create.
        classes: Gives the class names of data without labels; None refuses such data.
        init: MODEL whose weights the network begins with.
        classifier: Whether the network gets outputs for the data's classes, or none at all.

    Raises:
        DataError: If there is nothing to train or to validate on.
    """
    data = open_data(
        config.data.path, config=config.data, seed=config.data.split_seed, task=config.task, classes=classes
    )
    _settle_batch_size(config, data)
    created = seeded_network(
        network, data=data, seed=config.training.seed, role="student", init=init, classifier=classifier
    )
    refuse_privileged(created, network.name)
    key = "--student" if hasattr(config, "student") else "--model"
    check_task(network.name, created.task, data.task, key=key)
    check_export(config, created)
    task_of(data, config)  # refuses settings of other tasks before anything is made
    if config.data.path == "shapes" and config.data.shapes.size is None:
        # scenes are drawn at the size that is looked at
        config.data.shapes.size = min(640, max(32, *created.input.img_size))
        data = open_data(config.data.path, config=config.data, seed=config.data.split_seed, task=config.task)
    for split in ("train", "val"):
        if not len(data.splits.get(split, ())):
            raise DataError(
                f"{data.name} has no images in its split '{split}'.",
                hint=f"Look at it with 'visionkd data check {config.data.path}'.",
            )
    return data, created


def check_export(config: RunConfig, network: Network) -> None:
    """Refuse to train for a file that the network has no form for.

    Raises:
        RequestError: If it is a detector of two stages, and INT8 is asked for.
    """
    int8 = getattr(config, "int8", None)
    if network.task == "detection" and network.two_stage and getattr(int8, "enabled", False):
        refusal = network.no_plain_graph()
        raise RequestError([Problem("--int8", refusal.message)], hint=refusal.hint)


def _settle_batch_size(config: RunConfig, data: DataSet) -> None:
    """Take a smaller batch for maps than for labels, unless one was given: each image takes far more memory."""
    training = config.training
    usual = work_of(data.task).BATCH_SIZE
    if usual is not None and "batch_size" not in training.model_fields_set:
        parts = world_size(config.compute) * training.accumulate
        training.batch_size = parts * max(1, usual // parts)


def data_text(config: RunConfig, data: DataSet) -> str:
    """Say what will be trained on; the embedded scenes are what a run without ``--data`` takes."""
    sizes = ", ".join(
        f"{len(data.splits[split])} {word}" for split, word in (("train", "training"), ("val", "validation"))
    )
    kinds = f"{len(data.classes)} classes" if data.classes else "no labels"
    text = f"Data: {data.name}, {sizes} images, {kinds}"
    if config.data.path == "shapes":
        text += f" (scenes of {config.data.shapes.size} pixels, drawn on the fly; --data DIR takes your own images)"
    return text


#: Package of the student in float, in a run whose model is in INT8.
FLOAT = "float"


class Stages:
    """Runs each stage once, whatever happened to the process that ran it before."""

    def __init__(self, run: RunDirectory, listener: Listener, names: Sequence[str], config: RunConfig) -> None:
        self.run, self.listener, self.names, self.config = run, listener, list(names), config

    @contextmanager
    def stage(self, name: str, title: str) -> Iterator[bool]:
        """Announce a stage and mark it done at the end of the block; yields whether there is anything to do."""
        todo = not self.run.is_done(name)
        if todo:
            self.listener.stage(name, title, self.names.index(name) + 1, len(self.names))
        yield todo
        if todo and self.run.writes:
            self.run.mark_done(name)

    def finish(
        self,
        network: Network,
        teachers: Sequence[tuple[str, Network]],
        *,
        data: DataSet,
        origin: Mapping[str, Any],
        baseline: tuple[str, Network] | None = None,
        int8: Int8RunConfig | None = None,
    ) -> RunResult:
        """Package, compare, export and report what was trained.

        Args:
            network: The student.
            teachers: Names and networks to compare it with.
            data: Data of the run.
            origin: How the network came about.
            baseline: Is compared with too, where the configuration names none.
            int8: Targets and limits of the export of an INT8 student.

        Raises:
            Refused: If an INT8 export does not pass the gate; everything else was made by then.
        """
        run, config, listener = self.run, self.config, self.listener
        network.requires_grad_(False).eval()
        answers = None
        with self.stage("package", "Package the model") as todo:
            if todo:
                described = _described(origin, data)
                answers = _finish.package(network, run, data=data, config=config, listener=listener, origin=described)
            else:
                network = load_network(str(run.model))
        with self.stage("compare", "Compare the networks") as todo:
            if todo:
                _finish.compare(
                    network, teachers, run, data=data, config=config, listener=listener, student_answers=answers,
                    baseline=baseline,
                )  # fmt: skip
        refused: list[Refused] = []
        for name in stages_of_export(config, int8=int8):
            try:
                with self.stage(name, _TITLES[name]) as todo:
                    if todo:
                        self._export(name, data, int8)
            except Refused as refusal:  # the rest is made nevertheless
                listener.message(str(refusal), level="warning")
                refused.append(refusal)
        self._report()
        if refused:
            raise refused[0]
        return self._result()

    def finish_pretrained(
        self, network: Network, *, data: DataSet, origin: Mapping[str, Any], losses: Mapping[str, float]
    ) -> RunResult:
        """Package and report an encoder that has no classifier yet."""
        run, listener = self.run, self.listener
        network.requires_grad_(False).eval()
        with self.stage("package", "Package the encoder") as todo:
            if todo:
                described = _described(origin, data)
                _finish.package_encoder(network, run, data=data, origin=described, losses=losses)
            else:
                network = load_network(str(run.model))
        with self.stage("compare", "Measure the encoder") as todo:
            if todo:
                _finish.measure_encoder(network, run)
        listener.message(f"The encoder has no classifier yet: visionkd train --init {run.path} --data DATA fits one")
        self._report()
        return self._result()

    def _report(self) -> None:
        if self.config.report.enabled:
            with self.stage("report", "Write the report"):
                from visionkd.workflows.report import report

                report(run=str(self.run.path), listener=self.listener)

    def _result(self) -> RunResult:
        metrics = {name: value for name, value in self.run.status["metrics"].items() if value is not None}
        return RunResult(self.run.path, metrics, _finish.saved_rows(self.run), _finish.files_of(self.run))

    def _export(self, stage: str, data: DataSet, int8: Int8RunConfig | None) -> None:
        from visionkd.export.int8_graph import is_int8
        from visionkd.workflows._export_int8 import INT8_FILES, export_int8
        from visionkd.workflows._export_onnx import export_network, package_metrics

        network, folder = load_network(str(self.run.model)), self.run.path / "export"
        settings: dict[str, Any] = {
            "source": data.splits["val"],
            "verify_images": self.config.export.verify_images,
            "metrics": package_metrics(self.run.model),
            "listener": self.listener,
        }
        if not is_int8(network):
            export_network(network, folder / "model.onnx", **settings)
            return
        target = "tensorrt" if stage == "int8_tensorrt" else "cpu"
        if int8 is not None:
            settings |= {"max_drop": int8.max_drop, "min_speedup": int8.min_speedup}
            settings["reference"] = load_network(str(self.run.path / FLOAT))
        export_int8(
            network, folder / INT8_FILES[target], target=target, calibration=data.splits.get("train"), **settings
        )


def _described(origin: Mapping[str, Any], data: DataSet) -> dict[str, Any]:
    """Return how a network came about, with the data it was trained on."""
    return {
        **origin,
        "data": data.name,
        "data_fingerprint": data.fingerprint,
        "visionkd": visionkd.__version__,
    }


_TITLES = {
    "onnx": "Export to ONNX",
    "int8_cpu": "Export INT8 for ONNX Runtime",
    "int8_tensorrt": "Export INT8 for TensorRT",
}


def stages_of_export(config: RunConfig, *, int8: Int8RunConfig | None) -> list[str]:
    """Return the stages that export: one for each format, or for each target of an INT8 student."""
    return [f"int8_{target}" for target in int8.targets] if int8 is not None else list(config.export.formats)


def write_environment(run: RunDirectory, command: str) -> None:
    """Write ``environment.json``."""
    if not run.writes:
        return
    content = {
        "command": command,
        "visionkd": visionkd.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "libraries": versions(_LIBRARIES),
    }
    write_text(run.path / "environment.json", json.dumps(content, indent=2) + "\n")


def _commit() -> str | None:
    """Commit of the source checkout that runs, None for an installed package."""
    root = Path(visionkd.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        found = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
