"""Q/DQ graphs: equal to PyTorch, equal to each other to the bit, and in the form that each target wants."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from tests.quantization.conftest import calibrated, images, tiny
from visionkd.errors import DataError, WorkError
from visionkd.export import onnx as export_module
from visionkd.export import qdq
from visionkd.export.differences import rms_difference
from visionkd.export.int8_graph import signed_form
from visionkd.export.onnx import export_onnx
from visionkd.export.ranges import measure_ranges
from visionkd.export.verify import verify_int8
from visionkd.models.network import Network
from visionkd.quantization.insert import activation_quantizers, float_network
from visionkd.runtime.ort import PRECISE


def graph_of(network: Network) -> ir.Model:
    return export_module._export(signed_form(network), network.architecture, None).model


def run(
    model: ir.Model, image: np.ndarray, *, optimized_to: Path | None = None, precise: bool = True
) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    if optimized_to is None:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    else:
        options.optimized_model_filepath = str(optimized_to)
        options.add_session_config_entry(PRECISE, "1" if precise else "0")
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    return session.run(None, {"image": image})[0]


@pytest.fixture(scope="module")
def small() -> Network:
    return calibrated(tiny("cifar_resnet8")).eval()


@pytest.fixture(scope="module")
def small_graph(small: Network) -> ir.Model:
    return graph_of(small)


#: By family: size of the images; how many of eight are equal at least (a value on a tie may go the other way, which
#: later layers carry on); and the distances allowed to the signed graph and to the file for processors, as shares of
#: what quantisation itself has moved the logits. Measured, with about a quarter on top.
FAMILIES = {
    "test_resnet": (32, 6, 0.6, 1.5),  # a max pool, an average pool in the skip, clipping before and after them
    "test_convnext": (32, 7, 0.1, 1.5),
    "test_vit": (32, 7, 0.1, 1.15),
    "test_efficientnet": (32, 7, 0.1, 1.8),
    "resnet18": (64, 2, 0.35, 0.75),
    "mobilenetv2_035": (64, 6, 0.2, 1.1),
    "mobilenetv3_small_050": (64, 7, 0.1, 1.85),
    "tf_efficientnet_lite0": (64, 5, 0.25, 1.15),
    "deit_tiny_patch16_224": (64, 1, 0.8, 1.4),
    "torchvision/mobilenet_v3_small": (64, 6, 0.2, 1.2),
}
FAST = ("test_resnet", "test_convnext")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in FAMILIES])
def test_both_targets_compute_what_pytorch_computes(name: str, tmp_path: Path) -> None:
    img_size, least_equal, signed_share, cpu_share = FAMILIES[name]
    network = calibrated(tiny(name, img_size=img_size), calibration="mse").eval()
    batch = images(8, seed=3, img_size=img_size)
    with torch.no_grad():
        expected = network(batch).logits.numpy()
        own_error = rms_difference(expected, float_network(network).eval()(batch).logits.numpy())
    signed = graph_of(network)
    answer = run(signed, batch.numpy())
    equal = np.abs(answer - expected).max(1) < 1e-5 * np.abs(expected).max()
    assert equal.sum() >= least_equal and rms_difference(answer, expected) < signed_share * own_error

    rounded, shifted = signed.clone(), signed.clone()
    qdq.round_biases(rounded.graph)
    qdq.to_target(shifted, "cpu")
    assert np.array_equal(run(rounded, batch.numpy()), run(shifted, batch.numpy())), "the same numbers, to the bit"

    ranges = measure_ranges(signed, qdq.float_results(signed), [batch.numpy()])
    model = qdq.to_target(signed, "cpu", ranges)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    fast = run(model, batch.numpy(), optimized_to=tmp_path / "optimized.onnx")
    assert rms_difference(fast, expected) < cpu_share * own_error
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    products = sum(kinds[kind] for kind in ("QLinearConv", "QGemm", "MatMulIntegerToFloat"))
    assert products == sum(qdq.quantized(node) for node in shifted.graph), "every quantised layer runs in integers"


def test_the_signed_graph_is_what_tensorrt_takes(small: Network, small_graph: ir.Model) -> None:
    model = qdq.to_target(small_graph.clone(), "tensorrt")
    nodes = Counter(node.op_type for node in model.graph)
    assert nodes["Conv"] == 9 and nodes["Gemm"] == 1 and "BatchNormalization" not in nodes
    assert all(qdq.quantized(node) for node in model.graph if node.op_type in ("Conv", "Gemm"))
    assert nodes["QuantizeLinear"] == len(activation_quantizers(small)), "one for each tensor, none on a weight"
    for node in model.graph:
        constants = [value.const_value for value in node.inputs if value is not None]
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            scale, zero = (constant.numpy() for constant in constants[1:3])
            assert zero.dtype == np.int8 and not zero.any() and (scale > 0).all()
            assert node.inputs[0].name not in {name for name in model.graph.initializers if "bias" in name}
        if node.op_type == "DequantizeLinear" and constants[0] is not None:
            weight = constants[0].numpy()
            assert weight.dtype == np.int8 and weight.min() >= -127 and node.attributes["axis"].as_int() == 0
            assert constants[1].shape == (len(weight),), "a scale for each output channel"
        if node.op_type in ("Relu", "Add") and node.inputs[0].producer() is not None:
            before = node.inputs[0].producer().op_type
            assert before != "QuantizeLinear", "nothing between a convolution and its activation or add"
        if node.op_type == "Add" and all(value.producer() is not None for value in node.inputs):
            kinds = [value.producer().op_type for value in node.inputs]
            assert kinds.count("DequantizeLinear") == 1 and kinds.count("Conv") == 1
    assert not [v for v in model.graph.initializers.values() if v.dtype == ir.DataType.INT32]


def test_the_file_for_processors_holds_bytes(small: Network, tmp_path: Path) -> None:
    def rewrite(model: ir.Model) -> None:
        ranges = measure_ranges(model, qdq.float_results(model), [images(4).numpy()])
        qdq.to_target(model, "cpu", ranges)

    settings = {"task": "classification", "classes": None, "metrics": {}}
    plain = export_onnx(float_network(small), tmp_path / "float.onnx", **settings)
    path = tmp_path / "int8.onnx"
    packed = export_onnx(small, path, rewrite=rewrite, extra_metadata={"precision": "int8"}, **settings)
    assert packed.size_mb < 0.4 * plain.size_mb and packed.metadata["precision"] == "int8"
    model = onnx.load(path)
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    zeros = {types[node.input[2]] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    assert zeros == {onnx.TensorProto.UINT8}
    biases = [node for node in model.graph.node if types.get(node.input[0]) == onnx.TensorProto.INT32]
    assert len(biases) == 10 and {node.op_type for node in biases} == {"DequantizeLinear"}
    with torch.no_grad():
        error = rms_difference(small(images(8)).logits.numpy(), float_network(small).eval()(images(8)).logits.numpy())
    found = verify_int8(small, path, images(8), own_error=error, rounds_results=True)
    assert found.rms_diff < 2 * error and found.batch_sizes == (1, 8)
    with pytest.raises(WorkError, match="differs from PyTorch by .* is allowed"):
        verify_int8(small, path, images(8), own_error=error / 20, rounds_results=False)


def clipped_graph(scale: float) -> ir.Model:
    model = onnx.parser.parse_model(f"""
        <ir_version: 8, opset_import: ["": 17]>
        net (float[n, 1, 4, 4] image) => (float[n, 2, 2, 2] logits)
        <float s = {{0.05}}, int8 z = {{0}}, int8[2,1,3,3] w = {{{",".join(str(7 * i % 50 - 20) for i in range(18))}}},
         float[2] ws = {{0.02, 0.03}}, int8[2] wz = {{0, 0}}, float[2] b = {{0.3, -0.2}}, float t = {{{scale}}},
         float low = {{0.0}}, float high = {{1.0}}>
        {{ xq = QuantizeLinear(image, s, z)
           x = DequantizeLinear(xq, s, z)
           v = DequantizeLinear<axis=0>(w, ws, wz)
           c = Conv(x, v, b)
           a = Clip(c, low, high)
           q = QuantizeLinear(a, t, z)
           logits = DequantizeLinear(q, t, z) }}""")
    return ir.from_proto(model)


@pytest.mark.parametrize("scale", [0.004, 0.02, 0.3])  # the bound is beyond, within, and far within the range
def test_clipping_moves_behind_the_rounding(scale: float) -> None:
    image = np.random.default_rng(0).uniform(-4, 4, (64, 1, 4, 4)).astype(np.float32)
    before, after = clipped_graph(scale), clipped_graph(scale)
    qdq.round_biases(before.graph)
    qdq.to_target(after, "cpu")
    kinds = [node.op_type for node in after.graph]
    assert kinds.index("QuantizeLinear", 1 + kinds.index("Conv")) < kinds.index("Clip")
    expected = run(before, image)
    assert np.array_equal(run(after, image), expected) and len(np.unique(expected)) > 3


def spoiled(model: ir.Model, change) -> ir.Model:
    model = ir.from_proto(ir.to_proto(model))
    change(model)
    return model


def set_scale(value: float, dtype=np.float32, index: int = 1):
    def change(model: ir.Model) -> None:
        node = next(node for node in model.graph if node.op_type == "QuantizeLinear")
        node.replace_input_with(index, qdq._add(model.graph, "other", np.array(value, dtype)))

    return change


def old_opset(model: ir.Model) -> None:
    model.opset_imports[""] = 11


def no_rounding(model: ir.Model) -> None:
    for node in list(model.graph):
        if node.op_type == "DequantizeLinear" and node.inputs[0].producer() is not None:
            node.outputs[0].replace_all_uses_with(node.inputs[0].producer().inputs[0])


def computed_scale(model: ir.Model) -> None:
    node = next(node for node in model.graph if node.op_type == "QuantizeLinear")
    node.replace_input_with(1, node.inputs[0].producer().outputs[0])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (old_opset, "uses opset 11, and INT8 with a scale per channel needs 13"),
        (no_rounding, "no quantised layer"),
        (set_scale(0.0), "zero or not finite"),
        (set_scale(np.inf), "zero or not finite"),
        (set_scale(3, np.int8, 2), "not an int8 zero"),
        (set_scale(0, np.uint8, 2), "not an int8 zero"),
        (computed_scale, "not a constant"),
    ],
)
def test_graphs_that_are_not_ours_are_refused(small_graph: ir.Model, change, words: str) -> None:
    for target in qdq.TARGETS:
        with pytest.raises(WorkError, match=words):
            qdq.to_target(spoiled(small_graph, change), target)


def test_ranges_that_say_nothing_are_refused(small_graph: ir.Model) -> None:
    def overflow(model: ir.Model) -> None:
        for node in model.graph:
            if node.op_type == "Conv":
                bias = np.full(node.inputs[2].shape.numpy(), np.inf, np.float32)
                node.replace_input_with(2, qdq._add(model.graph, f"{node.name}_inf", bias))

    names = qdq.float_results(small_graph)
    with pytest.raises(DataError, match="which gives no range"):
        measure_ranges(spoiled(small_graph, overflow), names, [images(2).numpy()])
    assert measure_ranges(small_graph, [], []) == {}


def test_a_branch_that_is_zero_has_a_range() -> None:
    network = tiny("resnet10t", img_size=32)
    with torch.no_grad():
        network.net.layer1[0].bn2.weight.zero_()
        network.net.layer1[0].bn2.bias.zero_()
    graph = graph_of(calibrated(network).eval())
    names = qdq.float_results(graph)
    ranges = measure_ranges(graph, names, [images(4).numpy()])
    assert min(ranges.values()) > 0 and list(ranges.values()).count(1.0) == 1
    assert np.isfinite(run(qdq.to_target(graph, "cpu", ranges), images(2).numpy())).all()


@pytest.mark.parametrize("scale", [0.0, float("inf"), float("nan")])
def test_a_network_that_was_never_calibrated_is_refused(scale: float) -> None:
    network = calibrated(tiny("cifar_resnet8", width=0.5))
    activation_quantizers(network)["fc"].scale.fill_(scale)
    with pytest.raises(WorkError, match="the scale of 'fc' is .*positive"):
        signed_form(network)
