"""One quantised graph, two targets: Q/DQ nodes as TensorRT fuses them, and as ONNX Runtime does on a processor.

``tensorrt`` takes the graph as PyTorch's fake quantisation has it: signed, symmetric, biases in float, nothing between
a convolution and its activation or add. ``cpu`` says the same in the words that ONNX Runtime has fast kernels for:

* activations are uint8 with zero point 128, biases int32 in units of the products;
* the rounding of an activation moves in front of it, ``Q(clip(x)) = clip(Q(x))``, where clipping bytes is cheap;
* a linear layer's weight is stored transposed rather than turned at each call;
* the image is normalised in one pass, and gets a fourth channel of zeros: three bytes are slow to gather.

All of this computes the same numbers. Two things do not. A bias is rounded to whole units of the products it is
added to, half a unit at most. And ONNX Runtime has no integer convolution with a float result, so a convolution that
runs into an add or a mean needs a scale for its result; ``float_results`` names these and ``ranges.py`` measures them.
Without one such a convolution stays in float.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import numpy as np
import onnx_ir as ir

from visionkd.errors import WorkError

Target = Literal["tensorrt", "cpu"]
TARGETS: tuple[Target, ...] = ("cpu", "tensorrt")
#: The first operator set with a scale per channel.
MIN_OPSET = 13
ZERO_POINT = 128
_PRODUCTS = ("Conv", "Gemm", "MatMul", "ConvTranspose")
_CLIPS = ("Relu", "Clip")
_MONOTONE = (*_CLIPS, "MaxPool")  # rounding before them and after them is the same
_INT32_MAX = 2**31 - 1


def to_target(model: ir.Model, target: Target, ranges: Mapping[str, float] | None = None) -> ir.Model:
    """Rewrite a signed Q/DQ graph for ``target``, in place.

    Args:
        model: From ``export_onnx`` of a quantised network.
        target: ``tensorrt`` leaves it as it is, after a look at it.
        ranges: Largest magnitudes of the tensors that ``float_results`` names, for ``cpu``.

    Raises:
        WorkError: If this is no such graph.
    """
    check_signed(model)
    if target == "cpu":
        round_biases(model.graph)
        _normalize_once(model.graph)
        _transpose_weights(model.graph)
        _round_results(model.graph, ranges or {})
        _round_before_clipping(model.graph)
        _pad_image(model.graph)
        _shift(model.graph)
        _integer_biases(model.graph)
    own_zero_points(model.graph)
    _remove_unused(model.graph)
    return model


def check_signed(model: ir.Model) -> None:
    """Refuse a graph that TensorRT would not take as INT8.

    Raises:
        WorkError: If its operator set is too old, there are no quantised products, or scales and zero points are not
            constant, positive and zero.
    """
    opset = model.opset_imports.get("", 0)
    if opset < MIN_OPSET:
        raise WorkError(
            f"the file uses opset {opset}, and INT8 with a scale per channel needs {MIN_OPSET}",
            hint="Export again, without --opset.",
        )
    rounding = [node for node in model.graph if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    if not any(quantized(node) for node in model.graph):
        raise WorkError("the graph has no quantised layer", hint="Quantise the model first: visionkd quantize MODEL")
    for node in rounding:
        scale, zero = (_constant(value) for value in node.inputs[1:3])
        if scale is None or zero is None:
            raise WorkError(f"the scale of '{node.name}' is not a constant of the file")
        if not (np.isfinite(scale).all() and (scale > 0).all()):
            raise WorkError(
                f"the scale of '{node.inputs[1].name}' is zero or not finite",
                hint="Calibrate again with images like those that the network was trained on.",
            )
        if zero.dtype != np.int8 or zero.any():
            raise WorkError(f"the zero point of '{node.inputs[1].name}' is not an int8 zero")


def quantized(node: ir.Node) -> bool:
    """Whether ``node`` is a product both of whose inputs are dequantised."""
    return node.op_type in _PRODUCTS and all(_dequantizer(value) is not None for value in node.inputs[:2])


def float_results(model: ir.Model) -> list[str]:
    """Return the results of quantised convolutions, before any activation, that are used in float."""
    return [
        node.outputs[0].name
        for node in model.graph
        if node.op_type == "Conv" and quantized(node) and _rounding(node) is None
    ]


def count_operators(model: ir.Model) -> dict[str, int]:
    """Return how often each operator occurs."""
    found: dict[str, int] = {}
    for node in model.graph:
        found[node.op_type] = found.get(node.op_type, 0) + 1
    return found


# Steps of ``cpu`` -----------------------------------------------------------------------------------------------------


def _normalize_once(graph: ir.Graph) -> None:
    """Turn the image's ``Mul -> Add`` into one batch norm with mean 0 and variance 1, which passes over it once."""
    multiply = _only_user(graph.inputs[0])
    add = None if multiply is None or multiply.op_type != "Mul" else _only_user(multiply.outputs[0])
    if add is None or add.op_type != "Add":
        return
    constants = [next((c for v in n.inputs if (c := _constant(v)) is not None), None) for n in (multiply, add)]
    if any(constant is None or constant.size != 3 for constant in constants):
        return
    values = [*(constant.reshape(-1) for constant in constants), np.zeros(3, np.float32), np.ones(3, np.float32)]
    inputs = [_add(graph, f"normalize_{number}", value) for number, value in enumerate(values)]
    norm = ir.node("BatchNormalization", [graph.inputs[0], *inputs], {"epsilon": 0.0}, name="normalize")
    norm.outputs[0].name, norm.outputs[0].type = "normalized_image", add.outputs[0].type
    norm.outputs[0].shape = add.outputs[0].shape
    graph.insert_before(multiply, norm)
    add.outputs[0].replace_all_uses_with(norm.outputs[0])
    graph.remove([add, multiply], safe=True)


