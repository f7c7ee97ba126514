"""A detector from a package to files, predictions, a bundle and INT8, on boxes and on bare pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.quantization.detectors import calibrated_detector, tiny_detector
from tests.workflows.boxes import CLASSES, mark_found, write_boxes
from tests.workflows.test_export_dense import Notes
from visionkd import workflows
from visionkd.errors import RequestError
from visionkd.hub.package import load_package, save_package
from visionkd.models.detection.network import DetectionNetwork
from visionkd.runtime.box_metrics import average_precision, box_set
from visionkd.workflows._found import found_boxes

ORIGIN = {"task": "detection", "metrics": {}, "origin": {}}


@pytest.fixture(scope="module")
def plain() -> DetectionNetwork:
    return tiny_detector(num_classes=len(CLASSES), score_threshold=0.3)


@pytest.fixture(scope="module")
def package(plain: DetectionNetwork, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_package(plain, tmp_path_factory.mktemp("float") / "model", classes=CLASSES, **ORIGIN))


@pytest.fixture(scope="module")
def scenes(plain: DetectionNetwork, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Pictures with the surest boxes of the network as those that are there, so that its AP is high."""
    root = write_boxes(tmp_path_factory.mktemp("data") / "scenes", train=18)
    return str(mark_found(root, plain))


@pytest.fixture(scope="module")
def exported(package: str, scenes: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "export" / "model.onnx"
    result = workflows.export(model=package, data=scenes, out=str(out), verify_images=7)
    assert result.ap_torch is not None and result.ap_exported == pytest.approx(result.ap_torch, abs=0.5)
    assert result.ap_torch > 50.0 and result.top1_torch is None and result.miou_torch is None
    (row,) = json.loads(out.with_name("export.json").read_text())
    assert row["ap_exported"] == result.ap_exported and row["num_verify_images"] == 7
    return out


def test_the_file_evaluates_as_the_network_does(exported: Path, package: str, scenes: str) -> None:
    options = ("data.workers=0",)
    network = workflows.evaluate(model=package, data=scenes, options=options)
    file = workflows.evaluate(model=str(exported), data=scenes, options=options)
    assert file.num_images == network.num_images == 7 and file.measure == "ap"
    for name, value in network.metrics.items():
        assert file.metrics[name] == pytest.approx(value, abs=0.5), name
    assert set(file.per_class) == set(CLASSES)


def test_the_file_and_the_network_predict_the_same_boxes(exported: Path, package: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    for name, size in (("a", (40, 90)), ("b", (120, 60))):
        Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)).save(tmp_path / f"{name}.png")
    (tmp_path / "c.png").write_bytes(b"no picture")
    given = {}
    for kind, model in (("network", package), ("file", str(exported))):
        found = workflows.predict(
            model=model, images=[str(tmp_path)], save=str(tmp_path.parent / f"{kind}_drawn"), min_score=0.35
        )
        assert [name for name, _ in found.skipped] == [str(tmp_path / "c.png")]
        given[kind] = found.predictions
        for prediction, (height, width) in zip(found.predictions, ((40, 90), (120, 60)), strict=True):
            assert prediction.boxes and len(prediction.boxes) == len(prediction.labels) == len(prediction.probs)
            assert min(prediction.probs) >= 0.35 and list(prediction.probs) == sorted(prediction.probs, reverse=True)
            assert set(prediction.labels) <= set(CLASSES)
            boxes = np.array(prediction.boxes)
            assert boxes.min() >= 0 and (boxes <= [width, height, width, height]).all()
            with Image.open(prediction.saved) as drawn:
                assert drawn.width % width == 0 and drawn.width // width == drawn.height // height
    for mine, theirs in zip(given["network"], given["file"], strict=True):
        np.testing.assert_allclose(mine.probs, theirs.probs, rtol=1e-3)
        np.testing.assert_allclose(mine.boxes[0], theirs.boxes[0], atol=0.1)
    some = workflows.predict(model=package, images=[str(tmp_path / "a.png")], top_k=2, min_score=0.35)
    assert some.predictions[0].boxes == given["network"][0].boxes[:2]
    none = workflows.predict(model=package, images=[str(tmp_path / "a.png")], min_score=1.0)
    assert none.predictions[0].boxes == () == none.predictions[0].labels


def test_a_score_for_a_network_without_boxes_is_refused(tmp_path: Path) -> None:
    from tests.quantization.conftest import tiny

    model = save_package(
        tiny("cifar_resnet8", width=0.5), tmp_path / "m", task="classification", classes=None, metrics={}, origin={}
    )
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(RequestError, match="--min-score"):
        workflows.predict(model=str(model), images=[str(tmp_path / "a.png")], min_score=0.5)


