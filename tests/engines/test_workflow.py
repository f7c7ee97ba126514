"""The command on a device, against a pretended one: build, compare, evaluate, predict, time."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from onnx_graphs import CLASSES, METADATA, SPEC, Graph, cnn
from PIL import Image

from visionkd import workflows
from visionkd.cli.main import main
from visionkd.errors import RequestError, WorkError
from visionkd.runtime.engine_file import read_engine_info
from visionkd.workflows import _engine
from visionkd.workflows.doctor import _engines

COLOURS = {"red": (220, 30, 30), "green": (30, 220, 30), "blue": (30, 30, 220)}


def colour_model(path: Path, sign: float = 1.0, **saving: object) -> Path:
    """What the pretended engine computes: the mean of each channel, and 0."""
    graph = Graph("float")
    pooled = graph.node("Flatten", graph.node("GlobalAveragePool", "image"))
    matrix = np.concatenate([sign * np.eye(3), np.zeros((3, 1))], axis=1).astype(np.float32)
    return graph.save(path, graph.node("MatMul", pooled, graph.weight(matrix)), **saving)  # type: ignore[arg-type]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """One picture of each colour but grey."""
    for name, colour in COLOURS.items():
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.new("RGB", SPEC.img_size, colour).save(tmp_path / "photos" / name / "0.png")
    return tmp_path / "photos"


def test_an_engine_is_built_compared_and_used(machine, tmp_path: Path, photos: Path, capsys) -> None:
    machine("10.3.0")
    file = colour_model(tmp_path / "model.onnx")
    found = workflows.export(model=str(file), format="tensorrt", data=str(photos), batch="1:2:8")
    assert found.file == tmp_path / "model.engine" and found.num_verify_images == 3
    assert (found.top1_onnx, found.top1_engine) == (100.0, 100.0) and found.max_abs_diff < 1e-4
    assert (found.layers, found.int8_layers, found.reformat_layers) == (3, 1, 1)
    assert found.device == "Orin, compute capability 8.7" and found.batch == "1:2:8"
    engine = str(found.file)
    assert main(["eval", engine, "--data", str(photos), "--backend", "tensorrt", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["top1"] == 100.0
    assert main(["predict", engine, str(photos / "blue"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["predictions"][0]["labels"][0] == "blue"
    assert main(["bench", engine, str(file), "--rounds", "1", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["values"]["backend"] for row in rows] == ["tensorrt", "onnxruntime"]
    assert main(["eval", str(file), "--data", str(photos), "--backend", "tensorrt"]) == 2
    assert "runs in onnxruntime, not in tensorrt" in capsys.readouterr().err
    assert main(["eval", engine, "--data", str(photos), "--accelerator", "cpu"]) == 2


def test_an_engine_that_answers_otherwise_is_not_written(machine, tmp_path: Path, photos: Path) -> None:
    machine()
    file = colour_model(tmp_path / "model.onnx", sign=-1.0)
    with pytest.raises(WorkError, match="differs from .*so that no file was written"):
        workflows.export(model=str(file), format="tensorrt", data=str(photos))
    assert not (tmp_path / "model.engine").exists()


def test_an_engine_that_loses_accuracy_is_not_written(machine, tmp_path: Path, photos: Path, monkeypatch) -> None:
    machine()
    monkeypatch.setattr(_engine, "_TOLERANCE", 10.0)
    logits = _engine.Session.predict_logits
    sign = {True: -1.0, False: 1.0}
    monkeypatch.setattr(
        _engine.Session, "predict_logits", lambda self, batch: logits(self, batch) * sign[self.path.suffix == ".tmp"]
    )
    with pytest.raises(WorkError, match="more than 1 points lost"):
        workflows.export(model=str(colour_model(tmp_path / "m.onnx")), format="tensorrt", data=str(photos))
    assert not (tmp_path / "m.engine").exists()


def test_engines_of_segmentation_networks_are_compared_by_miou(
    machine, tmp_path: Path, photos: Path, monkeypatch
) -> None:
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (tmp_path / "maps" / split / kind).mkdir(parents=True)
        for number, (name, colour) in enumerate(COLOURS.items()):
            Image.new("RGB", (40, 30), colour).save(tmp_path / "maps" / split / "images" / f"{name}.png")
            Image.new("L", (40, 30), number).save(tmp_path / "maps" / split / "labels" / f"{name}.png")
    (tmp_path / "maps" / "classes.txt").write_text("\n".join(CLASSES))
    machine()
    logits = _engine.Session.predict_logits  # of the pretended engine, for all pixels of an image
    monkeypatch.setattr(
        _engine.Session, "predict_logits", lambda self, batch: np.tile(logits(self, batch)[..., None, None], (8, 8))
    )
    file = colour_model(tmp_path / "m.onnx", metadata={**METADATA, "task": "segmentation"})
    found = workflows.export(model=str(file), format="tensorrt", data=str(tmp_path / "maps"))
    assert (found.miou_onnx, found.miou_engine, found.top1_engine) == (100.0, 100.0, None)
    assert found.num_verify_images == 3 and read_engine_info(found.file).metadata["task"] == "segmentation"
    with pytest.raises(RequestError, match="names the class of every pixel"):
        workflows.export(model=str(file), format="tensorrt", data=str(photos), overwrite=True)


def test_without_data_random_images_do(machine, tmp_path: Path, capsys) -> None:
    machine("11.4.0")
    assert main(["export", str(colour_model(tmp_path / "m.onnx")), "--format", "tensorrt"]) == 0
    captured = capsys.readouterr()
    assert "compared on random images" in captured.err and "num_verify_images  8" in captured.out
    assert (tmp_path / "cache" / "tensorrt" / "11.4.0_Orin_8.7.timing").is_file()


def test_a_run_gives_its_int8_file_for_tensorrt(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "export"
    folder.mkdir(parents=True)
    with pytest.raises(RequestError, match="has no ONNX file for TensorRT"):
        _engine.onnx_of(str(folder.parent))
    cnn(folder / "model.int8.onnx", "cpu")
    with pytest.raises(RequestError, match="has no ONNX file for TensorRT") as caught:
        _engine.onnx_of(str(folder.parent))
    assert "--int8 --target tensorrt" in caught.value.hint
    cnn(folder / "model.onnx")
    assert _engine.onnx_of(str(folder.parent)).name == "model.onnx"
    cnn(folder / "model.int8.tensorrt.onnx", "int8")
    assert _engine.onnx_of(str(folder.parent)).name == "model.int8.tensorrt.onnx"
    with pytest.raises(RequestError, match="is an engine already"):
        _engine.onnx_of("x.engine")
    with pytest.raises(RequestError, match="resnet18 is not an ONNX file"):
        _engine.onnx_of("resnet18")


def test_an_int8_engine_without_int8_layers_is_said_aloud(machine, tmp_path: Path, monkeypatch, capsys) -> None:
    import fake_tensorrt

    machine()
    layers = {"Layers": [{"LayerType": "Reformat", "Inputs": []}]}
    monkeypatch.setattr(fake_tensorrt, "LAYERS", layers)
    monkeypatch.setattr(_engine, "_TOLERANCE", 1e9)
    argv = ["export", str(cnn(tmp_path / "m.onnx", "int8")), "--format", "tensorrt"]
    assert main(argv) == 0
    assert "No layer of the engine computes in INT8" in capsys.readouterr().err
    assert read_engine_info(tmp_path / "m.engine").layers == {"total": 1, "int8": 0, "reformat": 1}


@pytest.mark.parametrize("name", ["precision", "builder"])
def test_unknown_names(machine, tmp_path: Path, name: str) -> None:
    machine()
    with pytest.raises(RequestError, match=f"--{name}: 'x' is unknown. Known: "):
        workflows.export(model=str(cnn(tmp_path / "m.onnx")), format="tensorrt", **{name: "x"})
    with pytest.raises(RequestError, match="--out: '.*m.plan' does not end in .engine"):
        workflows.export(model=str(tmp_path / "m.onnx"), format="tensorrt", out=str(tmp_path / "m.plan"))


def test_the_doctor_tells_of_engines(machine, monkeypatch) -> None:
    machine("10.3.0")
    rows = {row.name: row for row in _engines()}
    assert (rows["tensorrt"].status, rows["tensorrt"].detail) == ("ok", "10.3.0")
    assert (rows["pycuda"].status, rows["pycuda"].detail) == ("ok", "2026.1") and "engines" not in rows
    monkeypatch.delitem(sys.modules, "pycuda")
    monkeypatch.delitem(sys.modules, "pycuda.driver")
    if importlib.util.find_spec("pycuda") is None:
        rows = {row.name: row for row in _engines()}
        assert rows["pycuda"].status == "missing" and "pycuda to run them is not" in rows["engines"].detail
