"""FP16 written into the graph, against ONNX Runtime on the float graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import METADATA, cnn, vit

from visionkd.errors import RequestError, WorkError
from visionkd.export.half import to_half

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16


def answers(model: bytes, *batch: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model)
    return session.run(None, {value.name: given for value, given in zip(session.get_inputs(), batch, strict=True)})[0]


def model_of(nodes: list, weights: dict[str, np.ndarray], opset: int = 20) -> bytes:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", FLOAT, ["n", 3, 4, 4])],
        [helper.make_tensor_value_info("y", FLOAT, None)],
        initializer=[numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = 10
    return onnx.shape_inference.infer_shapes(model).SerializeToString()


X = np.random.default_rng(0).random((5, 3, 4, 4), dtype=np.float32)


@pytest.mark.parametrize("form", ["float", "int8"])
@pytest.mark.parametrize(("make", "opset"), [(cnn, 18), (cnn, 20), (vit, 20)])
def test_the_graph_answers_as_before(tmp_path: Path, make, form: str, opset: int) -> None:
    file = make(tmp_path / "m.onnx", form, opset=opset)
    half = to_half(file.read_bytes())
    batch = np.random.default_rng(1).random((3, 3, 32, 32), dtype=np.float32)
    expected, given = answers(file.read_bytes(), batch), answers(half, batch)
    assert given.dtype == np.float32
    # an activation near a boundary may round the other way, which is one step of 0.03
    np.testing.assert_allclose(given, expected, atol=2e-2 if form == "int8" else 3e-3)
    parsed = onnx.load_from_string(half)
    onnx.checker.check_model(parsed, full_check=True)
    assert {entry.key: entry.value for entry in parsed.metadata_props} == METADATA
    types = {weight.data_type for weight in parsed.graph.initializer}
    assert HALF in types and FLOAT not in types and (TensorProto.INT8 in types) is (form == "int8")
    assert [value.type.tensor_type.elem_type for value in (*parsed.graph.input, *parsed.graph.output)] == [FLOAT] * 2
    assert [value.name for value in parsed.graph.output] == ["logits"]
    inner = {value.type.tensor_type.elem_type for value in parsed.graph.value_info}
    assert FLOAT not in inner or form == "float" and not inner - {HALF, FLOAT, TensorProto.INT64}


def test_scales_too_small_for_half_are_raised_with_their_weights() -> None:
    scale = np.array([1e-6, 2e-3], np.float32)
    codes = np.array([[[[127]]], [[[100]]]], np.int8).repeat(3, 1)
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["wd"], axis=0),
        helper.make_node("Conv", ["x", "wd"], ["y"]),
    ]
    model = model_of(nodes, {"w": codes, "s": scale})
    half = to_half(model)
    np.testing.assert_allclose(answers(half, X), answers(model, X), rtol=2e-3, atol=2e-4)
    kept = {weight.name: numpy_helper.to_array(weight) for weight in onnx.load_from_string(half).graph.initializer}
    assert kept["s"].dtype == np.float16 and kept["s"].min() >= np.finfo(np.float16).tiny
    assert kept["w"][0].max() == 2 and (kept["w"][1] == 100).all(), "127e-6 is two steps of 6.1e-5"


def test_constants_casts_and_float_inputs_of_resize() -> None:
    nodes = [
        helper.make_node("Constant", [], ["big"], value=numpy_helper.from_array(np.float32(1e6))),
        helper.make_node("Constant", [], ["c"], value_float=0.5),
        helper.make_node("Cast", ["x"], ["i"], to=TensorProto.INT32),
        helper.make_node("Cast", ["i"], ["f"], to=FLOAT),
        helper.make_node("Add", ["f", "c"], ["a"]),
        helper.make_node("Min", ["a", "big"], ["m"]),
        helper.make_node("Resize", ["m", "", "r"], ["y"], mode="nearest"),
    ]
    model = model_of(nodes, {"r": np.array([1, 1, 2, 2], np.float32)})
    half = to_half(model)
    np.testing.assert_array_equal(answers(half, 9 * X), answers(model, 9 * X))
    (weight,) = onnx.load_from_string(half).graph.initializer
    assert weight.data_type == FLOAT


def test_what_is_not_converted() -> None:
    with pytest.raises(RequestError, match="operator set 18 or later, and this one has 17"):
        to_half(model_of([helper.make_node("Relu", ["x"], ["y"])], {}, opset=17))
    branch = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["z"])], "b", [], [helper.make_tensor_value_info("z", FLOAT, None)]
    )
    node = helper.make_node("If", ["yes"], ["y"], then_branch=branch, else_branch=branch)
    with pytest.raises(WorkError, match="'If' in the ONNX graph has a graph inside"):
        to_half(model_of([node], {"yes": np.array(True)}))
    rounding = helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"])
    scale = helper.make_node("ReduceMax", ["x"], ["s"], keepdims=0)
    back = helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"])
    with pytest.raises(WorkError, match="scale in the ONNX graph is not constant"):
        to_half(model_of([scale, rounding, back], {"z": np.int8(0)}))