def _transpose_weights(graph: ir.Graph) -> None:
    """Turn ``DequantizeLinear -> Transpose -> MatMul`` around: bytes are transposed once, here."""
    for node in list(graph):
        dequantizer = _dequantizer(node.inputs[0]) if node.op_type == "Transpose" else None
        weight = None if dequantizer is None else _constant(dequantizer.inputs[0])
        if weight is None or weight.ndim != 2:
            continue
        axis = dequantizer.attributes["axis"].as_int() if "axis" in dequantizer.attributes else 1
        turned = _add(graph, f"{dequantizer.inputs[0].name}.T", np.ascontiguousarray(weight.T))
        new = _dequantize(graph, node, turned, dequantizer.inputs[1], dequantizer.inputs[2], axis=1 - axis % 2)
        node.outputs[0].replace_all_uses_with(new)
        graph.remove(node, safe=True)
        if not dequantizer.outputs[0].uses():
            graph.remove(dequantizer, safe=True)


def _round_results(graph: ir.Graph, ranges: Mapping[str, float]) -> None:
    """Round the float results of convolutions, so that these run in integers."""
    zero = None
    for node in list(graph):
        amax = ranges.get(node.outputs[0].name)
        if amax is None or not quantized(node):
            continue
        if zero is None:
            zero = _add(graph, "result_zero_point", np.array(0, np.int8))
        result = node.outputs[0]
        while (after := _only_user(result)) is not None and after.op_type in _MONOTONE:
            result = after.outputs[0]
        scale = _add(graph, f"{node.outputs[0].name}_scale", np.array(amax / 127.0, np.float32))
        uses = list(result.uses())
        last = result.producer()
        rounded = ir.node("QuantizeLinear", [result, scale, zero], name=f"{result.name}_quantize")
        rounded.outputs[0].name = f"{result.name}_rounded"
        graph.insert_after(last, rounded)
        back = ir.node("DequantizeLinear", [rounded.outputs[0], scale, zero], name=f"{result.name}_dequantize")
        back.outputs[0].name = f"{result.name}_dequantized"
        graph.insert_after(rounded, back)
        for user, index in uses:
            user.replace_input_with(index, back.outputs[0])


