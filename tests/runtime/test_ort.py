"""Files as ONNX Runtime runs them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from visionkd.runtime.ort import OrtModel


def product(path, *, shared: bool = False, without: bool = False):
    """Write two products in a row of bytes with zero point 128 and int8 weights, all as large as they can be.

    ``shared`` gives both weights one zero point, ``without`` gives the first one none, and a scale per channel.
    """
    constants = {
        "scale": np.array(1.0, np.float32),
        "step": np.array(4096.0, np.float32),
        "activation_zero": np.array(128, np.uint8),
        "weight": np.full((64, 64), 127, np.int8),
        "other_weight": np.full((64, 4), 127, np.int8),
        "weight_zero": np.array(0, np.int8),
        "other_zero": np.array(0, np.int8),
    }
    zero = "weight_zero" if shared else "other_zero"
    nodes = [
        helper.make_node("QuantizeLinear", ["image", "scale", "activation_zero"], ["bytes"]),
        helper.make_node("DequantizeLinear", ["bytes", "scale", "activation_zero"], ["values"]),
        helper.make_node("DequantizeLinear", ["weight", "scale", "weight_zero"], ["weights"]),
        helper.make_node("MatMul", ["values", "weights"], ["sums"]),
        helper.make_node("QuantizeLinear", ["sums", "step", "activation_zero"], ["sum_bytes"]),
        helper.make_node("DequantizeLinear", ["sum_bytes", "step", "activation_zero"], ["sum_values"]),
        helper.make_node("DequantizeLinear", ["other_weight", "scale", zero], ["other_weights"]),
        helper.make_node("MatMul", ["sum_values", "other_weights"], ["total"]),
        helper.make_node("QuantizeLinear", ["total", "total_step", "activation_zero"], ["total_bytes"]),
        helper.make_node("DequantizeLinear", ["total_bytes", "total_step", "activation_zero"], ["logits"]),
    ]
    constants["total_step"] = np.array(2.0**26, np.float32)
    if without:
        constants["channel_scale"] = np.ones(64, np.float32)
        nodes[2] = helper.make_node("DequantizeLinear", ["weight", "channel_scale"], ["weights"], axis=1)
    graph = helper.make_graph(
        nodes,
        "products",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 64])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 4])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


@pytest.mark.parametrize("kind", ["own", "shared", "without"])
def test_the_largest_bytes_do_not_overflow(tmp_path, kind):
    product(tmp_path / "products.onnx", shared=kind == "shared", without=kind == "without")
    image = np.full((1, 64), 127.0, np.float32)
    model, plain = (OrtModel(tmp_path / "products.onnx", optimize=optimize) for optimize in (True, False))
    (expected,), (found,) = plain.run(image), model.run(image)
    assert expected.max() > 2.0**30
    if kind != "own":  # a file of others: it runs, on old processors with the overflow
        assert found.shape == expected.shape
    else:
        np.testing.assert_array_equal(found, expected)
