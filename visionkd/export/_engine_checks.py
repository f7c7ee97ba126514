"""What is looked at before minutes of building: the file, the disk, the GPU, and whether the options fit."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from visionkd.errors import Problem, RequestError, WorkError
from visionkd.runtime.cuda_driver import CudaDevice
from visionkd.runtime.engine_file import Library
from visionkd.runtime.onnx_file import OnnxFile, read_onnx_file

_LOWEST_OPSET = 13
_REQUIRED = ("visionkd_version", "task", "input")
_DLA_PRECISIONS = "The deep learning accelerator computes in FP16 and INT8 only: give --precision fp16."


@dataclass(frozen=True)
class EngineOptions:
    """How to build.

    Attributes:
        precision: ``fp32``, or ``fp16`` for what is outside the INT8 islands.
        batch: Smallest, best and largest batch; three equal ones make it static.
        workspace_mb: Most memory that a layer may use while it runs, in 2^20 bytes; None leaves it to TensorRT.
        timing_cache: File that keeps measured tactics; None for no file.
        dla_core: Core of the deep learning accelerator to build for; None for the GPU.
        compute_capability: GPU to build for without having it, ``tensorrt_rtx`` only, such as ``8.9``.
    """

    precision: Literal["fp32", "fp16"] = "fp32"
    batch: tuple[int, int, int] = (1, 1, 16)
    workspace_mb: int | None = None
    timing_cache: Path | None = None
    dla_core: int | None = None
    compute_capability: str | None = None


def check_onnx(path: Path, *, for_tensorrt: bool = True) -> OnnxFile:
    """Read an ONNX file and refuse what is not ours and, unless ``for_tensorrt`` is off, what cannot be an engine.

    Raises:
        RequestError: If it is not ours, its operator set is too old, it chooses proposals, or more than the batch is
            free.
    """
    found = read_onnx_file(path)
    again = "Export it again from the model it came from: visionkd export MODEL --format onnx"
    if missing := [key for key in _REQUIRED if key not in found.metadata]:
        raise RequestError(
            f"'{path}' was not exported by visionkd: its metadata lacks {', '.join(missing)}, so that an engine of it "
            "would know neither its classes nor its input",
            hint=again,
        )
    if not for_tensorrt:
        return found
    if found.opset < _LOWEST_OPSET:
        raise RequestError(
            f"'{path}' uses ONNX operator set {found.opset}, and quantised graphs need {_LOWEST_OPSET} or later",
            hint=again,
        )
    if found.int8_target == "cpu":
        raise RequestError(
            f"'{path}' is quantised for ONNX Runtime on a processor (uint8 activations), which TensorRT does not take",
            hint="Export it for TensorRT: visionkd export MODEL --int8 --target tensorrt",
        )
    if found.has_proposals:
        raise RequestError(
            f"'{path}' is of a detector of two stages and chooses its proposals itself (NonMaxSuppression,"
            " RoiAlign): TensorRT-RTX builds neither, and TensorRT was not tried with them",
            hint="Run it in ONNX Runtime, or distil it into a detector of a single stage, such as fcos_BACKBONE.",
        )
    for name, shape in found.inputs.items():
        if len(shape) != 4 or any(not isinstance(side, int) or side < 1 for side in shape[1:]):
            shown = " x ".join("?" if side is None else str(side) for side in shape)
            raise RequestError(
                f"the input '{name}' of '{path}' is {shown}: an engine takes N x C x H x W with only the batch free",
                hint=again,
            )
    return found


def check_batch(onnx: Path, described: OnnxFile, options: EngineOptions) -> None:
    """Refuse batches that are out of order, or that a file with a fixed batch does not take."""
    low, best, high = options.batch
    if not 1 <= low <= best <= high:
        raise RequestError(
            Problem("--batch", f"{low}:{best}:{high} is not smallest:best:largest", "Example: --batch 1:8:32")
        )
    for shape in described.inputs.values():
        if isinstance(shape[0], int) and options.batch != (shape[0],) * 3:
            raise RequestError(
                Problem("--batch", f"'{onnx}' has a fixed batch of {shape[0]}", f"Give --batch {shape[0]}.")
            )


def check_room(path: Path, onnx: Path) -> None:
    """Refuse a disk that does not even hold the ONNX file once more, before minutes of building."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    free, needed = shutil.disk_usage(folder).free, onnx.stat().st_size
    if free < needed:
        raise WorkError(
            f"there are {free / 1e6:.0f} MB free for '{path}', and the engine may take {needed / 1e6:.0f} MB",
            hint="Free some space, or choose another disk with --out.",
        )


def capability_for(trt: Any, library: Library, device: CudaDevice | None, wanted: str | None) -> str:
    """Return the compute capability to build for, and refuse what this library cannot build here."""
    if library == "tensorrt_rtx":
        if wanted is None and device is None:
            raise RequestError(
                Problem("--compute-capability", "is required: there is no GPU here to build for", "Example: 8.9")
            )
        found = wanted or device.compute_capability  # type: ignore[union-attr]
        sm_of(trt, found)
        return found
    if device is None:
        raise RequestError(
            "TensorRT builds engines on the GPU that will run them, and there is no NVIDIA GPU with a driver here",
            hint="Run it on the device; tensorrt_rtx builds without one: --builder tensorrt_rtx --compute-capability X",
        )
    if wanted is not None and wanted != device.compute_capability:
        raise RequestError(
            Problem(
                "--compute-capability",
                f"TensorRT builds for the GPU that is here ({device.compute_capability}), not for {wanted}",
                "Leave it out, or give --builder tensorrt_rtx.",
            )
        )
    return device.compute_capability


def sm_of(trt: Any, capability: str) -> Any:
    """Return TensorRT-RTX's own name of a compute capability."""
    members = {name: member for name, member in trt.ComputeCapability.__members__.items() if name.startswith("SM")}
    name = f"SM{capability.replace('.', '')}"
    if name not in members:
        known = ", ".join(f"{name[2:-1]}.{name[-1]}" for name in members)
        raise RequestError(
            Problem("--compute-capability", f"TensorRT-RTX does not build for {capability}", f"Known: {known}")
        )
    return members[name]


def check_dla(builder: Any, library: Library, version: str, options: EngineOptions) -> None:
    """Refuse a deep learning accelerator that is not there or does not take what is asked for."""
    core = options.dla_core
    if core is None:
        return
    count, shown = getattr(builder, "num_DLA_cores", 0), f"{library} {version}"
    low, best, high = options.batch
    if library == "tensorrt_rtx":
        reason, hint = "TensorRT-RTX builds for GPUs only, and has no deep learning accelerator", "Leave it out."
    elif count == 0:
        reason = (
            f"{shown} reports no deep learning accelerator on this machine: it exists on Xavier and Orin, not on "
            "Orin Nano, Thor or desktop GPUs; TensorRT 11.0 to 11.3 do not know it"
        )
        hint = "Leave --dla out; the engine then runs on the GPU."
    elif not 0 <= core < count:
        reason, hint = f"core {core} does not exist: there are {count}", f"Give a number below {count}."
    elif not low == best == high:
        reason, hint = "the deep learning accelerator takes static shapes only", "Give one batch: --batch 1."
    elif options.precision == "fp32":
        reason, hint = "FP32 does not run on it", _DLA_PRECISIONS
    else:
        return
    raise RequestError(Problem("--dla", reason, hint))
