"""Small ONNX files as visionkd writes them, made by hand: a CNN and a transformer block, in float and with Q/DQ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from visionkd.types import InputSpec

SPEC = InputSpec(img_size=(32, 32), crop_pct=1.0)
CLASSES = ["red", "green", "blue", "grey"]
METADATA = {
    "visionkd_version": "0.1.0",
    "task": "classification",
    "classes": json.dumps(CLASSES),
    "input": json.dumps(SPEC.to_dict()),
    "architecture": "tiny",
    "complexity": json.dumps({"params_m": 0.5, "macs_g": 0.1, "size_mb": 2.0}),
}
Form = Literal["float", "int8", "cpu"]


class Graph:
    """Collects nodes and weights; ``form`` decides whether products get Q/DQ on both inputs."""

    def __init__(self, form: Form) -> None:
        self.form, self.nodes, self.weights = form, [], []
        self.random = np.random.default_rng(0)

    def weight(self, values: np.ndarray) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(values, name))
        return name

    def node(self, kind: str, *inputs: str, **attributes: object) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def activation(self, value: str) -> str:
        if self.form == "float":
            return value
        scale = self.weight(np.float32(0.03))
        zero = self.weight(np.uint8(128) if self.form == "cpu" else np.int8(0))
        return self.node("DequantizeLinear", self.node("QuantizeLinear", value, scale, zero), scale, zero)

    def kernel(self, *shape: int) -> str:
        values = self.random.normal(0.0, 1.0 / np.sqrt(np.prod(shape[1:])), shape).astype(np.float32)
        if self.form == "float":
            return self.weight(values)
        scale = np.abs(values.reshape(shape[0], -1)).max(1) / 127.0
        codes = np.rint(values / scale.reshape(-1, *[1] * (len(shape) - 1))).astype(np.int8)
        return self.node("DequantizeLinear", self.weight(codes), self.weight(scale.astype(np.float32)), axis=0)

    def conv(self, value: str, outputs: int, inputs: int, size: int, stride: int = 1) -> str:
        kernel = self.kernel(outputs, inputs, size, size)
        bias = self.weight(np.zeros(outputs, np.float32))
        return self.node("Conv", self.activation(value), kernel, bias, strides=[stride] * 2, pads=[(size - 1) // 2] * 4)

    def linear(self, value: str, outputs: int, inputs: int) -> str:
        turned = self.node("Transpose", self.kernel(outputs, inputs), perm=[1, 0])
        return self.node("MatMul", self.activation(value), turned)

    def save(
        self, path: Path, output: str, *, metadata: dict[str, str] | None = None, opset: int = 20,
        shape: tuple[object, ...] = ("batch", 3, 32, 32),
    ) -> Path:  # fmt: skip
        self.nodes.append(helper.make_node("Identity", [output], ["logits"]))
        image = helper.make_tensor_value_info("image", TensorProto.FLOAT, list(shape))
        logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [shape[0], len(CLASSES)])
        graph = helper.make_graph(self.nodes, "g", [image], [logits], initializer=self.weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
        model.ir_version = 10
        helper.set_model_props(model, METADATA if metadata is None else metadata)
        onnx.save(onnx.shape_inference.infer_shapes(model), path)
        return path


def cnn(path: Path, form: Form = "float", *, width: int = 8, **saving: object) -> Path:
    """Two convolutions, a residual add, pooling and a classifier."""
    graph = Graph(form)
    first = graph.node("Relu", graph.conv("image", width, 3, 3, stride=2))
    long = graph.conv(first, width, width, 3)
    added = graph.node("Relu", graph.node("Add", long, graph.activation(first)))
    pooled = graph.node("Flatten", graph.node("GlobalAveragePool", added))
    return graph.save(path, graph.linear(pooled, len(CLASSES), width), **saving)  # type: ignore[arg-type]


def vit(path: Path, form: Form = "float", *, width: int = 8, **saving: object) -> Path:
    """Patches, a self-attention of one head, an MLP with GELU, and a classifier."""
    graph = Graph(form)
    ones, zeros = graph.weight(np.ones(width, np.float32)), graph.weight(np.zeros(width, np.float32))
    kernel = graph.kernel(width, 3, 8, 8)
    patches = graph.node("Conv", graph.activation("image"), kernel, strides=[8, 8])
    shape = graph.weight(np.array([0, width, 16], np.int64))
    tokens = graph.node("Transpose", graph.node("Reshape", patches, shape), perm=[0, 2, 1])
    normed = graph.node("LayerNormalization", tokens, ones, zeros, axis=-1)
    query, key, value = (graph.linear(normed, width, width) for _ in range(3))
    scores = graph.node("MatMul", query, graph.node("Transpose", key, perm=[0, 2, 1]))
    attention = graph.node("MatMul", graph.node("Softmax", scores, axis=-1), value)
    tokens = graph.node("Add", tokens, graph.linear(attention, width, width))
    hidden = graph.node("Gelu", graph.linear(graph.node("LayerNormalization", tokens, ones, zeros), 4 * width, width))
    tokens = graph.node("Add", tokens, graph.linear(hidden, width, 4 * width))
    pooled = graph.node("ReduceMean", tokens, graph.weight(np.array([1], np.int64)), keepdims=0)
    return graph.save(path, graph.linear(pooled, len(CLASSES), width), **saving)  # type: ignore[arg-type]
