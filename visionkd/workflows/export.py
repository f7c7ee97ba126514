"""Write a model in a format for deployment, checked before it gets its name.

This file imports no torch: a device without it builds engines from ONNX files.
"""

from __future__ import annotations

from visionkd.errors import Problem, RequestError
from visionkd.runtime.session import is_model_file
from visionkd.types import Listener
from visionkd.workflows.results import BundleResult, EngineResult, ExportResult

FORMATS = ("onnx", "tensorrt")


def export(
    *,
    model: str,
    format: str = "onnx",
    out: str | None = None,
    data: str | None = None,
    verify_images: int | None = None,
    opset: int | None = None,
    int8: bool = False,
    target: str | None = None,
    max_drop: float | None = None,
    min_speedup: float | None = None,
    bundle: str | None = None,
    precision: str | None = None,
    batch: str | None = None,
    workspace_mb: int | None = None,
    timing_cache: str | None = None,
    dla: int | None = None,
    builder: str | None = None,
    compute_capability: str | None = None,
    overwrite: bool = False,
    listener: Listener | None = None,
) -> ExportResult | EngineResult | BundleResult:
    """Export ``model``.

    Args:
        model: MODEL; an ``.onnx`` file only for ``tensorrt`` and ``bundle``.
        format: ``onnx`` or ``tensorrt``.
        out: File to write; None takes ``export/`` of the run, or the working directory.
        data: DATA to compare on; None takes the run's, or random images without accuracy.
        verify_images: Images to compare on.
        opset: ONNX operator set; None takes the exporter's own.
        int8: Write an INT8 file; a float model is quantised on images of ``data`` first.
        target: ``cpu`` or ``tensorrt``: whom the INT8 file is for.
        max_drop: Largest loss of top-1 (mIoU, AP) of INT8 against float, in points; layers stay in float to keep it.
            None: 1.
        min_speedup: Least speed-up of INT8 against float on this processor. None: 1.
        bundle: Directory to write what travels to a device into: ONNX files, labels, preprocessing, a manifest.
        precision: ``fp32``, or ``fp16`` for what an engine computes outside INT8.
        batch: ``N``, or ``SMALLEST:BEST:LARGEST``, of an engine.
        workspace_mb: Most memory that a layer of an engine may use, in 2^20 bytes.
        timing_cache: File that keeps TensorRT's measurements; None takes one in the cache for this version and GPU.
        dla: Core of the deep learning accelerator to build for.
        builder: ``tensorrt`` or ``tensorrt_rtx``; None takes what is installed.
        compute_capability: GPU to build for without having it, such as ``8.9``; ``tensorrt_rtx`` only.
        overwrite: Replace a file that exists.
        listener: Is told what happens.

    Raises:
        RequestError: If a name is unknown or the file exists.
        WorkError: If the file answers differently from the network; no file is left then.
    """
    listener = listener or Listener()
    if format not in FORMATS:
        raise RequestError(Problem("--format", f"'{format}' is unknown", f"Use one of: {', '.join(FORMATS)}."))
    engine = {
        "precision": precision, "batch": batch, "workspace_mb": workspace_mb, "timing_cache": timing_cache, "dla": dla,
        "builder": builder, "compute_capability": compute_capability,
    }  # fmt: skip
    quantized = {"int8": int8, "target": target, "max_drop": max_drop, "min_speedup": min_speedup}
    if format == "tensorrt":
        from visionkd.workflows._engine import export_engine

        _only_onnx({"--opset": opset, "--bundle": bundle, **_spelled(quantized)})
        return export_engine(
            model=model, out=out, data=data, verify_images=verify_images, overwrite=overwrite, listener=listener,
            **engine,  # type: ignore[arg-type]
        )  # fmt: skip
    if given := [f"--{name.replace('_', '-')}" for name, value in engine.items() if value is not None]:
        raise RequestError([Problem(name, "is for engines only", "Give --format tensorrt.") for name in given])
    if bundle is not None:
        from visionkd.workflows._bundle import export_bundle

        if target is not None:
            raise RequestError(Problem("--target", "does not go with --bundle, which holds both", "Leave it out."))

        def export_one(file: str, chosen: str | None) -> object:
            limits = {"max_drop": max_drop, "min_speedup": min_speedup if chosen != "tensorrt" else None}
            return export(
                model=model, out=file, data=data, verify_images=verify_images, opset=opset, int8=int8, target=chosen,
                listener=listener, **limits,
            )  # fmt: skip

        return export_bundle(
            model=model, directory=bundle, export=export_one, int8=int8, overwrite=overwrite, listener=listener
        )
    if is_model_file(model):
        raise RequestError(
            f"{model} is an exported file already.",
            hint="Give the run or package it came from, or --format tensorrt to build an engine from it.",
        )
    from visionkd.workflows._export_model import export_model

    return export_model(
        model=model, out=out, data=data, verify_images=verify_images, opset=opset, overwrite=overwrite,
        listener=listener,
        **quantized,  # type: ignore[arg-type]
    )  # fmt: skip


def _only_onnx(options: dict[str, object]) -> None:
    if given := [name for name, value in options.items() if value is not None]:
        raise RequestError([Problem(name, "does not go with --format tensorrt", "Leave it out.") for name in given])


def _spelled(options: dict[str, object]) -> dict[str, object]:
    """Return options by their names on the command line; None where one was not given."""
    return {f"--{name.replace('_', '-')}": None if value is False else value for name, value in options.items()}