def _round_before_clipping(graph: ir.Graph) -> None:
    """Move the rounding behind Relu, Clip and MaxPool in front of them: they work on integers, which is the same."""
    for node in reversed(list(graph)):
        rounding = _only_user(node.outputs[0]) if node.op_type in _MONOTONE and len(node.outputs) == 1 else None
        if rounding is None or rounding.op_type != "QuantizeLinear":
            continue
        if node.op_type == "MaxPool":
            _pool_integers(graph, node, rounding)
            continue
        bounds = _bounds(node)
        if bounds is None:
            continue
        scale = _constant(rounding.inputs[1])
        low, high = (
            np.clip(np.rint(np.float32(bound) / scale), -128, 127).astype(np.int8) if np.isfinite(bound) else limit
            for bound, limit in zip(bounds, (np.array(-128, np.int8), np.array(127, np.int8)), strict=True)
        )
        rounded = rounding.outputs[0]
        rounding.replace_input_with(0, node.inputs[0])
        inputs = [None, *(_add(graph, f"int8_{int(bound)}", np.array(bound, np.int8)) for bound in (low, high))]
        clip = ir.node("Clip", inputs, name=f"{rounding.name}_clip")
        clip.outputs[0].name = f"{rounded.name}_clipped"
        rounded.replace_all_uses_with(clip.outputs[0])
        clip.replace_input_with(0, rounded)
        graph.insert_after(rounding, clip)
        graph.remove(node, safe=True)


def _pool_integers(graph: ir.Graph, pool: ir.Node, rounding: ir.Node) -> None:
    rounded, pooled = rounding.outputs[0], pool.outputs[0]
    rounded.replace_all_uses_with(pooled)
    rounding.replace_input_with(0, pool.inputs[0])
    pooled.type, rounded.shape = ir.TensorType(ir.DataType.INT8), pool.inputs[0].shape
    pool.replace_input_with(0, rounded)
    graph.remove(rounding)
    graph.insert_before(pool, rounding)


def _pad_image(graph: ir.Graph) -> None:
    """Give the image, and the weight of the convolution that takes it, a fourth channel of zeros."""
    for node in list(graph):
        if node.op_type != "Conv" or not quantized(node):
            continue
        image, weight = (value.producer() for value in node.inputs[:2])
        integers = _constant(weight.inputs[0]) if weight.op_type == "DequantizeLinear" else None
        if integers is None or integers.shape[1] != 3 or len(image.outputs[0].uses()) > 1:
            continue
        if "group" in node.attributes and node.attributes["group"].as_int() != 1:
            continue
        edges = [(0, 0), (0, 1), *((0, 0) for _ in integers.shape[2:])]
        weight.replace_input_with(0, _add(graph, f"{weight.inputs[0].name}.padded", np.pad(integers, edges)))
        pads = _add(graph, "one_more_channel", np.array([0, 0, 0, 0, 0, 1, 0, 0], np.int64))
        pad = ir.node("Pad", [image.inputs[0], pads, _add(graph, "int8_0", np.array(0, np.int8))], name="pad_image")
        pad.outputs[0].name, pad.outputs[0].type = "padded_image", ir.TensorType(ir.DataType.INT8)
        graph.insert_before(image, pad)
        image.replace_input_with(0, pad.outputs[0])
        image.outputs[0].shape = weight.outputs[0].shape = None
        return


def _shift(graph: ir.Graph) -> None:
    """Store activations as uint8 with zero point 128."""
    zero = _add(graph, "zero_point_128", np.array(ZERO_POINT, np.uint8))
    for node in list(graph):
        if node.op_type == "QuantizeLinear" and _constant(node.inputs[0]) is None:
            node.replace_input_with(2, zero)
            _shift_users(graph, node.outputs[0], zero)


def _shift_users(graph: ir.Graph, value: ir.Value, zero: ir.Value) -> None:
    value.type = ir.TensorType(ir.DataType.UINT8)  # not its dtype: copies of a graph share the type object
    for user, _ in value.uses():
        if user.op_type == "DequantizeLinear":
            user.replace_input_with(2, zero)
        else:  # what works on integers since the steps before
            for index in {"Clip": (1, 2), "Pad": (2,)}.get(user.op_type, ()):
                bound = int(_constant(user.inputs[index])) + ZERO_POINT
                user.replace_input_with(index, _add(graph, f"uint8_{bound}", np.array(bound, np.uint8)))
            _shift_users(graph, user.outputs[0], zero)


def round_biases(graph: ir.Graph) -> None:
    """Round biases to whole units of the products, as integer kernels add them: by half a unit at most."""
    for node, bias, steps, unit in _biases(graph):
        rounded = (steps.astype(np.float32) * unit).astype(np.float32)
        node.replace_input_with(2, _add(graph, f"{bias.name}.rounded.{node.name}", rounded))


