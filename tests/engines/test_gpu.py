"""Engines on a real GPU, with whatever TensorRT and pycuda are there: ``pytest -m gpu tests/engines``."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

import numpy as np
import pytest
from onnx_graphs import cnn, vit

from visionkd import workflows
from visionkd.runtime.cuda_driver import find_device
from visionkd.runtime.engine_file import read_engine_info
from visionkd.runtime.session import open_session
from visionkd.runtime.trt import TrtModel

LIBRARIES = [name for name in ("tensorrt", "tensorrt_rtx") if importlib.util.find_spec(name) is not None]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(find_device() is None, reason="there is no NVIDIA GPU"),
    pytest.mark.skipif(not LIBRARIES, reason="neither tensorrt nor tensorrt_rtx is installed"),
    pytest.mark.skipif(importlib.util.find_spec("pycuda") is None, reason="pycuda is not installed"),
]
BATCH = np.random.default_rng(0).random((11, 3, 32, 32), dtype=np.float32)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("form", ["float", "int8"])
@pytest.mark.parametrize("make", [cnn, vit])
def test_an_engine_answers_as_its_onnx_file(make, form: str, precision: str, library: str, tmp_path: Path) -> None:
    file = make(tmp_path / "m.onnx", form, width=64)
    found = workflows.export(
        model=str(file), format="tensorrt", builder=library, precision=precision, batch="2:4:8", verify_images=4
    )
    expected = open_session(file).predict_logits(BATCH)
    scale = np.abs(expected).max()
    tolerance = 0.05 if form == "int8" else 0.02  # TF32 and FP16; in INT8 single steps
    for cuda_graph in (False, True):
        given = TrtModel(found.file, cuda_graph=cuda_graph).run(BATCH)[0]
        assert np.abs(given - expected).max() < tolerance * scale
    if library == "tensorrt" and form == "int8":
        assert found.int8_layers > 0


@pytest.mark.parametrize("library", LIBRARIES)
def test_an_engine_runs_beside_pytorch_in_one_process(library: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    file = cnn(tmp_path / "m.onnx", width=64)
    engine = str(workflows.export(model=str(file), format="tensorrt", builder=library).file)
    ones = torch.ones(8, 8, device="cuda")
    session = open_session(engine)
    first = session.predict_logits(BATCH)
    assert float((ones @ ones).sum()) == 512.0
    np.testing.assert_array_equal(session.predict_logits(BATCH), first)
    assert read_engine_info(engine).device == find_device().name
    (row,) = workflows.bench(models=[engine], rounds=2).rows
    assert row.values["latency_ms"] > 0
