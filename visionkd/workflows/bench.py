"""Time models side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from visionkd.benchmark.latency import Runner, measure, ort_runner
from visionkd.benchmark.record import BenchRecord
from visionkd.errors import Problem, RequestError
from visionkd.runtime.session import is_model_file
from visionkd.types import Listener, MetricRow, Progress
from visionkd.workflows.results import BenchResult

BACKENDS = ("torch", "onnxruntime")


def bench(
    *,
    models: Sequence[str],
    backend: Sequence[str] | None = None,
    batch_size: int = 1,
    threads: int = 1,
    rounds: int = 20,
    img_size: int | None = None,
    accelerator: str | None = None,
    listener: Listener | None = None,
) -> BenchResult:
    """Time every model on every backend that can run it, in interleaved rounds.

    Args:
        models: MODELs; a run directory stands for its packaged student, and for its exported file on ``onnxruntime``.
        backend: ``torch``, ``onnxruntime`` or both; None takes what each model's format needs.
        batch_size: Images in a batch.
        threads: Threads within an operator.
        rounds: Interleaved rounds.
        img_size: Size of the images in pixels; None takes each model's own.
        accelerator: ``auto``, ``cpu`` or ``gpu``; None takes the CPU.
        listener: Is told what happens.

    Raises:
        RequestError: If a model or backend is unknown, or no backend can run a model.
    """
    listener = listener or Listener()
    if unknown := sorted(set(backend or ()) - set(BACKENDS)):
        raise RequestError(Problem("--backend", f"unknown name '{unknown[0]}'", f"Known: {', '.join(BACKENDS)}"))
    settings: dict[str, Any] = {
        "batch_size": batch_size,
        "threads": threads,
        "img_size": None if img_size is None else (img_size, img_size),
        "accelerator": accelerator or "cpu",
    }
    runners = [runner for model in models for runner in _runners(model, tuple(backend or ()), settings)]
    records = measure(
        runners, rounds=rounds, on_round=lambda done, total: listener.progress(Progress("bench", done, total))
    )
    return BenchResult(tuple(row(record) for record in records))


def _runners(model: str, backends: tuple[str, ...], settings: dict[str, Any]) -> list[Runner]:
    if is_model_file(model):
        if backends and "onnxruntime" not in backends:
            raise RequestError(Problem("--backend", f"{model} runs in onnxruntime only", "Use --backend onnxruntime."))
        return [ort_runner(model, name=model, **settings)]
    runners = []
    if not backends or "torch" in backends:
        from visionkd.benchmark.torch_runner import torch_runner
        from visionkd.workflows._networks import load_for_bench

        img_size = settings["img_size"][0] if settings["img_size"] else None
        runners.append(torch_runner(load_for_bench(model, img_size=img_size), name=model, **settings))
    if "onnxruntime" in backends:
        exported = Path(model) / "export" / "model.onnx"
        if not exported.is_file():
            steps = (
                f"visionkd export {model}"
                if Path(model).is_dir()
                else f"visionkd export {model} --out model.onnx, then: visionkd bench model.onnx"
            )
            raise RequestError(f"There is no ONNX file of {model} to run in onnxruntime.", hint=f"Run: {steps}")
        runners.append(ort_runner(exported, name=model, **settings))
    return runners


def row(record: BenchRecord) -> MetricRow:
    """Return a record as a line of a table."""
    values = record.to_dict()
    height, width = values.pop("img_size")
    kept = {name: value for name, value in values.items() if name not in ("model", "versions", "rounds", "calls")}
    return MetricRow(record.model, {**kept, "img_size": str(height) if height == width else f"{height}x{width}"})
