"""FP16 around the INT8 islands, written into the graph: strongly typed TensorRT takes precision from nowhere else."""

from __future__ import annotations

from typing import Any

import numpy as np

from visionkd.errors import RequestError, WorkError

_HALF = np.finfo(np.float16)
#: Inputs that stay float32 by the operator's definition.
_FLOAT_INPUTS = {"Resize": (1, 2), "Upsample": (1,)}
_LOWEST_OPSET, _NEEDED_OPSET = 18, 19


def to_half(model: bytes) -> bytes:
    """Return an ONNX model that computes in float16, with float32 inputs and outputs.

    Weights, constants, casts and the scales of Q/DQ become float16, since QuantizeLinear wants a scale of the type of
    its input. A scale below the smallest normal float16 is raised to it, and its INT8 weights are rounded anew: at that
    size one step is below what float16 itself resolves. Values beyond the range of float16 are cut to it.

    Args:
        model: A serialised ONNX model, of operator set 18 or later.

    Raises:
        RequestError: If onnx-ir is not installed, or the operator set is too old.
        WorkError: If the graph has control flow, or is in float16 already.
    """
    try:
        import onnx
        import onnx_ir as ir
    except ImportError as error:
        raise RequestError(
            "--precision fp16 rewrites the ONNX graph, which needs the packages onnx and onnx-ir",
            hint="Run: pip install onnx-ir onnx",
        ) from error
    parsed = ir.serde.deserialize_model(onnx.load_from_string(model))
    opset = parsed.opset_imports.get("", 0)
    if opset < _LOWEST_OPSET:
        raise RequestError(
            f"--precision fp16 needs an ONNX file of operator set {_LOWEST_OPSET} or later, and this one has {opset}",
            hint="Export it again without --opset.",
        )
    if opset < _NEEDED_OPSET:  # float16 scales are new in 19; nothing that 18 has means anything else there
        parsed.opset_imports[""] = _NEEDED_OPSET
    graph = parsed.graph
    _rescale_tiny(ir, graph)
    kept = _kept_in_float(graph)
    for value in list(graph.initializers.values()):
        if value.dtype == ir.DataType.FLOAT and value.name not in kept:
            value.const_value = ir.tensor(_halved(value.const_value.numpy()), name=value.name)
            value.type = ir.TensorType(ir.DataType.FLOAT16)
    for node in graph:
        if any(attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for attribute in _own(node)):
            raise WorkError(f"'{node.op_type}' in the ONNX graph has a graph inside, which is not converted to float16")
        _convert_attributes(ir, node, kept)
        for value in node.outputs:
            if value.dtype == ir.DataType.FLOAT and value.name not in kept:
                value.type = ir.TensorType(ir.DataType.FLOAT16)
    _cast_ends(ir, graph)
    return ir.serde.serialize_model(parsed).SerializeToString()


def _own(node: Any) -> list[Any]:
    return [attribute for attribute in node.attributes.values() if not attribute.is_ref()]


def _kept_in_float(graph: Any) -> set[str]:
    return {
        node.inputs[index].name
        for node in graph
        for index in _FLOAT_INPUTS.get(node.op_type, ())
        if index < len(node.inputs) and node.inputs[index] is not None
    }


def _halved(values: np.ndarray) -> np.ndarray:
    finite = np.isfinite(values)
    cut = np.clip(values, _HALF.min, _HALF.max)
    return np.where(finite, cut, values).astype(np.float16)


def _convert_attributes(ir: Any, node: Any, kept: set[str]) -> None:
    if any(value.name in kept for value in node.outputs):
        return
    for attribute in _own(node):
        if node.op_type == "Cast" and attribute.name == "to" and attribute.value == ir.DataType.FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT16))
        elif attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype == ir.DataType.FLOAT:
            tensor = ir.tensor(_halved(attribute.value.numpy()))
            node.attributes[attribute.name] = ir.AttrTensor(attribute.name, tensor)
        elif node.op_type == "Constant" and attribute.name in ("value_float", "value_floats"):
            tensor = ir.tensor(_halved(np.asarray(attribute.value, np.float32)))
            del node.attributes[attribute.name]
            node.attributes["value"] = ir.AttrTensor("value", tensor)


def _cast_ends(ir: Any, graph: Any) -> None:
    """Put casts behind float32 inputs and in front of float32 outputs."""
    for value in graph.inputs:
        if value.dtype != ir.DataType.FLOAT:
            continue
        users = list(value.uses())
        cast = ir.node("Cast", [value], attributes={"to": int(ir.DataType.FLOAT16)})
        cast.outputs[0].name, cast.outputs[0].shape = f"{value.name}_half", value.shape
        cast.outputs[0].type = ir.TensorType(ir.DataType.FLOAT16)
        graph.insert_before(graph[0], cast)
        for node, index in users:
            node.replace_input_with(index, cast.outputs[0])
    for index, value in enumerate(list(graph.outputs)):
        if value.dtype != ir.DataType.FLOAT16:
            continue
        cast = ir.node("Cast", [value], attributes={"to": int(ir.DataType.FLOAT)})
        cast.outputs[0].name, value.name = value.name, f"{value.name}_half"
        cast.outputs[0].shape, cast.outputs[0].type = value.shape, ir.TensorType(ir.DataType.FLOAT)
        graph.append(cast)
        graph.outputs[index] = cast.outputs[0]


def _rescale_tiny(ir: Any, graph: Any) -> None:
    """Raise scales that float16 would make inexact or zero, and round the INT8 weights behind them anew."""
    for node in graph:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        source, scale = node.inputs[0], node.inputs[1]
        if scale.const_value is None:
            raise WorkError("a scale in the ONNX graph is not constant", hint="Export it again with visionkd.")
        old = scale.const_value.numpy()
        if not (old < _HALF.tiny).any():
            continue
        new = np.maximum(old, _HALF.tiny).astype(np.float32)
        if source.const_value is not None and node.op_type == "DequantizeLinear":
            if len(list(source.uses())) > 1 or len(list(scale.uses())) > 1:
                raise WorkError("INT8 weights with tiny scales are shared in the ONNX graph, and cannot be rescaled")
            codes = source.const_value.numpy()
            axis = node.attributes["axis"].value % codes.ndim if "axis" in node.attributes else 1
            sides = [-1 if side == axis else 1 for side in range(codes.ndim)] if old.ndim else ()
            rounded = np.rint(codes * (old / new).reshape(sides)).astype(codes.dtype)
            source.const_value = ir.tensor(rounded, name=source.name)
        scale.const_value = ir.tensor(new, name=scale.name)
