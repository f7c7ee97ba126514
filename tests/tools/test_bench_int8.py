"""tools/bench_int8 on networks small enough for a test."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
TOOL = TOOLS / "bench_int8"
PACKAGES = ("nncf", "modelopt")
IMAGES = np.random.default_rng(0).integers(0, 256, (16, 3, 8, 8), dtype=np.uint8)


@pytest.fixture
def quantizers(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(TOOLS))
    monkeypatch.setenv("NNCF_CI", "1")  # set by the module otherwise, and left
    import _bench.quantizers as module

    yield module
    for name in [name for name in sys.modules if name.startswith("_bench")]:
        del sys.modules[name]


@pytest.fixture
def float_file(tmp_path: Path) -> Path:
    """A convolution whose answers are the means of eight channels."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weight = np.random.default_rng(1).normal(size=(8, 3, 3, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["image", "weight"], ["map"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["map"], ["active"]),
        helper.make_node("ReduceMean", ["active"], ["logits"], axes=[2, 3], keepdims=0),
    ]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 8, 8])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 8])
    graph = helper.make_graph(nodes, "small", [image], [logits], [numpy_helper.from_array(weight, "weight")])
    path = tmp_path / "float.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def installed(monkeypatch: pytest.MonkeyPatch, **modules: ModuleType | None) -> None:
    """Put modules in the place of packages; None is one that is not installed."""
    real = importlib.util.find_spec

    def find_spec(name: str) -> object:
        return modules[name] if name in modules else real(name)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


def fake_nncf(seen: dict[str, object]) -> ModuleType:
    def quantize(model: object, dataset: list[dict[str, np.ndarray]], **settings: object) -> object:
        print("Statistics collection 100%")  # as the real one does
        seen.update(settings, dataset=dataset)
        model.producer_name = "fake"
        return model

    module = ModuleType("nncf")
    module.set_log_level = lambda level: None
    module.Dataset = lambda items, transform: [transform(item) for item in items]
    module.QuantizationPreset = SimpleNamespace(PERFORMANCE="performance")
    module.TargetDevice = SimpleNamespace(CPU="CPU")
    module.quantize = quantize
    return module


def fake_modelopt(monkeypatch: pytest.MonkeyPatch, quantize: object) -> ModuleType:
    for name in ("modelopt.onnx", "modelopt.onnx.quantization"):
        module = ModuleType(name)
        module.quantize = quantize
        monkeypatch.setitem(sys.modules, name, module)
    return ModuleType("modelopt")


def test_those_that_are_not_installed_are_named(quantizers, float_file, tmp_path, monkeypatch, capsys) -> None:
    installed(monkeypatch, nncf=None, modelopt=None)
    found = quantizers.others(float_file, tmp_path / "work", IMAGES)
    said = capsys.readouterr()
    assert said.out == "" and said.err == "nncf: not installed\nmodelopt: not installed\n"
    assert found == {"onnxruntime static": tmp_path / "work" / "onnxruntime_static.onnx"}
    assert [file.name for file in (tmp_path / "work").iterdir()] == ["onnxruntime_static.onnx"]