def _integer_biases(graph: ir.Graph) -> None:
    """Store biases as int32 in units of the products, as integer kernels add them."""
    for node, bias, steps, unit in _biases(graph):
        stored = _add(graph, f"{bias.name}.int32", steps)
        scale = _add(graph, f"{bias.name}.scale", unit)
        zero = _add(graph, f"int32_zeros_{len(unit)}", np.zeros(len(unit), np.int32))
        node.replace_input_with(2, _dequantize(graph, node, stored, scale, zero, axis=0))


def _biases(graph: ir.Graph) -> Iterator[tuple[ir.Node, ir.Value, np.ndarray, np.ndarray]]:
    """Yield quantised products with their bias, it in units of the products as int32, and these units."""
    for node in list(graph):
        bias = node.inputs[2] if node.op_type in _PRODUCTS and len(node.inputs) > 2 else None
        values = None if bias is None else _constant(bias)
        if values is None or not quantized(node):
            continue
        scales = [_constant(_dequantizer(value).inputs[1]) for value in node.inputs[:2]]
        unit = np.ascontiguousarray(np.broadcast_to(scales[0] * scales[1], values.shape), np.float32)
        steps = np.rint(values.astype(np.float64) / unit)
        # beyond int32 where a channel has next to no weight: such a bias stays in float, and so does the layer
        if np.isfinite(steps).all() and np.abs(steps).max(initial=0) <= _INT32_MAX:
            yield node, bias, steps.astype(np.int32), unit


def own_zero_points(graph: ir.Graph) -> None:
    """Give each weight a zero point of its own: ONNX Runtime cannot turn weights that share one into uint8, which it
    has to do on x86 processors without VNNI, whose kernels overflow on int8 weights."""
    for node in list(graph):
        stored = node.inputs[0] if node.op_type == "DequantizeLinear" else None
        integers = _constant(stored)
        if integers is not None and integers.dtype == np.int8:
            zero = _constant(node.inputs[2])
            node.replace_input_with(2, _add(graph, f"{stored.name}.zero_point", zero))


# Graphs ---------------------------------------------------------------------------------------------------------------


def _constant(value: ir.Value | None) -> np.ndarray | None:
    if value is None:
        return None
    constant = ir.convenience.get_const_tensor(value)
    return None if constant is None else constant.numpy()


def _dequantizer(value: ir.Value | None) -> ir.Node | None:
    """Return the node that ``value`` was dequantised by, through a transposition."""
    node = None if value is None else value.producer()
    if node is not None and node.op_type == "Transpose":
        node = node.inputs[0].producer()
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def _only_user(value: ir.Value) -> ir.Node | None:
    uses = list(value.uses())
    return uses[0][0] if len(uses) == 1 and not value.is_graph_output() else None


def _rounding(node: ir.Node) -> ir.Node | None:
    """Return the only rounding that takes the result of ``node``, directly or clipped."""
    user = _only_user(node.outputs[0])
    while user is not None and user.op_type in _MONOTONE:
        user = _only_user(user.outputs[0])
    return user if user is not None and user.op_type == "QuantizeLinear" else None


def _bounds(node: ir.Node) -> tuple[float, float] | None:
    """Return what a Relu or Clip clips to; None where that is not known."""
    if node.op_type == "Relu":
        return 0.0, np.inf
    bounds = []
    for index, default in ((1, -np.inf), (2, np.inf)):
        value = node.inputs[index] if len(node.inputs) > index else None
        constant = _constant(value)
        if value is not None and constant is None:
            return None
        bounds.append(default if constant is None else float(constant))
    return bounds[0], bounds[1]


def _add(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """Return the constant ``name``, made if there is none yet."""
    if name not in graph.initializers:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=tensor.shape)
        graph.register_initializer(value)
    return graph.initializers[name]


def _dequantize(
    graph: ir.Graph, before: ir.Node, value: ir.Value, scale: ir.Value, zero: ir.Value, axis: int
) -> ir.Value:
    node = ir.node("DequantizeLinear", [value, scale, zero], {"axis": axis}, name=f"{value.name}_dequantize")
    node.outputs[0].name = f"{value.name}_dequantized"
    graph.insert_before(before, node)
    return node.outputs[0]


def _remove_unused(graph: ir.Graph) -> None:
    for value in list(graph.initializers.values()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[value.name]
