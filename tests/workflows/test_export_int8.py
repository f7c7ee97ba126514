"""``export --int8`` from end to end, on a tiny network and drawn shapes."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

from tests.quantization.conftest import calibrated, tiny
from visionkd import workflows
from visionkd.data.shapes import CLASSES
from visionkd.errors import DataError, RequestError, WorkError
from visionkd.hub.package import save_package
from visionkd.models.network import Network
from visionkd.quantization.insert import Int8Scheme, quantize_network
from visionkd.types import Listener

ORIGIN = {"task": "classification", "metrics": {}, "origin": {}}


class Notes(Listener):
    def __init__(self) -> None:
        self.said: list[str] = []

    def message(self, text: str, level: str = "info") -> None:
        self.said.append(text)


@pytest.fixture(scope="module")
def plain() -> Network:
    network = tiny("cifar_resnet8", width=0.5)
    network.reset_classifier(len(CLASSES), tuple(CLASSES))
    return network.eval()


@pytest.fixture(scope="module")
def package(plain: Network, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An INT8 package; it needs no data."""
    return str(save_package(calibrated(plain), tmp_path_factory.mktemp("int8") / "model", classes=CLASSES, **ORIGIN))


@pytest.fixture(scope="module")
def float_package(plain: Network, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_package(plain, tmp_path_factory.mktemp("float") / "model", classes=CLASSES, **ORIGIN))


def test_a_float_model_is_quantised_gated_and_recorded(float_package: str, tmp_path: Path) -> None:
    notes = Notes()
    out = tmp_path / "export" / "model.int8.onnx"
    result = workflows.export(
        model=float_package, int8=True, data="shapes", out=str(out), verify_images=24, max_drop=100.0, min_speedup=0.0,
        listener=notes,
    )  # fmt: skip
    assert result.file == out and out.is_file() and result.speedup > 0 and result.left_float is None
    assert result.top1_float is not None and result.num_verify_images == 24
    assert any("ranges by 'mse'" in text for text in notes.said) and any("times as fast" in text for text in notes.said)
    (row,) = json.loads((out.parent / "export.json").read_text())
    assert row["target"] == "cpu" and row["speedup"] == result.speedup and row["float_layers"] == {}
    assert sorted(file.name for file in out.parent.iterdir()) == ["export.json", "model.int8.onnx"]
    metadata = {entry.key: entry.value for entry in onnx.load(out).metadata_props}
    assert metadata["precision"] == "int8" and metadata["target"] == "cpu"
    evaluated = workflows.evaluate(model=str(out), data="shapes", limit=24)
    assert evaluated.num_images == 24 and 0 <= evaluated.metrics["top1"] <= 100


def test_a_quantised_package_becomes_int8_by_itself(package: str, tmp_path: Path) -> None:
    notes = Notes()
    result = workflows.export(model=package, target="tensorrt", out=str(tmp_path / "t.onnx"), listener=notes)
    assert any("Without labels" in text for text in notes.said)
    assert result.speedup is None and result.max_abs_diff < 0.1
    model = ir.load(tmp_path / "t.onnx")
    zeros = {node.inputs[2].const_value.dtype for node in model.graph if node.op_type == "QuantizeLinear"}
    assert zeros == {ir.DataType.INT8} and not any(
        value.dtype == ir.DataType.INT32 for value in model.graph.initializers.values()
    )


def test_what_the_gate_refuses_leaves_no_file(package: str, tmp_path: Path) -> None:
    with pytest.raises(WorkError, match="1e\\+06 times is asked for"):
        workflows.export(model=package, int8=True, min_speedup=1e6, out=str(tmp_path / "a.onnx"), listener=Notes())
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_no_file(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(*_, **__) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("torch.onnx.ONNXProgram.save", fill)
    with pytest.raises(OSError, match="No space left"):
        workflows.export(model=package, int8=True, target="tensorrt", out=str(tmp_path / "a.onnx"), listener=Notes())
    assert list(tmp_path.iterdir()) == []


def test_a_network_without_ranges_is_refused(plain: Network, tmp_path: Path) -> None:
    from visionkd.workflows._export_int8 import export_int8

    network = quantize_network(plain, scheme=Int8Scheme())
    settings = {"target": "cpu", "source": None, "calibration": None, "verify_images": 8, "listener": Notes()}
    with pytest.raises((WorkError, DataError), match="scale"):
        export_int8(network, tmp_path / "a.onnx", **settings)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"int8": True}, "--data: is required"),
        ({"target": "cpu"}, "--target: is for INT8 only"),
        ({"max_drop": 1.0, "min_speedup": 2.0}, "--min-speedup: is for INT8 only"),
        ({"int8": True, "target": "gpu"}, "--target: 'gpu' is unknown"),
        ({"int8": True, "max_drop": -1.0, "data": "shapes"}, "--max-drop: must be 0 or more"),
        ({"int8": True, "target": "tensorrt", "min_speedup": 2.0}, "--min-speedup: is measured in ONNX Runtime"),
        ({"int8": True, "opset": 11, "data": "shapes"}, "--opset: 11 is too old for INT8"),
    ],
)
def test_wrong_requests(float_package: str, request_: dict, words: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=words):
        workflows.export(model=float_package, out=str(tmp_path / "a.onnx"), listener=Notes(), **request_)
    assert list(tmp_path.iterdir()) == []


def test_images_that_are_too_few_or_alike_are_refused(float_package: str, tmp_path: Path) -> None:
    from PIL import Image

    for number in range(60):
        folder = tmp_path / "data" / CLASSES[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (90, 120, 30)).save(folder / f"{number}.png")
    request_ = {"model": float_package, "int8": True, "data": str(tmp_path / "data"), "listener": Notes()}
    with pytest.raises(DataError, match="are the same"):
        workflows.export(out=str(tmp_path / "a.onnx"), **request_)
    for number in range(12, 60):
        (tmp_path / "data" / CLASSES[number % 2] / f"{number}.png").unlink()
    with pytest.raises(DataError, match="at least 16"):
        workflows.export(out=str(tmp_path / "a.onnx"), **request_)
    assert [file.name for file in tmp_path.iterdir()] == ["data"]
