"""A segmentation student from a package to files, a bundle, an engine and INT8, on maps and on bare pictures."""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml
from PIL import Image

from tests.quantization.conftest import tiny
from tests.quantization.dense_nets import calibrated_dense, tiny_dense
from visionkd import workflows
from visionkd.data.segmentation import MASK_CLASSES
from visionkd.errors import RequestError
from visionkd.hub.package import load_package, save_package
from visionkd.models.network import Network
from visionkd.types import Listener

ORIGIN = {"task": "segmentation", "metrics": {}, "origin": {}}


class Notes(Listener):
    def __init__(self) -> None:
        self.said: list[str] = []

    def message(self, text: str, level: str = "info") -> None:
        self.said.append(text)


@pytest.fixture(scope="module")
def plain() -> Network:
    return tiny_dense("fpn_test_resnet", num_classes=len(MASK_CLASSES))


@pytest.fixture(scope="module")
def package(plain: Network, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_package(plain, tmp_path_factory.mktemp("float") / "model", classes=MASK_CLASSES, **ORIGIN))


@pytest.fixture(scope="module")
def int8_package(plain: Network, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("int8") / "model"
    return str(save_package(calibrated_dense(plain), folder, classes=MASK_CLASSES, **ORIGIN))


def picture(number: int) -> Image.Image:
    small = np.random.default_rng(number).integers(0, 255, (4, 5, 3), np.uint8)
    return Image.fromarray(small).resize((70, 50), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures without any labels."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(20):
        picture(number).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def mapped(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Pictures with maps of all classes."""
    folder = tmp_path_factory.mktemp("mapped") / "data"
    for split, numbers in (("train", range(18)), ("val", range(18, 24))):
        for kind in ("images", "labels"):
            (folder / split / kind).mkdir(parents=True)
        for number in numbers:
            picture(number).save(folder / split / "images" / f"{number}.png")
            coarse = np.random.default_rng(number).integers(0, len(MASK_CLASSES), (5, 7), np.uint8)
            map_ = Image.fromarray(coarse).resize((70, 50), Image.Resampling.NEAREST)
            map_.save(folder / split / "labels" / f"{number}.png")
    (folder / "classes.txt").write_text("\n".join(MASK_CLASSES))
    return str(folder)


@pytest.fixture(scope="module")
def bundle(int8_package: str, mapped: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("signed") / "m.onnx"
    workflows.export(model=int8_package, target="tensorrt", data=mapped, verify_images=4, max_drop=100.0,
                     out=str(file))  # fmt: skip
    folder = tmp_path_factory.mktemp("bundles") / "bundle"
    workflows.export(model=str(file), bundle=str(folder))
    return folder


@pytest.fixture(scope="module")
def exported(package: str, mapped: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Notes]:
    """A folder like that of a run with its INT8 file, what its export gave, and what was said."""
    run, notes = tmp_path_factory.mktemp("exported") / "run", Notes()
    shutil.copytree(package, run / "model")
    result = workflows.export(
        model=package, int8=True, data=mapped, out=str(run / "export" / "model.int8.onnx"), verify_images=6,
        max_drop=100.0, min_speedup=0.0, listener=notes,
    )  # fmt: skip
    return run, result, notes


def test_a_float_model_is_quantised_gated_and_recorded_by_miou(exported, mapped: str) -> None:
    run, result, notes = exported
    out = run / "export" / "model.int8.onnx"
    assert result.num_verify_images == 6 and result.speedup > 0 and result.top1_float is None
    assert None not in (result.miou_float, result.miou_torch, result.miou_exported)
    assert any("% mIoU in float" in text for text in notes.said) and any("of the pixels" in text for text in notes.said)
    (row,) = json.loads(out.with_name("export.json").read_text())
    assert row["miou_float"] == result.miou_float and row["miou_exported"] == result.miou_exported
    assert row["target"] == "cpu" and row["agreement"] > 90 and row["float_layers"] == {}
    metadata = {entry.key: entry.value for entry in onnx.load(out).metadata_props}
    assert metadata["task"] == "segmentation" and json.loads(metadata["classes"]) == list(MASK_CLASSES)
    evaluated = workflows.evaluate(model=str(out), data=mapped)
    assert evaluated.metrics["miou"] == pytest.approx(result.miou_exported, abs=1e-3)


def test_a_row_says_what_an_int8_file_costs_and_saves(exported, package: str, mapped: str) -> None:
    loader = SourceFileLoader("record_int8", str(Path(__file__).parents[2] / "tools" / "record_int8"))
    tool = importlib.util.module_from_spec(importlib.util.spec_from_loader("record_int8", loader))
    loader.exec_module(tool)
    run = exported[0]
    (run / "config.yaml").write_text(yaml.safe_dump({"training": {"seed": 3}, "data": {"path": mapped}}))
    (run / "environment.json").write_text(json.dumps({"commit": "0123"}))
    (run / "log.txt").write_text("start: visionkd distill --config segmentation/cwd --out run")
    workflows.export(model=package, out=str(run / "export" / "model.onnx"), listener=Notes())
    row = tool.row_of(run, argparse.Namespace(data=None, split=None, rounds=1, note="n", quantized=None))
    assert tuple(row) == tool.COLUMNS and row["recipe"] == "segmentation/cwd" and row["measure"] == "miou"
    assert 0 <= float(row["int8"]) <= 100 and float(row["int8_mb"]) < float(row["float_mb"])
    assert float(row["speedup"]) == pytest.approx(float(row["float_ms"]) / float(row["int8_ms"]), rel=0.05)


def test_a_bundle_predicts_evaluates_and_is_timed(bundle: Path, mapped: str, pictures: Path, tmp_path: Path) -> None:
    described = json.loads((bundle / "preprocessing.json").read_text())
    assert any("whole image" in step for step in described["steps"]) and "bilinearly" in described["output"]
    assert json.loads((bundle / "manifest.json").read_text())["task"] == "segmentation"
    evaluated = workflows.evaluate(model=str(bundle), data=mapped, limit=3)
    assert evaluated.num_images == 3 and 0.0 <= evaluated.metrics["miou"] <= 100.0
    workflows.predict(model=str(bundle), images=[str(pictures / "0.png")], save=str(tmp_path / "drawn"))
    assert list((tmp_path / "drawn").iterdir())
    (row,) = workflows.bench(models=[str(bundle)], rounds=1).rows
    assert row.values["precision"] == "int8" and row.values["img_size"] == "64x96"


def test_an_engine_of_a_bundle(bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu12 is not installed")
    built = workflows.export(
        model=str(bundle), format="tensorrt", compute_capability="8.9", out=str(tmp_path / "m.engine")
    )
    assert built.file.is_file() and built.precision == "int8 and fp32"


def test_pictures_without_maps_give_ranges_and_agreement(package: str, pictures: Path, tmp_path: Path) -> None:
    notes = Notes()
    options = ("data.workers=0", "int8.images=16", "data.val_fraction=0.2", "report.enabled=false")
    result = workflows.quantize(model=package, data=str(pictures), options=options, out=str(tmp_path / "run"),
                                listener=notes)  # fmt: skip
    rows = {row.values["role"]: row.values for row in result.table}
    assert rows["baseline"]["miou"] == 100.0 and 50.0 < rows["student"]["miou"] < 100.0
    assert any("agreement with the float model" in text for text in notes.said)
    network, card = load_package(result.files["model"])
    assert card["quantization"]["kind"] == "int8" and "agreement" in card["metrics_note"]
    assert network.task == "segmentation"


def test_the_teacher_trains_the_quantised_network(package: str, mapped: str, tmp_path: Path) -> None:
    options = ("data.workers=0", "int8.images=16", "report.enabled=false")
    result = workflows.quantize(
        model=package, data=mapped, teacher=package, epochs=1, batch_size=8, lr=1e-6, options=options,
        out=str(tmp_path / "run"),
    )  # fmt: skip
    assert {"train/kd_loss", "train/task_loss"} <= set(result.metrics)
    assert {row.values["role"] for row in result.table} == {"student", "teacher", "baseline"}
    assert load_package(result.files["model"])[1]["origin"]["method"] == "kd"


def test_maps_for_a_network_that_names_whole_images_are_refused(mapped: str, tmp_path: Path) -> None:
    origin = {**ORIGIN, "task": "classification"}
    model = save_package(tiny("cifar_resnet8", width=0.5), tmp_path / "model", classes=None, **origin)
    with pytest.raises(RequestError, match="names one class for an image"):
        workflows.export(model=str(model), int8=True, data=mapped, out=str(tmp_path / "m.onnx"))
