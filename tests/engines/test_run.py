"""Engine files, and their run through a pretended pycuda."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
from onnx_graphs import CLASSES, SPEC, cnn

from visionkd.benchmark.latency import engine_runner, measure
from visionkd.errors import DataError, RequestError, WorkError
from visionkd.export.tensorrt import EngineOptions, build_engine
from visionkd.runtime import trt as module
from visionkd.runtime.cuda_driver import CudaDevice
from visionkd.runtime.engine_file import engine_name, read_engine, read_engine_info, write_engine
from visionkd.runtime.session import backend_of, is_engine_file, is_model_file, open_session
from visionkd.runtime.trt import TrtModel, foreign


@pytest.fixture
def engine(machine, tmp_path: Path) -> Path:
    machine()
    options = EngineOptions(batch=(2, 4, 4))
    build_engine(cnn(tmp_path / "m.onnx", "int8"), tmp_path / "m.engine", library="tensorrt", options=options)
    return tmp_path / "m.engine"


def pictures(count: int) -> np.ndarray:
    return np.random.default_rng(count).random((count, 3, 32, 32), dtype=np.float32)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 11])
def test_any_batch_is_cut_and_filled_to_what_the_engine_takes(engine: Path, count: int) -> None:
    model = TrtModel(engine)
    batch = pictures(count)
    (logits,) = model.run(batch)
    expected = np.concatenate([batch.mean((2, 3)), np.zeros((count, 1), np.float32)], axis=1)
    np.testing.assert_allclose(logits, expected, rtol=1e-6)
    executed = [call[1] for call in sys.modules["tensorrt"].calls if call[0] == "execute"]
    assert all(2 <= size <= 4 for size in executed) and len(executed) == -(-count // 4)


def test_the_session_of_an_engine_knows_what_the_onnx_file_said(engine: Path) -> None:
    session = open_session(engine, accelerator="auto")
    assert (session.classes, session.input, session.task) == (tuple(CLASSES), SPEC, "classification")
    first, second = session.predict_probs(pictures(3)), session.predict_probs(pictures(4)[:3])
    assert first.shape == (3, 4) and not np.allclose(first, second), "answers are copies, not the buffer"
    assert is_model_file("a.ENGINE") and is_engine_file("a.engine") and not is_engine_file("a.onnx")
    assert (backend_of("a.engine"), backend_of("a.onnx")) == ("tensorrt", "onnxruntime")
    assert engine_name("model.int8.tensorrt.onnx") == "model.int8.engine"


def test_graphs_are_captured_once_for_each_batch_size(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captured = []

    class Graph:
        def __init__(self, stream: int, enqueue) -> None:
            captured.append(stream)
            self.launch = enqueue

    monkeypatch.setattr(module, "CudaGraph", Graph)
    model = TrtModel(engine, cuda_graph=True)
    for count in (4, 4, 3, 4, 3):
        (logits,) = model.run(pictures(count))
        np.testing.assert_allclose(logits[:, :3], pictures(count).mean((2, 3)), rtol=1e-6)
    assert captured == [7, 7]


def test_an_engine_is_timed(engine: Path) -> None:
    (record,) = measure([engine_runner(engine, name="m", batch_size=2)], rounds=1)
    assert (record.backend, record.device, record.precision, record.params_m) == ("tensorrt", "Orin", "int8+fp32", 0.5)
    with pytest.raises(RequestError, match="batches of 2 to 4, not 1"):
        engine_runner(engine, name="m", batch_size=1)
    with pytest.raises(RequestError, match="32 x 32 pixels only"):
        engine_runner(engine, name="m", batch_size=2, img_size=(64, 64))
    with pytest.raises(RequestError, match="--accelerator"):
        engine_runner(engine, name="m", batch_size=2, accelerator="cpu")
    with pytest.raises(RequestError, match="runs on a GPU only"):
        open_session(engine, accelerator="cpu")


@pytest.mark.parametrize(
    ("version", "device", "reason"),
    [
        ("10.16.0", None, "built by tensorrt 10.3.0, and 10.16.0 is installed; there is no NVIDIA GPU"),
        ("10.3.0", CudaDevice("Thor", "11.0", 1), r"for compute capability 8.7, and this GPU \(Thor\) has 11.0"),
        ("10.3.0", CudaDevice("Orin Nano", "8.7", 1), "tuned on 'Orin', and this GPU is 'Orin Nano'"),
    ],
)
def test_a_foreign_engine_is_refused(engine: Path, machine, version: str, device, reason: str) -> None:
    machine(version, device=device)
    with pytest.raises(RequestError, match=reason) as caught:
        TrtModel(engine)
    assert "visionkd export m.onnx --format tensorrt" in caught.value.hint


def test_an_engine_of_another_processor_or_library_is_refused(engine: Path) -> None:
    info = read_engine_info(engine)
    moved = dataclasses.replace(info, platform="linux-aarch65")
    assert "linux-aarch65" in foreign(moved, version="10.3.0", device=CudaDevice("Orin", "8.7", 1))[0]
    assert foreign(info, version="10.3.0", device=CudaDevice("Orin", "8.7", 1)) == []
    several = dataclasses.replace(info, library="tensorrt_rtx", compute_capabilities=("8.7", "8.9"), device="A")
    assert foreign(several, version="10.3.0", device=CudaDevice("B", "8.9", 1)) == [], "RTX compiles for any such GPU"


def test_what_is_missing_is_named(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycuda.driver", None)
    with pytest.raises(RequestError, match="needs pycuda"):
        TrtModel(engine)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(RequestError, match="needs the package tensorrt"):
        TrtModel(engine)


def test_an_engine_that_tensorrt_does_not_load(engine: Path, machine) -> None:
    machine(refuses=("load",))
    with pytest.raises(WorkError, match="magic tag does not match"):
        TrtModel(engine)


@pytest.mark.parametrize(
    ("damage", "error", "reason"),
    [
        (lambda data: data[:10], DataError, "ends within its header"),
        (lambda data: data[:60], DataError, "ends within its header"),
        (lambda data: data[:-3], DataError, "bytes of its engine"),
        (lambda data: data[:-3] + b"xyz", DataError, "its hash"),
        (lambda data: data[:16] + b"]" + data[17:], DataError, "cannot be read"),
        (lambda data: data[:8] + b"\x09\x00\x00\x00" + data[12:], RequestError, "has format 9"),
        (lambda data: b"ftrt" + data, RequestError, "not an engine that visionkd built"),
        (lambda data: b"", RequestError, "not an engine that visionkd built"),
    ],
)
def test_damaged_and_other_engines(engine: Path, damage, error: type[Exception], reason: str) -> None:
    engine.write_bytes(damage(engine.read_bytes()))
    with pytest.raises(error, match=reason):
        read_engine(engine)


def test_an_engine_file_keeps_all_it_was_given(engine: Path, tmp_path: Path) -> None:
    info, content = read_engine(engine)
    assert write_engine(tmp_path / "copy.engine", info, content) == info
    assert (tmp_path / "copy.engine").read_bytes() == engine.read_bytes()