def test_all_calibrate_on_the_same_images_and_say_nothing(
    quantizers, float_file, tmp_path, monkeypatch, capsys
) -> None:
    import onnx

    seen_nncf, seen_modelopt = {}, {}

    def quantize(source: str, *, output_path: str, **settings: object) -> None:
        print("INFO - Quantized onnx model is saved")
        seen_modelopt.update(settings)
        Path(output_path).write_bytes(Path(source).read_bytes())

    installed(monkeypatch, nncf=fake_nncf(seen_nncf), modelopt=fake_modelopt(monkeypatch, quantize))
    found = quantizers.others(float_file, tmp_path, IMAGES)
    assert capsys.readouterr() == ("", "")
    assert list(found) == ["onnxruntime static", "nncf", "modelopt"]
    assert onnx.load(found["nncf"]).producer_name == "fake"
    given = np.concatenate([each["image"] for each in seen_nncf.pop("dataset")])
    np.testing.assert_array_equal(given, IMAGES.astype(np.float32) / 255.0)
    assert seen_nncf == {"preset": "performance", "target_device": "CPU", "subset_size": 16}
    np.testing.assert_array_equal(seen_modelopt["calibration_data"]["image"], given)
    assert (seen_modelopt["quantize_mode"], seen_modelopt["high_precision_dtype"]) == ("int8", "fp32")
    logits = quantizers.OrtModel(found["onnxruntime static"]).run(given)[0]
    expected = quantizers.OrtModel(float_file).run(given)[0]
    assert 0 < np.abs(logits - expected).max() < 0.05 * np.abs(expected).max()


def test_one_that_fails_leaves_a_line_and_no_file(quantizers, float_file, tmp_path, monkeypatch, capsys) -> None:
    def quantize(source: str, *, output_path: str, **settings: object) -> None:
        Path(output_path).write_bytes(b"half a file")
        raise ValueError("no such\noperator")

    installed(monkeypatch, nncf=fake_nncf({}), modelopt=fake_modelopt(monkeypatch, quantize))
    found = quantizers.others(float_file, tmp_path / "work", IMAGES)
    assert list(found) == ["onnxruntime static", "nncf"]
    assert capsys.readouterr().err == "modelopt: left out, it fails on this network: ValueError: no such operator\n"
    assert sorted((tmp_path / "work").iterdir()) == sorted(found.values())


def test_a_file_that_does_not_run_is_left_out_and_the_files_at_hand_are_taken(
    quantizers, float_file, tmp_path, monkeypatch, capsys
) -> None:
    installed(monkeypatch, nncf=None, modelopt=None)
    (tmp_path / "nncf.onnx").write_bytes(float_file.read_bytes())
    (tmp_path / "modelopt.onnx").write_bytes(b"nothing")
    assert list(quantizers.others(float_file, tmp_path, IMAGES)) == ["onnxruntime static", "nncf"]
    assert capsys.readouterr().err.startswith("modelopt: left out, it fails on this network: DataError: ")


@pytest.mark.slow
def test_the_contenders_stand_side_by_side(tmp_path: Path) -> None:
    from visionkd.runtime.ort import OrtModel

    command = [sys.executable, str(TOOL), "--model", "cifar_resnet8", "--random", "--rounds", "1", "--json"]
    done = subprocess.run([*command, "--work", str(tmp_path)], capture_output=True, text=True, check=True)
    rows = {row["variant"]: row for row in json.loads(done.stdout)}
    here = [name for name in PACKAGES if importlib.util.find_spec(name)]
    assert list(rows) == ["float", "int8 cpu", "int8 tensorrt", "onnxruntime static", *here]
    assert rows["float"]["speedup"] == 1.0 and all(row["latency_ms"] > 0 for row in rows.values())
    assert rows["int8 cpu"]["size_mb"] < 0.5 * rows["float"]["size_mb"]
    assert len(list(tmp_path.glob("*.onnx"))) == len(rows)
    assert all(f"{name}: not installed" in done.stderr for name in PACKAGES if name not in here)
    images = np.random.default_rng(2).random((8, 3, 32, 32), dtype=np.float32)
    answers = {name: OrtModel(tmp_path / f"{name.replace(' ', '_')}.onnx").run(images)[0] for name in rows}
    for name in rows:
        distance = np.abs(answers[name] - answers["float"]).max()
        assert distance < 0.2 * np.abs(answers["float"]).max(), name
        assert (distance > 0) == (name != "float")


def test_it_asks_for_photographs() -> None:
    done = subprocess.run([sys.executable, str(TOOL)], capture_output=True, text=True)
    assert done.returncode == 2 and "--data is needed, or --random" in done.stderr
