"""The file of a TensorRT engine: a header that says what it is and where it runs, then the engine as TensorRT wrote it.

Layout: 8 bytes ``VKDENGIN``, format number and header length as little-endian 32-bit numbers, the header as JSON in
UTF-8, the engine. One file rather than two, so that no engine travels without the names of its classes.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from visionkd.errors import DataError, RequestError
from visionkd.files import replacing

ENGINE_SUFFIX = ".engine"
_MAGIC = b"VKDENGIN"
_FORMAT = 1
_PREFIX = struct.Struct("<8sII")
_MAX_HEADER_BYTES = 64 * 1024**2

Library = Literal["tensorrt", "tensorrt_rtx"]


@dataclass(frozen=True)
class EngineInfo:
    """What stands in front of an engine.

    Attributes:
        library: Package that built it and can run it: ``tensorrt`` or ``tensorrt_rtx``.
        library_version: Its version; an engine runs in exactly that one.
        platform: System and processor, such as ``linux-aarch64``.
        device: Name of the GPU; None where it was built without one.
        compute_capabilities: Of the GPUs that it was built for, such as ``8.7``.
        onnx_sha256: Of the ONNX file that it was built from.
        onnx_file: Name of that file.
        precision: ``fp32`` or ``fp16``: what computes outside the INT8 islands.
        quantized: Whether the ONNX file has Q/DQ nodes.
        typing: ``strong``, or ``weak`` where this TensorRT took the graph only so.
        batch: Smallest, best and largest batch.
        dla_core: Core of the deep learning accelerator; None for the GPU.
        metadata: The key-value pairs of the ONNX file: task, classes, input and the rest.
        layers: Layers in all, in INT8, and for reformatting, as the engine inspector tells; empty if it was not asked.
        engine_bytes: Size of the engine.
        engine_sha256: Of the engine.
        visionkd_version: Version that built it.
    """

    library: Library
    library_version: str
    platform: str
    device: str | None
    compute_capabilities: tuple[str, ...]
    onnx_sha256: str
    onnx_file: str
    precision: str
    quantized: bool
    typing: str
    batch: tuple[int, int, int]
    metadata: Mapping[str, str]
    dla_core: int | None = None
    layers: Mapping[str, int] = field(default_factory=dict)
    engine_bytes: int = 0
    engine_sha256: str = ""
    visionkd_version: str = ""


def write_engine(path: str | os.PathLike[str], info: EngineInfo, engine: bytes | memoryview) -> EngineInfo:
    """Write an engine with its header, complete or not at all, and return the header with the engine's hash."""
    view = memoryview(engine).cast("B")
    values = asdict(info) | {"engine_bytes": len(view), "engine_sha256": hashlib.sha256(view).hexdigest()}
    header = json.dumps(values, ensure_ascii=False).encode()
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(_PREFIX.pack(_MAGIC, _FORMAT, len(header)))
        file.write(header)
        file.write(view)
    return _info(values)


def engine_name(onnx_name: str) -> str:
    """Return what the engine of an ONNX file is called: ``model.int8.engine`` for ``model.int8.tensorrt.onnx``."""
    return onnx_name.removesuffix(".onnx").removesuffix(".tensorrt") + ENGINE_SUFFIX


def read_engine_info(path: str | os.PathLike[str]) -> EngineInfo:
    """Read the header of an engine file.

    Raises:
        RequestError: If there is no such file, or it is another program's engine.
        DataError: If it is damaged.
    """
    return _read_header(Path(path))[0]


def read_engine(path: str | os.PathLike[str]) -> tuple[EngineInfo, bytes]:
    """Read an engine file whole and compare its hash; the errors are those of :func:`read_engine_info`."""
    path = Path(path)
    info, start = _read_header(path)
    with open(path, "rb") as file:
        file.seek(start)
        engine = file.read()
    if len(engine) != info.engine_bytes:
        raise _damaged(path, f"it holds {len(engine)} of {info.engine_bytes} bytes of its engine")
    if hashlib.sha256(engine).hexdigest() != info.engine_sha256:
        raise _damaged(path, "its hash is not the one it was written with")
    return info, engine


def _read_header(path: Path) -> tuple[EngineInfo, int]:
    if not path.is_file():
        raise RequestError(
            f"there is no file '{path}'", hint="Build it on this device: visionkd export MODEL.onnx --format tensorrt"
        )
    with open(path, "rb") as file:
        prefix = file.read(_PREFIX.size)
        if not prefix.startswith(_MAGIC):
            raise RequestError(
                f"'{path}' is not an engine that visionkd built: it does not say which TensorRT and device it is for, "
                "nor its classes and input",
                hint="Build it from the ONNX file: visionkd export MODEL.onnx --format tensorrt",
            )
        if len(prefix) < _PREFIX.size:
            raise _damaged(path, "it ends within its header")
        _, number, size = _PREFIX.unpack(prefix)
        if number > _FORMAT:
            raise RequestError(
                f"'{path}' has format {number}, and this version reads {_FORMAT}", hint="Update visionkd, or rebuild."
            )
        if size > _MAX_HEADER_BYTES:
            raise _damaged(path, "its header is impossibly long")
        header = file.read(size)
    if len(header) < size:
        raise _damaged(path, "it ends within its header")
    try:
        return _info(json.loads(header.decode())), _PREFIX.size + size
    except (ValueError, TypeError, KeyError) as error:
        raise _damaged(path, f"its header cannot be read ({error})") from error


def _info(values: Mapping[str, Any]) -> EngineInfo:
    known = {item.name: values[item.name] for item in fields(EngineInfo) if item.name in values}
    for name in ("compute_capabilities", "batch"):
        known[name] = tuple(known[name])
    return EngineInfo(**known)


def _damaged(path: Path, reason: str) -> DataError:
    return DataError(f"the engine file '{path}' is damaged: {reason}", hint="Copy it again, or build it anew.")
