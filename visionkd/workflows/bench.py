"""Time models side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from visionkd.benchmark.latency import Runner, engine_runner, measure, ort_runner
from visionkd.benchmark.record import BenchRecord
from visionkd.errors import Problem, RequestError
from visionkd.runtime.bundle_file import file_to_run, is_bundle
from visionkd.runtime.session import backend_of, is_engine_file, is_model_file
from visionkd.runtime.zoo_name import is_zoo_name
from visionkd.types import Listener, MetricRow, Progress
from visionkd.workflows.results import BenchResult

BACKENDS = ("torch", "onnxruntime", "tensorrt")
_EXPORTED = {
    "onnxruntime": ("model.onnx", "model.int8.onnx"),
    "tensorrt": ("model.int8.engine", "model.engine"),
}


def bench(
    *,
    models: Sequence[str],
    backend: Sequence[str] | None = None,
    batch_size: int = 1,
    threads: int = 1,
    rounds: int = 20,
    img_size: int | None = None,
    accelerator: str | None = None,
    cuda_graph: bool = False,
    listener: Listener | None = None,
) -> BenchResult:
    """Time every model on every backend that can run it, in interleaved rounds.

    Args:
        models: MODELs; a run directory stands for its packaged student, and for its exported file on ``onnxruntime``
            and ``tensorrt``.
        backend: ``torch``, ``onnxruntime``, ``tensorrt`` or several; None takes what each model's format needs.
        batch_size: Images in a batch.
        threads: Threads within an operator.
        rounds: Interleaved rounds.
        img_size: Size of the images in pixels; None takes each model's own.
        accelerator: ``auto``, ``cpu`` or ``gpu``; None takes the CPU, and the GPU for engines.
        cuda_graph: Launch engines as CUDA graphs.
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
    }

    def run_file(file: str | Path, name: str) -> Runner:
        if is_engine_file(file):
            return engine_runner(file, name=name, accelerator=accelerator, cuda_graph=cuda_graph, **settings)
        return ort_runner(file, name=name, accelerator=accelerator or "cpu", **settings)  # type: ignore[arg-type]

    def run_torch(model: str) -> Runner:
        from visionkd.benchmark.torch_runner import torch_runner
        from visionkd.workflows._networks import load_for_bench

        network = load_for_bench(model, img_size=img_size)
        return torch_runner(network, name=model, accelerator=accelerator or "cpu", **settings)

    makers = [maker for model in models for maker in _makers(model, tuple(backend or ()), run_file, run_torch)]
    runners = [maker() for maker in makers]
    records = measure(
        runners, rounds=rounds, on_round=lambda done, total: listener.progress(Progress("bench", done, total))
    )
    return BenchResult(tuple(row(record) for record in records))


def _makers(
    model: str,
    backends: tuple[str, ...],
    run_file: Callable[[str | Path, str], Runner],
    run_torch: Callable[[str], Runner],
) -> list[Callable[[], Runner]]:
    """Return what makes the runners of a model; wrong requests are found before the first is made."""
    if is_zoo_name(model):
        return [_zoo_maker(model, backend, run_file, run_torch) for backend in backends or (None,)]
    if is_bundle(model):
        files = [file_to_run(model, backend) for backend in backends or (None,)]
        return [lambda file=file: run_file(file, file) for file in files]  # type: ignore[misc]
    if is_model_file(model):
        own = backend_of(model)
        if backends and own not in backends:
            raise RequestError(Problem("--backend", f"{model} runs in {own} only", f"Use --backend {own}."))
        return [lambda: run_file(model, model)]
    makers: list[Callable[[], Runner]] = []
    if not backends or "torch" in backends:
        makers.append(lambda: run_torch(model))
    for backend in ("onnxruntime", "tensorrt"):
        if backend in backends:
            exported = _exported(model, backend)
            makers.append(lambda file=exported: run_file(file, model))
    return makers


def _zoo_maker(
    model: str,
    backend: str | None,
    run_file: Callable[[str | Path, str], Runner],
    run_torch: Callable[[str], Runner],
) -> Callable[[], Runner]:
    if backend == "tensorrt":
        _exported(model, backend)  # says how an engine is built
    file = file_to_run(model, backend)
    return (lambda: run_file(file, model)) if is_model_file(file) else (lambda: run_torch(model))


def _exported(model: str, backend: str) -> Path:
    files = [Path(model) / "export" / name for name in _EXPORTED[backend]]
    for file in files:
        if file.is_file():
            return file
    kind = {"onnxruntime": "ONNX file", "tensorrt": "engine"}[backend]
    suffix, option = (".onnx", "") if backend == "onnxruntime" else (".engine", " --format tensorrt")
    steps = (
        f"visionkd export {model}{option}"
        if Path(model).is_dir()
        else f"visionkd export {model} --out model.onnx, then: visionkd bench model.onnx"
    )
    if backend == "tensorrt" and not Path(model).is_dir():
        steps = f"visionkd export {model} --out model.onnx, then: visionkd export model.onnx{option} --out m{suffix}"
    raise RequestError(f"There is no {kind} of {model} to run in {backend}.", hint=f"Run: {steps}")


def row(record: BenchRecord) -> MetricRow:
    """Return a record as a line of a table."""
    values = record.to_dict()
    height, width = values.pop("img_size")
    kept = {name: value for name, value in values.items() if name not in ("model", "versions", "rounds", "calls")}
    return MetricRow(record.model, {**kept, "img_size": str(height) if height == width else f"{height}x{width}"})
