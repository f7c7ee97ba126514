"""Latency of several models side by side, in interleaved rounds so that drift of the machine hits all alike.

No torch here: a device without it times its model files. ``torch_runner.py`` adds networks in PyTorch.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from visionkd.benchmark.record import BenchRecord, machine, versions
from visionkd.errors import Problem, RequestError
from visionkd.runtime.boxes import BoxRule, choose_boxes
from visionkd.runtime.onnx_file import read_onnx_file
from visionkd.runtime.ort import OrtModel
from visionkd.types import InputSpec

_ROUND_S = 0.05
_WARMUP_S = 0.3
_MAX_CALLS_PER_ROUND = 50


@dataclass
class Runner:
    """A model ready to be timed.

    Attributes:
        model: Name for the table.
        backend: ``torch`` or ``onnxruntime``.
        call: Runs one batch and returns when the result is there.
        threads: Threads it runs with.
        device: ``cpu``, ``gpu`` or the name of the GPU.
        batch_size: Images in a batch.
        img_size: Height and width in pixels.
        precision: Number format of its weights.
        params_m: Parameters in millions, if known.
        macs_g: Multiply-accumulates for one image in 10^9, if known.
        size_mb: Weights, or the file, in 10^6 bytes.
        setting: Gives the context that calls are made in, such as PyTorch's number of threads.
    """

    model: str
    backend: str
    call: Callable[[], Any]
    threads: int
    device: str
    batch_size: int
    img_size: tuple[int, int]
    precision: str = "fp32"
    params_m: float | None = None
    macs_g: float | None = None
    size_mb: float | None = None
    setting: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext


def ort_runner(
    path: str | os.PathLike[str],
    *,
    name: str,
    batch_size: int = 1,
    threads: int = 1,
    img_size: tuple[int, int] | None = None,
    accelerator: Literal["auto", "cpu", "gpu"] = "cpu",
) -> Runner:
    """Make a runner for an ONNX file in ONNX Runtime; any file with one image input will do.

    Args:
        path: The file.
        name: Name for the table.
        batch_size: Images in a batch.
        threads: Threads within an operator.
        img_size: Height and width; needed only where the file does not fix them.
        accelerator: ``cpu``, ``gpu`` or ``auto``.
    """
    model = OrtModel(path, threads=threads, accelerator=accelerator)
    size = _onnx_size(model, img_size)
    image = np.random.default_rng(0).random((batch_size, 3, *size), dtype=np.float32)
    fixed_batch = model.input_shapes[0][0]
    if isinstance(fixed_batch, int) and fixed_batch != batch_size:
        raise RequestError(
            f"'{path}' takes batches of {fixed_batch}, not {batch_size}", hint=f"Pass --batch-size {fixed_batch}"
        )
    cost = json.loads(model.metadata.get("complexity", "{}"))  # of the network it was exported from
    return Runner(
        model=name,
        backend="onnxruntime",
        call=_answering(model, image),
        threads=threads,
        device=model.device,
        batch_size=batch_size,
        img_size=size,
        precision="int8" if read_onnx_file(path).is_quantized else "fp32",
        params_m=cost.get("params_m"),
        macs_g=cost.get("macs_g"),
        size_mb=Path(path).stat().st_size / 1e6,
    )


def engine_runner(
    path: str | os.PathLike[str],
    *,
    name: str,
    batch_size: int = 1,
    threads: int = 1,
    img_size: tuple[int, int] | None = None,
    accelerator: Literal["auto", "cpu", "gpu"] | None = None,
    cuda_graph: bool = False,
) -> Runner:
    """Make a runner for a TensorRT engine; a call copies the batch to the GPU and the answer back.

    Args:
        path: The file.
        name: Name for the table.
        batch_size: Images in a batch.
        threads: Said in the record; the engine runs on the GPU.
        img_size: Height and width; an engine has one, and others are refused.
        accelerator: ``cpu`` is refused.
        cuda_graph: Launch it as a CUDA graph.
    """
    if accelerator == "cpu":
        raise RequestError(Problem("--accelerator", f"'{path}' is a TensorRT engine and needs a GPU", "Leave it out."))
    from visionkd.runtime.trt import TrtModel

    model = TrtModel(path, cuda_graph=cuda_graph)
    size = tuple(model.input_shapes[0][2:])
    if img_size is not None and tuple(img_size) != size:
        raise RequestError(f"'{path}' takes images of {size[0]} x {size[1]} pixels only", hint="Leave --img-size out.")
    low, _, high = model.info.batch
    if not low <= batch_size <= high:  # run() would cut or fill it, and the time be that of another batch
        raise RequestError(f"'{path}' takes batches of {low} to {high}, not {batch_size}", hint="Build it with --batch")
    image = np.random.default_rng(0).random((batch_size, 3, *size), dtype=np.float32)
    cost = json.loads(model.metadata.get("complexity", "{}"))
    return Runner(
        model=name,
        backend=model.info.library,
        call=_answering(model, image),
        threads=threads,
        device=model.device,
        batch_size=batch_size,
        img_size=size,  # type: ignore[arg-type]
        precision=f"int8+{model.info.precision}" if model.info.quantized else model.info.precision,
        params_m=cost.get("params_m"),
        macs_g=cost.get("macs_g"),
        size_mb=model.info.engine_bytes / 1e6,
    )


def measure(
    runners: Sequence[Runner], *, rounds: int = 20, on_round: Callable[[int, int], None] | None = None
) -> tuple[BenchRecord, ...]:
    """Time every runner in ``rounds`` interleaved rounds and return one record each, in the given order.

    Each is warmed up first. Every round visits all runners, beginning with another one each time, so that heat and
    neighbours slow all of them alike. The figures are over single calls: median and 90th percentile.

    Args:
        runners: What to time.
        rounds: Rounds; each spends about 50 ms on each runner, and at least one call.
        on_round: Told the number of rounds done and the total, for progress.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}, and at least one is needed")
    calls = [_warm_up(runner) for runner in runners]
    times: list[list[float]] = [[] for _ in runners]
    for done in range(rounds):
        for offset in range(len(runners)):
            index = (done + offset) % len(runners)
            with runners[index].setting():
                times[index] += [_timed(runners[index].call) for _ in range(calls[index])]
        if on_round is not None:
            on_round(done + 1, rounds)
    host, installed = machine(), versions()
    return tuple(
        _record(runner, seconds, rounds, host, installed) for runner, seconds in zip(runners, times, strict=True)
    )