def test_it_is_timed_with_what_chooses_its_boxes(
    exported: Path, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from visionkd.benchmark import latency

    chosen = []
    monkeypatch.setattr(latency, "choose_boxes", lambda *args: chosen.append(args))
    torch_row, file_row = workflows.bench(models=[package, str(exported)], rounds=1).rows
    assert chosen and torch_row.values["macs_g"] == pytest.approx(file_row.values["macs_g"])
    assert file_row.values["img_size"] == "64x96"


def test_a_bundle_says_what_becomes_of_the_candidates(exported: Path, tmp_path: Path) -> None:
    workflows.export(model=str(exported), bundle=str(tmp_path / "bundle"))
    described = json.loads((tmp_path / "bundle" / "preprocessing.json").read_text())
    assert any("upper left" in step for step in described["steps"]) and described["boxes"]["nms_threshold"] == 0.6
    assert (tmp_path / "bundle" / "labels.txt").read_text().split() == list(CLASSES)
    Image.new("RGB", (50, 50)).save(tmp_path / "a.png")
    found = workflows.predict(model=str(tmp_path / "bundle"), images=[str(tmp_path / "a.png")], min_score=0.0)
    assert found.predictions[0].boxes is not None


def test_pictures_without_boxes_give_ranges_and_agreement(package: str, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(20):
        small = np.random.default_rng(number).integers(0, 255, (4, 5, 3), np.uint8)
        Image.fromarray(small).resize((70, 50), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    notes = Notes()
    options = ("data.workers=0", "int8.images=16", "data.val_fraction=0.2", "report.enabled=false")
    result = workflows.quantize(
        model=package, data=str(folder), options=options, out=str(tmp_path / "run"), listener=notes
    )
    rows = {row.values["role"]: row.values for row in result.table}
    assert 20.0 < rows["student"]["ap"] < rows["baseline"]["ap"] <= 100.0
    assert any("agreement with the float model" in text for text in notes.said)
    network, card = load_package(result.files["model"])
    assert card["quantization"]["kind"] == "int8" and network.task == "detection"


def test_a_quantised_detector_trains_on_its_boxes(package: str, scenes: str, tmp_path: Path) -> None:
    options = ("data.workers=0", "int8.images=16", "report.enabled=false")
    result = workflows.quantize(
        model=package, data=scenes, epochs=1, batch_size=6, lr=1e-6, options=options, out=str(tmp_path / "run")
    )
    assert "train/task_loss" in result.metrics and {row.values["role"] for row in result.table} == {
        "student", "baseline",
    }  # fmt: skip
    assert load_package(result.files["model"])[1]["quantization"]["kind"] == "int8"


@pytest.mark.slow
def test_a_float_model_is_quantised_gated_and_recorded_by_ap(package: str, scenes: str, tmp_path: Path) -> None:
    notes, out = Notes(), tmp_path / "export" / "model.int8.tensorrt.onnx"
    result = workflows.export(
        model=package, int8=True, target="tensorrt", data=scenes, out=str(out), verify_images=7, max_drop=100.0,
        listener=notes,
    )  # fmt: skip
    assert None not in (result.ap_float, result.ap_torch, result.ap_exported) and result.top1_float is None
    assert any("% AP in float" in text for text in notes.said)
    assert any("of the candidates" in text for text in notes.said)
    (row,) = json.loads(out.with_name("export.json").read_text())
    assert row["ap_float"] == result.ap_float and row["ap_exported"] == result.ap_exported
    assert set(row["float_layers"].values()) == {"gives sides of boxes"}
    evaluated = workflows.evaluate(model=str(out), data=scenes)
    # with graph optimisation, which the check of a signed file switches off: it saturates on processors without VNNI
    assert evaluated.metrics["ap"] > 50.0


def test_boxes_that_are_not_the_networks_leave_only_agreement(plain: DetectionNetwork, tmp_path: Path) -> None:
    """Classes of other names: the boxes are not looked at, and it is said."""
    other = str(save_package(plain, tmp_path / "model", classes=("cat", "dog"), **ORIGIN))
    root = write_boxes(tmp_path / "scenes", train=16, val=4)
    notes = Notes()
    options = ("data.workers=0", "int8.images=16", "report.enabled=false")
    result = workflows.quantize(model=other, data=str(root), options=options, out=str(tmp_path / "run"), listener=notes)
    assert any("boxes are not looked at" in text for text in notes.said)
    assert {row.values["role"] for row in result.table} == {"student", "baseline"}


def test_a_calibrated_detector_agrees_with_itself_in_float(plain: DetectionNetwork) -> None:
    quantized = calibrated_detector(plain)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), np.uint8))
    wanted, given = (found_boxes(net, picture, device="cpu") for net in (plain, quantized))
    truth = box_set([{"boxes": wanted.boxes[:8], "labels": wanted.labels[:8], "crowd": np.zeros(8, bool)}])
    found = box_set([{"boxes": given.boxes, "labels": given.labels, "scores": given.scores}])
    assert average_precision(found, truth, num_classes=2).metrics()["ap50"] > 50.0
