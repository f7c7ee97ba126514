"""Files of segmentation networks: maps at the size of the input, INT8 for both targets, engines."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from tests.export.test_qdq import run
from tests.quantization.dense_nets import HEADS, SIZE, calibrated_dense, pictures, tiny_dense
from visionkd.errors import WorkError
from visionkd.export import gate, qdq
from visionkd.export.accuracy import Masks
from visionkd.export.differences import rms_difference
from visionkd.export.onnx import export_onnx
from visionkd.export.ranges import measure_ranges
from visionkd.export.verify import Verification, verify_int8, verify_onnx
from visionkd.models.network import Network
from visionkd.runtime.session import open_session

SETTINGS = {"task": "segmentation", "classes": None, "metrics": {}}


@dataclass(frozen=True)
class Made:
    network: Network
    quantized: Network
    folder: Path
    signed: ir.Model
    own_error: float

    def truth(self, count: int) -> Masks:
        """Return what the float network answers, so that the accuracy of another is its agreement with it."""
        logits = gate.logits_of(self.network, pictures(count, seed=9))
        sized = torch.nn.functional.interpolate(logits, size=(50, 70), mode="bilinear")
        return Masks([each.astype(np.uint8) for each in sized.argmax(1).numpy()], 5)

    def verify(self, name: str, **settings: object) -> Verification:
        images, truth = pictures(8, seed=9), self.truth(8)
        return verify_int8(self.quantized, self.folder / name, images, truth, own_error=self.own_error, **settings)


def make(name: str, folder: Path) -> Made:
    network = tiny_dense(name)
    quantized = calibrated_dense(network, calibration="mse")
    graphs: list[ir.Model] = []
    export_onnx(quantized, folder / "signed.onnx", rewrite=lambda model: graphs.append(model.clone()), **SETTINGS)
    images = pictures(8, seed=9)
    error = rms_difference(gate.logits_of(quantized, images).numpy(), gate.logits_of(network, images).numpy())
    model = graphs[0].clone()
    ranges = measure_ranges(model, qdq.float_results(model), [images.numpy()])
    ir.save(qdq.to_target(model, "cpu", ranges), folder / "cpu.onnx")
    return Made(network, quantized, folder, graphs[0], error)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make("deeplabv3plus_test_resnet", tmp_path_factory.mktemp("dense"))


def check(made: Made, folder: Path) -> None:
    image = pictures(8, seed=9).numpy()
    rounded, shifted = made.signed.clone(), made.signed.clone()
    qdq.round_biases(rounded.graph)
    qdq.to_target(shifted, "cpu")
    assert np.array_equal(run(rounded, image), run(shifted, image)), "the same numbers, to the bit"
    signed = made.verify("signed.onnx", rounds_results=False)
    cpu = made.verify("cpu.onnx", rounds_results=True)
    assert signed.metric == "miou" and signed.agreement > 99.0 and cpu.agreement > 95.0
    assert (
        max(abs(found.exported - found.torch) for found in (signed, cpu)) < 5.0
    )  # a rare class weighs as much as others
    run(ir.load(made.folder / "cpu.onnx"), image, optimized_to=folder / "optimized.onnx")
    kinds = Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)
    products = sum(qdq.quantized(node) for node in shifted.graph)
    assert kinds["QLinearConv"] == products > 15, "every quantised layer runs in integers"


def test_both_targets_compute_what_pytorch_computes(made: Made, tmp_path: Path) -> None:
    check(made, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [*(f"{head}_test_resnet" for head in HEADS if head != "deeplabv3plus"), "deeplabv3plus_tf_efficientnet_lite0",
     "lraspp_mobilenet_v3_large"],
)  # fmt: skip
def test_all_heads(name: str, tmp_path: Path) -> None:
    check(make(name, tmp_path), tmp_path)


def test_a_file_that_is_further_away_is_refused(made: Made) -> None:
    with pytest.raises(WorkError, match="differs from PyTorch by"):
        verify_int8(made.network, made.folder / "cpu.onnx", pictures(2), own_error=1e-4, rounds_results=True)


def test_the_float_file_gives_maps_at_the_size_of_the_input(made: Made, tmp_path: Path) -> None:
    file = tmp_path / "float.onnx"
    export_onnx(made.network, file, **SETTINGS)
    found = verify_onnx(made.network, file, pictures(5, seed=9), made.truth(5))
    assert found.exported == found.torch > 95.0 and found.relative_diff < 1e-4 and found.agreement == 100.0
    session = open_session(file)
    assert session.task == "segmentation" and session.predict_logits(pictures(2).numpy()).shape == (2, 5, *SIZE)
    assert not any("aux" in name for name in ir.load(file).graph.initializers)
    with pytest.raises(WorkError, match="points of mIoU"):
        wrong = Masks([np.full((8, 8), 3, np.uint8)] * 2, 5)
        verify_onnx(made.network, file, pictures(2), wrong, max_drop=-1.0)


def test_engines(made: Made, tmp_path: Path) -> None:
    """NVIDIA's parser and builder take the graph: resizes, concatenations and means between Q/DQ nodes."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu12 is not installed")
    from visionkd.export.tensorrt import EngineOptions, build_engine

    for precision in ("fp32", "fp16"):
        options = EngineOptions(compute_capability="8.9", precision=precision)  # type: ignore[arg-type]
        engine = tmp_path / f"{precision}.engine"
        info = build_engine(made.folder / "signed.onnx", engine, library="tensorrt_rtx", options=options)
        assert info.quantized and info.typing == "strong" and info.metadata["task"] == "segmentation"


def test_sensitivity_is_a_mean_over_pixels(made: Made) -> None:
    images = pictures(2, seed=4)
    logits = gate.logits_of(made.network, images)
    even = torch.zeros_like(logits)
    expected = float((even.softmax(1) * (even.log_softmax(1) - logits.log_softmax(1))).sum(1).mean())
    found = [row.divergence for row in gate.sensitivity(made.quantized, images, reference=even)]
    assert expected > 0.01 and found == pytest.approx([expected] * len(found), rel=0.2)