def _warm_up(runner: Runner) -> int:
    """Run for a while, and return how many calls fill a round."""
    with runner.setting():
        runner.call()  # lazy initialisation, kept out of the estimate
        start, calls = time.perf_counter(), 0
        while not calls or time.perf_counter() - start < _WARMUP_S:
            runner.call()
            calls += 1
        each = (time.perf_counter() - start) / calls
    return max(1, min(_MAX_CALLS_PER_ROUND, round(_ROUND_S / each)))


def _timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _record(runner: Runner, seconds: list[float], rounds: int, host: str, installed: dict[str, str]) -> BenchRecord:
    median = statistics.median(seconds)
    return BenchRecord(
        model=runner.model,
        backend=runner.backend,
        device=host if runner.device == "cpu" else runner.device,
        precision=runner.precision,
        batch_size=runner.batch_size,
        threads=runner.threads,
        img_size=runner.img_size,
        latency_ms=1e3 * median,
        latency_p90_ms=1e3 * float(np.percentile(seconds, 90)),
        throughput_img_s=runner.batch_size / median,
        params_m=runner.params_m,
        macs_g=runner.macs_g,
        size_mb=runner.size_mb,
        rounds=rounds,
        calls=len(seconds),
        versions=installed,
    )


def _answering(model: Any, image: np.ndarray) -> Callable[[], Any]:
    """Return what runs a batch; of a detector up to the boxes that it finds, as its network in PyTorch does."""
    if model.metadata.get("task") != "detection":
        return lambda: model.run(image)
    rule = BoxRule.from_dict(json.loads(model.metadata.get("boxes", "{}")))

    def call() -> None:
        answers = dict(zip(model.outputs, model.run(image), strict=True))
        for boxes, scores in zip(answers["boxes"], answers["scores"], strict=True):
            choose_boxes(boxes, scores, rule)

    return call


def _onnx_size(model: OrtModel, img_size: tuple[int, int] | None) -> tuple[int, int]:
    shape = model.input_shapes[0]
    if len(model.inputs) != 1 or len(shape) != 4:
        raise RequestError(f"'{model.path}' does not take one batch of images: its inputs are {model.input_shapes}")
    fixed = tuple(side for side in shape[2:] if isinstance(side, int))
    if len(fixed) == 2:
        if img_size is not None and tuple(img_size) != fixed:
            raise RequestError(
                f"'{model.path}' takes images of {fixed[0]} x {fixed[1]} pixels only", hint="Leave --img-size out."
            )
        return fixed
    if img_size is None:
        if "input" not in model.metadata:
            raise RequestError(f"'{model.path}' does not say how large its images are", hint="Pass --img-size PIXELS.")
        return InputSpec.from_dict(json.loads(model.metadata["input"])).img_size
    return img_size
