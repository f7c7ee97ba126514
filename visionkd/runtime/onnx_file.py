"""What an ONNX file says about itself, read without the onnx package: a device that only builds engines lacks it.

Only the few fields of the protobuf message that are needed are looked at; the weights are stepped over.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from visionkd.errors import DataError, RequestError

_UINT8 = 2  # TensorProto.DataType
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class OnnxFile:
    """The outside of an ONNX model.

    Attributes:
        metadata: Its key-value pairs.
        opset: Version of the standard operator set; 0 where it names none.
        inputs: Name and shape of each input that is no weight; a free side is its name, or None.
        operators: Operator types that occur, with their number.
        weight_types: Numbers of the types (``TensorProto.DataType``) that weights have.
        has_external_data: Whether weights lie in other files, which the file names by any path.
    """

    metadata: dict[str, str]
    opset: int
    inputs: dict[str, tuple[int | str | None, ...]]
    operators: dict[str, int]
    weight_types: frozenset[int]
    has_external_data: bool = False

    @property
    def is_quantized(self) -> bool:
        """Whether Q/DQ nodes stand in the graph."""
        return "DequantizeLinear" in self.operators

    @property
    def has_proposals(self) -> bool:
        """Whether boxes are chosen inside of it, as a detector of two stages does with its proposals."""
        return "NonMaxSuppression" in self.operators

    @property
    def int8_target(self) -> Literal["cpu", "tensorrt"] | None:
        """What its INT8 is written for: ``cpu`` has uint8 activations, which TensorRT refuses; None for float."""
        if not self.is_quantized:
            return None
        return "cpu" if _UINT8 in self.weight_types else "tensorrt"


def read_onnx_file(path: str | os.PathLike[str]) -> OnnxFile:
    """Read the outside of an ONNX file.

    Raises:
        RequestError: If there is no such file.
        DataError: If it is no ONNX file, or is cut short.
    """
    path = Path(path)
    if not path.is_file():
        raise RequestError(f"there is no file '{path}'", hint="Export a model first: visionkd export MODEL")
    try:
        found = _model(memoryview(path.read_bytes()))
    except (ValueError, IndexError) as error:
        raise DataError(f"'{path}' is not a whole ONNX file: {error}", hint="Export or copy it again.") from error
    if not found.inputs:
        raise DataError(f"'{path}' is not an ONNX file: it holds no graph with inputs", hint="Export it again.")
    return found


def _model(data: memoryview) -> OnnxFile:
    metadata: dict[str, str] = {}
    opset, graph = 0, memoryview(b"")
    for number, value in _fields(data):
        if number == 7:
            graph = _message(value)
        elif number == 8:
            parts = dict(_fields(_message(value)))
            if _text(parts.get(1, memoryview(b""))) in ("", "ai.onnx"):
                opset = int(parts.get(2, 0))  # type: ignore[arg-type]
        elif number == 14:
            parts = dict(_fields(_message(value)))
            metadata[_text(parts.get(1, memoryview(b"")))] = _text(parts.get(2, memoryview(b"")))
    inputs: dict[str, tuple[int | str | None, ...]] = {}
    weights: set[str] = set()
    operators: dict[str, int] = {}
    types: set[int] = set()
    for number, value in _fields(graph):
        if number == 1:
            kind = next((_text(v) for n, v in _fields(_message(value)) if n == 4), "")
            operators[kind] = operators.get(kind, 0) + 1
        elif number == 5:
            parts = dict(_fields(_message(value)))
            weights.add(_text(parts.get(8, memoryview(b""))))
            types.add(int(parts.get(2, 0)))  # type: ignore[arg-type]
        elif number == 11:
            name, shape = _value_info(_message(value))
            inputs[name] = shape
    inputs = {name: shape for name, shape in inputs.items() if name not in weights}
    external = _is_external(graph, _GRAPH) or any(_is_external(each, _FUNCTION) for each in _each(data, 25))
    return OnnxFile(metadata, opset, inputs, operators, frozenset(types), external)


#: Where tensors hide: by kind of message, the numbers of its fields that hold further ones, and their kind.
_TENSOR, _SPARSE = "tensor", {1: "tensor", 2: "tensor"}
_FUNCTION: dict[int, object] = {}
_NODE: dict[int, object] = {}
_ATTRIBUTE: dict[int, object] = {5: _TENSOR, 10: _TENSOR, 22: _SPARSE, 23: _SPARSE}
_GRAPH: dict[int, object] = {1: _NODE, 5: _TENSOR, 15: _SPARSE}
_FUNCTION[7], _NODE[5] = _NODE, _ATTRIBUTE
_ATTRIBUTE[6] = _ATTRIBUTE[11] = _GRAPH


def _is_external(data: memoryview, kind: object, depth: int = 0) -> bool:
    """Tell whether a message of this kind holds a tensor whose values lie in another file."""
    if depth > 64:
        raise ValueError("it is nested too deeply")
    if not isinstance(kind, dict):
        return any(number == 13 or (number == 14 and value == 1) for number, value in _fields(data))
    return any(
        number in kind and _is_external(_message(value), kind[number], depth + 1) for number, value in _fields(data)
    )


def _value_info(data: memoryview) -> tuple[str, tuple[int | str | None, ...]]:
    name, shape = "", []
    for number, value in _fields(data):
        if number == 1:
            name = _text(value)
        elif number == 2:  # TypeProto -> tensor_type -> shape -> dim
            for tensor in _each(_message(value), 1):
                for found in _each(tensor, 2):
                    shape = [_side(dim) for dim in _each(found, 1)]
    return name, tuple(shape)


def _side(data: memoryview) -> int | str | None:
    for number, value in _fields(data):
        if number == 1:
            return int(value)  # type: ignore[arg-type]
        if number == 2:
            return _text(value)
    return None


def _each(data: memoryview, wanted: int) -> Iterator[memoryview]:
    for number, value in _fields(data):
        if number == wanted:
            yield _message(value)


def _message(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number stands where a message is expected")
    return value


def _text(value: int | memoryview) -> str:
    return bytes(_message(value)).decode()


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield number and content of each field of a protobuf message."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        if kind == _BYTES:
            size, at = _varint(data, at)
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"unknown wire type {kind}")
        if number == 0 or at + size > len(data):
            raise ValueError("it ends too early")
        yield number, data[at : at + size]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number is too long")
