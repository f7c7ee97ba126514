"""A bundle: the directory that travels to a device, with a manifest of what it holds."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from visionkd.errors import DataError, RequestError
from visionkd.files import sha256
from visionkd.runtime.cuda_driver import find_device
from visionkd.runtime.engine_file import ENGINE_SUFFIX
from visionkd.runtime.zoo_name import local_model

MANIFEST = "manifest.json"
BUNDLE_FORMAT = 1
#: Which kind of file each backend prefers; TensorRT refuses what is written for a processor.
_ORDER: Mapping[str, tuple[str, ...]] = {
    "onnxruntime": ("int8-cpu", "float", "int8-tensorrt"),
    "tensorrt": ("int8-tensorrt", "float"),
}
_USES: Mapping[str | None, Literal["torch", "onnx"]] = {"torch": "torch", "onnxruntime": "onnx"}


@dataclass(frozen=True)
class Bundle:
    """A bundle that was read.

    Attributes:
        directory: Where it is.
        manifest: ``manifest.json``.
    """

    directory: Path
    manifest: Mapping[str, Any]

    def onnx(self, backend: Literal["onnxruntime", "tensorrt"]) -> Path:
        """Return the ONNX file that ``backend`` is to run or to build from.

        Raises:
            RequestError: If there is none.
        """
        by_kind = {entry["kind"]: name for name, entry in self.manifest["files"].items()}
        for kind in _ORDER[backend]:
            if kind in by_kind:
                return self.directory / by_kind[kind]
        raise RequestError(
            f"the bundle '{self.directory}' has no ONNX file for {backend}",
            hint="Write it anew where the model is: visionkd export MODEL --bundle DIR",
        )

    def engines(self) -> list[Path]:
        """Return the engines that were built in it."""
        return sorted(self.directory.glob(f"*{ENGINE_SUFFIX}"))


def is_bundle(path: str | os.PathLike[str]) -> bool:
    """Tell whether ``path`` is a bundle's directory."""
    return (Path(path) / MANIFEST).is_file()


def read_bundle(directory: str | os.PathLike[str]) -> Bundle:
    """Read a bundle and compare every file with the manifest. Files that are not in it, such as engines, are let be.

    Raises:
        DataError: If the manifest cannot be read, or files are missing or changed; all of them are named.
        RequestError: If a later version wrote it.
    """
    directory = Path(directory)
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        entries = {str(name): (entry["kind"], entry["sha256"]) for name, entry in manifest["files"].items()}
        number = int(manifest["format"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"'{directory / MANIFEST}' cannot be read: {error}", hint="Copy the bundle again.") from error
    if number > BUNDLE_FORMAT:
        raise RequestError(
            f"'{directory}' is a bundle of format {number}, and this version reads {BUNDLE_FORMAT}",
            hint="Update visionkd: pip install --upgrade visionkd",
        )
    wrong = [name for name in entries if Path(name).name != name]
    if wrong:
        raise DataError(f"'{directory / MANIFEST}' names a file outside of the bundle: {wrong[0]}")
    problems = []
    for name, (_, expected) in entries.items():
        if not (directory / name).is_file():
            problems.append(f"{name} is missing")
        elif (found := sha256(directory / name)) != expected:
            problems.append(f"{name} has SHA-256 {found[:12]}..., not {expected[:12]}...")
    if problems:
        raise DataError(f"the bundle '{directory}' is damaged: {'; '.join(problems)}", hint="Copy the bundle again.")
    return Bundle(directory, manifest)


def file_to_run(model: str, backend: str | None = None) -> str:
    """Return the file of a bundle that ``backend`` runs, after a look at all of its hashes; other MODELs as they are.

    A ``zoo:`` name is pulled: to an ONNX file for ``onnxruntime``, else to the first of its forms that can be run here.

    Args:
        model: Any MODEL.
        backend: ``torch``, ``onnxruntime`` or ``tensorrt``; None takes an engine that was built in the bundle, where
            there is a GPU, or else ONNX.

    Raises:
        RequestError: If ``tensorrt`` is asked for and no engine was built yet.
        DataError: If the bundle is damaged.
    """
    model = local_model(model, use=_USES.get(backend, "any"))
    if not is_bundle(model):
        return model
    bundle = read_bundle(model)
    engines = bundle.engines() if backend == "tensorrt" or find_device() is not None else []
    if backend == "tensorrt" and not engines:
        raise RequestError(
            f"no engine was built in the bundle '{model}' yet", hint=f"Run: visionkd export {model} --format tensorrt"
        )
    return str(engines[0] if engines and backend != "onnxruntime" else bundle.onnx("onnxruntime"))
