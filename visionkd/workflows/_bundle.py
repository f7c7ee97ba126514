"""Gather what travels to a device."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from visionkd.errors import RequestError
from visionkd.export.bundle import kind_of, write_bundle
from visionkd.runtime.onnx_file import read_onnx_file
from visionkd.runtime.session import ONNX_SUFFIX, is_engine_file
from visionkd.types import Listener
from visionkd.workflows.results import BundleResult


def export_bundle(
    *,
    model: str,
    directory: str,
    export: Callable[[str, str | None], object],
    int8: bool = False,
    overwrite: bool = False,
    listener: Listener | None = None,
) -> BundleResult:
    """Write a bundle of ``model``.

    Args:
        model: A run with ONNX files, an ONNX file, or any other MODEL, which is exported first.
        directory: Where to write it.
        export: Exports ``model`` to a file, for a target of INT8 or as it is.
        int8: Export INT8 files anew, whatever files a run has.
        overwrite: Replace a bundle that is there.
        listener: Is told what happens.

    Raises:
        RequestError: If the model is an engine, or the directory exists.
    """
    listener = listener or Listener()
    if is_engine_file(model):
        raise RequestError(
            f"{model} is an engine, which runs on the device that built it only.", hint="Give an ONNX file, or a run."
        )
    with tempfile.TemporaryDirectory(prefix="visionkd_") as folder:
        files = [] if int8 else _files(model)
        if not files:
            files = [Path(folder) / "model.onnx"]
            export(str(files[0]), None)
            if kind_of(read_onnx_file(files[0])) == "int8-cpu":  # of a quantised MODEL; the other target as well
                files.append(Path(folder) / "model.int8.tensorrt.onnx")
                export(str(files[1]), "tensorrt")
        described = [read_onnx_file(file) for file in files]
        kinds = {kind_of(each) for each in described}
        if any(each.has_proposals for each in described):
            listener.message("The bundle holds a float model: detectors of two stages have no INT8 form, and no engine")
        elif kinds == {"float"}:
            listener.message(
                "The bundle holds a float model only: there is no INT8 file. Add --int8 to write them",
                level="warning",
            )
        elif "int8-tensorrt" not in kinds:
            listener.message(
                "The bundle has no INT8 file for TensorRT: add one with --target tensorrt", level="warning"
            )
        bundle = write_bundle(files, directory, origin=Path(model).name, overwrite=overwrite)
    names = tuple(sorted(path.name for path in bundle.directory.iterdir()))
    size = sum((bundle.directory / name).stat().st_size for name in names)
    return BundleResult(bundle.directory, names, size / 1e6)


def _files(model: str) -> list[Path]:
    """Return the INT8 files of a run, for both targets where they exist, and the float one where TensorRT has none."""
    if model.lower().endswith(ONNX_SUFFIX):
        return [Path(model)]
    by_kind: dict[str, Path] = {}
    for file in sorted((Path(model) / "export").glob(f"*{ONNX_SUFFIX}")):
        by_kind.setdefault(kind_of(read_onnx_file(file)), file)
    if "int8-tensorrt" in by_kind:
        by_kind.pop("float", None)
    return list(by_kind.values())
