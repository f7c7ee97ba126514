"""Model files without torch: the graphs here are written by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

from visionkd.errors import DataError, RequestError
from visionkd.runtime.ort import OrtModel
from visionkd.runtime.session import is_model_file, open_session, top_classes
from visionkd.types import InputSpec

SPEC = InputSpec(img_size=(4, 4), crop_pct=1.0)


def write(path: Path, metadata: dict[str, str] | None) -> Path:
    """A file whose logits are the means of the three channels."""
    nodes = [
        helper.make_node("GlobalAveragePool", ["image"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["logits"]),
    ]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 4, 4])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])
    model = helper.make_model(
        helper.make_graph(nodes, "g", [image], [logits]), opset_imports=[helper.make_opsetid("", 18)]
    )
    model.ir_version = 10
    if metadata is not None:
        helper.set_model_props(model, metadata)
    onnx.save(model, path)
    return path


def described(path: Path) -> Path:
    classes = json.dumps(["red", "green", "bleu à l'eau"])
    metadata = {"visionkd_version": "0.1.0", "task": "classification", "classes": classes}
    return write(path, {**metadata, "input": json.dumps(SPEC.to_dict()), "architecture": "tiny"})


def test_a_file_describes_itself(tmp_path: Path) -> None:
    session = open_session(described(tmp_path / "m.onnx"), threads=1)
    assert session.classes == ("red", "green", "bleu à l'eau") and session.task == "classification"
    assert session.input == SPEC and session.architecture == "tiny"
    batch = np.random.default_rng(0).random((3, 3, 4, 4), dtype=np.float32)
    logits = session.predict_logits(batch)
    np.testing.assert_allclose(logits, batch.mean((2, 3)), rtol=1e-5)
    probs = session.predict_probs(batch)
    np.testing.assert_allclose(probs.sum(1), 1.0, rtol=1e-5)
    assert np.array_equal(probs.argmax(1), logits.argmax(1))


def test_images_of_any_size(tmp_path: Path) -> None:
    session = open_session(described(tmp_path / "m.onnx"))
    images = [Image.new("RGB", (10 + i, 20), color) for i, color in enumerate(["red", "lime", "blue", "red", "blue"])]
    probs = session.predict_images(images, batch_size=2)
    assert probs.argmax(1).tolist() == [0, 1, 2, 0, 2]
    best = top_classes(probs, session.classes, 2)
    assert best[1][0][0] == "green" and best[1][0][1] == pytest.approx(probs[1, 1]) and len(best[0]) == 2
    assert top_classes(probs, None, 1)[2][0][0] == "2"


@pytest.mark.parametrize("metadata", [None, {"task": "classification"}])
def test_a_foreign_file_is_refused(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    with pytest.raises(RequestError, match="(?s)not exported by visionkd.*visionkd_version.*visionkd export"):
        open_session(write(tmp_path / "m.onnx", metadata))


def test_missing_damaged_and_other_files(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="there is no file"):
        open_session(tmp_path / "m.onnx")
    path = described(tmp_path / "m.onnx")
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(DataError, match="cannot be loaded"):
        open_session(path)
    with pytest.raises(RequestError, match="not a model file"):
        open_session(tmp_path / "m.tflite")
    assert is_model_file("a/B.ONNX") and not is_model_file("resnet18")


def test_a_gpu_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    path = described(tmp_path / "m.onnx")
    with pytest.raises(RequestError, match="onnxruntime-gpu"):
        OrtModel(path, accelerator="gpu")
    assert OrtModel(path, accelerator="auto").device == "cpu"


def test_without_onnxruntime_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(RequestError, match="pip install onnxruntime"):
        open_session(described(tmp_path / "m.onnx"))


def test_a_device_needs_no_torch(tmp_path: Path) -> None:
    path = described(tmp_path / "m.onnx")
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from visionkd.runtime.session import open_session\n"
        "from visionkd.benchmark.latency import measure, ort_runner\n"
        "import numpy as np\n"
        f"assert open_session({str(path)!r}).predict_probs(np.zeros((1, 3, 4, 4), np.float32)).shape == (1, 3)\n"
        f"assert measure([ort_runner({str(path)!r}, name='m')], rounds=1)[0].latency_ms > 0\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
