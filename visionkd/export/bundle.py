"""Write a bundle: ONNX files, labels, preprocessing, a manifest with hashes, and how to go on on the device."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import visionkd
from visionkd.errors import RequestError
from visionkd.export._engine_checks import check_onnx
from visionkd.files import check_writable, sha256
from visionkd.runtime.bundle_file import BUNDLE_FORMAT, MANIFEST, Bundle, is_bundle, read_bundle
from visionkd.runtime.engine_file import engine_name
from visionkd.runtime.onnx_file import OnnxFile

_NAMES = {"int8-tensorrt": "model.int8.tensorrt.onnx", "int8-cpu": "model.int8.onnx", "float": "model.onnx"}


def write_bundle(
    files: Sequence[Path], directory: str | os.PathLike[str], *, origin: str, overwrite: bool = False
) -> Bundle:
    """Write a bundle from ONNX files of one model; it appears complete or not at all.

    Args:
        files: ONNX files of visionkd's, at most one for each of: INT8 for TensorRT, INT8 for a processor, float.
        directory: Where to write it.
        origin: What it was made from, for the manifest.
        overwrite: Replace a bundle that is there; another directory is never replaced.

    Raises:
        RequestError: If the files are not ours, are of several models or the directory exists.
    """
    directory = Path(directory)
    _check_place(directory, overwrite=overwrite)
    described = {file: check_onnx(file, for_tensorrt=False) for file in files}
    kinds = {file: kind_of(found) for file, found in described.items()}
    _check_same(described, kinds)
    first = next(iter(described.values()))
    check_writable(directory / MANIFEST)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", suffix=".tmp", dir=directory.absolute().parent))
    try:
        entries: dict[str, str] = {}
        for file, kind in kinds.items():
            shutil.copyfile(file, temporary / _NAMES[kind])
            entries[_NAMES[kind]] = kind
        for name, text in _texts(first, set(kinds.values())).items():
            (temporary / name).write_text(text, encoding="utf-8")
            entries[name] = name.partition(".")[0].lower()
        manifest = {
            "format": BUNDLE_FORMAT,
            "visionkd_version": visionkd.__version__,
            "origin": origin,
            "task": first.metadata["task"],
            "architecture": first.metadata.get("architecture"),
            "metrics": json.loads(first.metadata.get("metrics") or "{}"),
            "files": {
                name: {
                    "kind": kind,
                    "bytes": (temporary / name).stat().st_size,
                    "sha256": sha256(temporary / name),
                }
                for name, kind in entries.items()
            },
        }
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.chmod(0o755)
        if directory.exists():
            shutil.rmtree(directory)
        os.replace(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return read_bundle(directory)


def kind_of(found: OnnxFile) -> str:
    """Return ``float``, ``int8-cpu`` or ``int8-tensorrt``."""
    return "float" if found.int8_target is None else f"int8-{found.int8_target}"


def _check_place(directory: Path, *, overwrite: bool) -> None:
    if not directory.exists():
        return
    if not is_bundle(directory) and not (directory.is_dir() and not any(directory.iterdir())):
        raise RequestError(f"{directory} exists and is no bundle.", hint="Give another directory with --bundle.")
    if is_bundle(directory) and not overwrite:
        raise RequestError(
            f"{directory} exists, and nothing is written over unasked.", hint="Give --overwrite, or another directory."
        )


def _check_same(described: Mapping[Path, OnnxFile], kinds: Mapping[Path, str]) -> None:
    if not described:
        raise RequestError("a bundle needs an ONNX file", hint="Run: visionkd export MODEL --int8")
    for key in ("task", "classes", "input", "architecture"):
        if len({found.metadata.get(key) for found in described.values()}) > 1:
            names = ", ".join(file.name for file in described)
            raise RequestError(f"the ONNX files {names} are of several models: their {key} differs")
    if len(set(kinds.values())) < len(kinds):
        names = ", ".join(f"{file.name} ({kind})" for file, kind in kinds.items())
        raise RequestError(f"a bundle holds one file of each kind, and these are several: {names}")


def _texts(found: OnnxFile, kinds: set[str]) -> dict[str, str]:
    texts = {}
    classes = json.loads(found.metadata.get("classes") or "null")
    if classes:
        texts["labels.txt"] = "".join(f"{' '.join(str(name).split())}\n" for name in classes)
    texts["preprocessing.json"] = json.dumps(_preprocessing(found), indent=2) + "\n"
    texts["README.md"] = _readme(found, kinds, bool(classes))
    return texts


def _preprocessing(found: OnnxFile) -> dict[str, Any]:
    task = found.metadata["task"]
    views = {
        "classification": ["resize the shorter side to floor(img_size / crop_pct), antialiased", "cut out the centre"],
        "segmentation": ["resize the whole image to img_size, antialiased"],
        "detection": [
            "resize the whole image, antialiased, so that it just fits img_size at its own proportions",
            "put it at the upper left of img_size; the rest has the colour 255 * mean",
        ],
    }
    answers: dict[str, Any] = {
        "segmentation": {
            "output": "resize the logits bilinearly to the image's own size, then take the largest of each pixel"
        },
        "detection": {
            "output": "keep scores above score_threshold, of each level or class the 'candidates' highest, and boxes"
            " with sides of min_side or more; of boxes of one class that overlap more than nms_threshold the highest"
            " score; at most max_detections; then divide by the scale of the resizing. With own_boxes there is a box"
            " for each class, N x M x K x 4",
            "boxes": json.loads(found.metadata.get("boxes", "{}")),
        },
    }
    return {
        "input": json.loads(found.metadata["input"]),
        "steps": [
            "decode as RGB, with the orientation of the file applied",
            *views[task],
            "divide by 255: float32 N x 3 x H x W in [0, 1]",
        ],
        "normalization": "part of the model: mean and std are not to be applied again",
        **answers.get(task, {}),
    }


def _readme(found: OnnxFile, kinds: set[str], named: bool) -> str:
    name = _NAMES["int8-tensorrt" if "int8-tensorrt" in kinds else "float"]
    engine = engine_name(name)
    listed = {
        "int8-tensorrt": "INT8 for TensorRT (signed Q/DQ)",
        "int8-cpu": "INT8 for ONNX Runtime on a processor",
        "float": "float",
    }
    lines = [f"- `{_NAMES[kind]}`: {text}" for kind, text in listed.items() if kind in kinds]
    lines += ["- `labels.txt`: class names in the order of the outputs"] if named else []
    lines += [
        "- `preprocessing.json`: what happens to an image before the model",
        f"- `{MANIFEST}`: SHA-256 of each file",
    ]
    build = f"visionkd export . --format tensorrt      # writes {engine}; --precision fp16 for the parts outside INT8"
    if found.has_proposals or not kinds & {"int8-tensorrt", "float"}:
        build = "# no file for TensorRT is in this bundle: it runs in ONNX Runtime (pip install onnxruntime)"
        engine = _NAMES["float" if found.has_proposals else "int8-cpu"]
    return "\n".join([
        f"# {found.metadata.get('architecture', 'model')}, {found.metadata['task']}, by visionkd",
        "",
        *lines,
        "",
        "On the Jetson, in this directory (TensorRT comes with JetPack; PyTorch is not needed; running an engine needs",
        "pycuda):",
        "",
        "```",
        "pip install visionkd pycuda",
        build,
        f"visionkd bench {engine}",
        f"visionkd predict {engine} photo.jpg",
        "```",
        "",
        "`visionkd eval`, `predict` and `bench` take this directory as MODEL as well, and compare the hashes first.",
        "Engines are not part of the bundle: they run only on the TensorRT and GPU that built them.",
        "",
    ])  # fmt: skip
