"""What every run ends with: package, evaluation, export, report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from visionkd.benchmark.complexity import measure_complexity
from visionkd.benchmark.latency import measure
from visionkd.benchmark.torch_runner import torch_runner
from visionkd.config.schema import RunConfig
from visionkd.data.subset import SubsetSource
from visionkd.errors import WorkError
from visionkd.files import write_text
from visionkd.hub.package import save_package
from visionkd.models.network import Network
from visionkd.types import DataSet, Listener, MetricRow
from visionkd.workflows._networks import load_network
from visionkd.workflows._rundir import RunDirectory
from visionkd.workflows._tasks import Answers, work_of
from visionkd.workflows._training import torch_device

_LATENCY_ROUNDS = 5
_CPU_TEACHER_GMACS = 20_000.0  # above this, a teacher's row is measured on part of the validation split


def package(
    student: Network,
    run: RunDirectory,
    *,
    data: DataSet,
    config: RunConfig,
    listener: Listener,
    origin: Mapping[str, Any],
) -> Answers:
    """Measure the student on the whole validation split and write ``model/``."""
    answers = _answer(student, data, config, listener)
    if not len(answers.indices):
        raise WorkError("No validation image could be read.", hint="List them with 'visionkd data check DATA'.")
    metrics = answers.metrics()
    scalars = {name: metrics[name] for name in work_of(data.task).PACKAGED if name in metrics}
    if student.packed is not None:  # as the paper counts, beside what the file takes
        huffman = student.quantization["huffman"]
        scalars |= {"huffman_bits": huffman["mean_bits"], "huffman_mb": huffman["size_mb"]}
    save_package(
        student.cpu(), run.model, task=data.task, classes=data.classes, metrics=scalars, origin=dict(origin),
        note=data.note,
    )  # fmt: skip
    run.update(metrics={f"val/{name}": value for name, value in scalars.items()})
    if answers.skipped:
        listener.message(f"{len(answers.skipped)} unreadable validation images were left out", level="warning")
    return answers


def package_encoder(
    network: Network, run: RunDirectory, *, data: DataSet, origin: Mapping[str, Any], losses: Mapping[str, float]
) -> None:
    """Write ``model/`` of an encoder without a classifier, with the decoder that trained beside it."""
    save_package(network.cpu(), run.model, task=data.task, classes=None, metrics=losses, origin=dict(origin))
    run.update(metrics={f"val/{name}": value for name, value in losses.items()})


def validation_figures(run: RunDirectory) -> dict[str, float]:
    """Return the last figures that the training found on the validation split: the loss, and what else there is."""
    found = run.status.get("metrics", {})
    names = ("loss", "zero_shot_top1")
    return {name: float(found[f"val/{name}"]) for name in names if found.get(f"val/{name}") is not None}


def measure_encoder(network: Network, run: RunDirectory) -> None:
    """Write what an encoder costs into ``comparison.json``; there is no accuracy to compare."""
    cost = measure_complexity(network)
    latency = measure([torch_runner(network, name="encoder")], rounds=_LATENCY_ROUNDS)[0].latency_ms
    row = {
        "model": network.architecture,
        "role": "encoder",
        "params_m": cost.params_m,
        "macs_g": cost.macs_g,
        "size_mb": cost.size_mb,
        "latency_ms": latency,
    }
    write_text(run.path / "comparison.json", json.dumps({"num_images": 0, "rows": [row]}, indent=2) + "\n")


def compare(
    student: Network,
    teachers: Sequence[tuple[str, Network]],
    run: RunDirectory,
    *,
    data: DataSet,
    config: RunConfig,
    listener: Listener,
    student_answers: Answers | None,
    baseline: tuple[str, Network] | None = None,
) -> tuple[MetricRow, ...]:
    """Put student, teachers and baseline side by side, and write ``evaluation.npz`` and ``comparison.json``."""
    if data.note:
        listener.message(data.note, level="warning")  # once more, beside the figures
    work, device = work_of(data.task), torch_device(config.compute)
    source = val = data.splits["val"]
    positions = None
    gpu = device.type != "cpu"
    heavy = sum(measure_complexity(teacher).macs_g for _, teacher in teachers) * len(source)
    if not gpu and heavy > _CPU_TEACHER_GMACS:
        count = max(10 * len(data.classes), int(len(source) * _CPU_TEACHER_GMACS / heavy))
        if count < len(val):
            positions = work.some(val, count, seed=config.data.split_seed)
            source = SubsetSource(val, positions)
            listener.message(f"The comparison with the teacher is on {len(source)} of {len(val)} validation images")
    networks: list[tuple[str, Network]] = [
        ("student", student),
        *(("teacher" + str(n), t) for n, (_, t) in enumerate(teachers)),
    ]
    alone = _baseline(config, data, listener)
    if alone is not None:
        baseline = (f"{student.architecture} alone", alone)
    if baseline is not None:
        networks.append(("baseline", baseline[1]))

    def run_one(role: str, network: Network) -> Answers:
        if role == "student" and student_answers is not None and source is val:
            return student_answers
        return _answer(network, data, config, listener, source=source)

    evaluations = work.together(networks, source, run_one=run_one, config=config, device=device)
    rows = []
    latencies = measure([torch_runner(network, name=role) for role, network in networks], rounds=_LATENCY_ROUNDS)
    int8 = student.quantization is not None and student.quantization.get("kind") == "int8"
    names = {"student": f"{student.architecture} INT8" if int8 else student.architecture}
    names |= {"baseline": baseline[0]} if baseline is not None else {}
    names |= {f"teacher{number}": name for number, (name, _) in enumerate(teachers)}
    for role, network in networks:
        found = evaluations.metrics(role)
        values: dict[str, Any] = {"role": role.rstrip("0123456789") if len(networks) > 1 else "model"}
        values |= {name: found[name] for name in work.COMPARED if name in found}
        cost = measure_complexity(network)
        values |= {"params_m": cost.params_m, "macs_g": cost.macs_g, "size_mb": cost.size_mb}
        values["latency_ms"] = next(record.latency_ms for record in latencies if record.model == role)
        rows.append(MetricRow(names[role], values))
    asked = [role for role, _ in networks if role.startswith("teacher")]
    evaluations = evaluations.joined(asked, positions)
    evaluations.save(run.path / "evaluation.npz")
    content: dict[str, Any] = {"note": data.note} if data.note else {}
    content |= {"num_images": len(evaluations.indices), "rows": [{"model": row.model, **row.values} for row in rows]}
    write_text(run.path / "comparison.json", json.dumps(content, indent=2) + "\n")
    return tuple(rows)


def _answer(network: Network, data: DataSet, config: RunConfig, listener: Listener, *, source: Any = None) -> Answers:
    device = torch_device(config.compute)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return work_of(data.task).answer(
        network,
        source if source is not None else data.splits["val"],
        config=config,
        device=device,
        batch_size=min(256, max(16, config.training.batch_size)),
        workers=config.data.workers or 0,
        listener=listener,
    )


def _baseline(config: RunConfig, data: DataSet, listener: Listener) -> Network | None:
    if config.report.baseline is None:
        return None
    network = load_network(config.report.baseline)
    if network.classes != data.classes:
        listener.message(f"The baseline {config.report.baseline} has other classes and is left out", level="warning")
        return None
    return network


def saved_rows(run: RunDirectory) -> tuple[MetricRow, ...]:
    """Return what :func:`compare` wrote."""
    content = json.loads((run.path / "comparison.json").read_text(encoding="utf-8"))
    return tuple(MetricRow(row.pop("model"), row) for row in content["rows"])


def files_of(run: RunDirectory) -> dict[str, Path]:
    """Return what a run made, by name."""
    export = run.path / "export"
    candidates = {
        "model": run.model,
        "onnx": export / "model.onnx",
        "int8": export / "model.int8.onnx",
        "int8_tensorrt": export / "model.int8.tensorrt.onnx",
        "report": run.path / "report.html",
    }
    return {name: path for name, path in candidates.items() if path.exists()}
