"""Detectors of two stages as files: proposals inside, the last choice outside, the same boxes as in PyTorch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from tests.models.two_stage_nets import CLASSES, open_two_stages, plain_two_stages
from tests.quantization.dense_nets import pictures
from tests.teachers.oadp_help import write_encoder
from tests.workflows.boxes import mark_found, write_boxes
from tests.workflows.test_export_dense import Notes
from tests.workflows.test_oadp import distil
from visionkd import workflows
from visionkd.cli.main import main
from visionkd.errors import RequestError, WorkError
from visionkd.export._engine_checks import check_onnx
from visionkd.export.differences import paired
from visionkd.export.onnx import export_onnx
from visionkd.export.verify import undecided, verify_onnx
from visionkd.hub.package import save_package
from visionkd.models.detection.network import DetectionNetwork
from visionkd.models.detection.open_network import OpenVocabularyDetector
from visionkd.runtime.boxes import BoxRule, choose_boxes, joined, parted
from visionkd.runtime.onnx_file import read_onnx_file
from visionkd.runtime.session import open_session

IMAGES = pictures(5, seed=4)
#: Of 3 anchors in each place of the levels.
COUNT = 3 * (96 + 24 + 6 + 2)
ORIGIN = {"task": "detection", "metrics": {}, "origin": {}}


def assert_alike(boxes, scores, labels, wanted_boxes, wanted_scores, wanted_labels) -> None:
    """The same boxes, in an order in which almost equal scores may have changed places."""
    assert len(boxes) == len(wanted_boxes)
    apart = np.abs(np.asarray(boxes)[:, None] - np.asarray(wanted_boxes)).max(-1)
    apart[np.asarray(labels)[:, None] != np.asarray(wanted_labels)] = np.inf
    partners = apart.argmin(0)
    assert apart.min(0).max() < 0.02 and len(set(partners.tolist())) == len(boxes)
    np.testing.assert_allclose(np.asarray(scores)[partners], np.asarray(wanted_scores), rtol=1e-3)


@pytest.fixture(scope="module")
def network() -> DetectionNetwork:
    return plain_two_stages(score_threshold=0.3, min_stride=8)  # fewer levels: a smaller graph


@pytest.fixture(scope="module")
def package(network: DetectionNetwork, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_package(network, tmp_path_factory.mktemp("float") / "model", classes=CLASSES, **ORIGIN))


@pytest.fixture(scope="module")
def scenes(network: DetectionNetwork, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(mark_found(write_boxes(tmp_path_factory.mktemp("data") / "scenes", train=1, val=6), network))


@pytest.fixture(scope="module")
def exported(package: str, scenes: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By the command, with all that it checks."""
    out = tmp_path_factory.mktemp("run") / "export" / "model.onnx"
    assert main(["export", package, "--data", scenes, "--out", str(out)]) == 0
    (row,) = json.loads(out.with_name("export.json").read_text())
    assert row["ap_torch"] > 50.0 and row["ap_exported"] == pytest.approx(row["ap_torch"], abs=0.01)
    assert row["max_abs_diff"] < 1e-5 and row["num_verify_images"] == 6
    return out


def test_the_file_finds_what_pytorch_finds_in_batches_of_any_size(exported: Path, network: DetectionNetwork) -> None:
    session = open_session(exported)
    assert session.rule == network.rule() and session.rule.own_boxes and session.rule.score_threshold == 0.3
    for batch in (IMAGES[:1], IMAGES[:4], IMAGES[2:]):
        with torch.no_grad():
            expected = network(batch).boxes
        boxes, scores = session.predict_candidates(batch.numpy())
        assert boxes.shape == (len(batch), COUNT, 2, 4) and scores.shape == (len(batch), COUNT, 2)
        real = (scores > 0).any(2).sum(1)
        assert (real < COUNT).all(), "fewer are found than there is room for"
        assert not any(values[count:].any() for values, count in zip(scores, real, strict=True))
        for given, values, wanted in zip(boxes, scores, expected, strict=True):
            found = choose_boxes(given, values, session.rule)
            assert len(found) > 5
            assert_alike(found.boxes, found.scores, found.labels, wanted.boxes, wanted.scores, wanted.labels)


def test_the_last_choice_is_no_part_of_the_file_and_that_of_proposals_is(exported: Path) -> None:
    found = read_onnx_file(exported)
    assert found.operators["NonMaxSuppression"] == 4 and found.operators["RoiAlign"] == 3, "one for each level"
    assert not {"Loop", "If", "Scan"} & set(found.operators) and found.inputs["image"][1:] == (3, 64, 96)
    assert not isinstance(found.inputs["image"][0], int) and found.opset >= 17
    assert json.loads(found.metadata["boxes"])["min_side"] == 0.01


def test_file_and_network_evaluate_and_predict_alike(exported: Path, package: str, scenes: str, tmp_path: Path) -> None:
    of_network, of_file = (
        workflows.evaluate(model=model, data=scenes, options=("data.workers=0",)) for model in (package, str(exported))
    )
    assert of_network.metrics["ap"] > 50.0 and of_file.num_images == 6
    for name, value in of_network.metrics.items():
        assert of_file.metrics[name] == pytest.approx(value, abs=0.01), name
    Image.fromarray(np.random.default_rng(3).integers(0, 255, (40, 90, 3), np.uint8)).save(tmp_path / "a.png")
    mine, theirs = (
        workflows.predict(model=model, images=[str(tmp_path / "a.png")], min_score=0.35).predictions[0]
        for model in (package, str(exported))
    )
    assert mine.boxes
    assert_alike(theirs.boxes, theirs.probs, theirs.labels, mine.boxes, mine.probs, mine.labels)
    with pytest.raises(RequestError, match="--classes: the classes of .* were fixed when it was exported"):
        workflows.predict(model=str(exported), images=[str(tmp_path / "a.png")], classes=["red"])


def test_only_some_of_its_classes_compete(exported: Path) -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (50, 70, 3), np.uint8))
    session = open_session(exported)
    (both,), (blue,) = (list(session.predict_boxes([image], columns=columns)) for columns in (None, [1]))
    assert set(blue.labels.tolist()) == {0} and len(both) > len(blue) > 0
    np.testing.assert_allclose(blue.boxes[0], both.boxes[both.labels == 1][0])


def test_it_is_timed_and_bundled(exported: Path, package: str, tmp_path: Path) -> None:
    rows = workflows.bench(models=[package, str(exported)], rounds=1).rows
    assert [row.values["backend"] for row in rows] == ["torch", "onnxruntime"]
    notes = Notes()
    workflows.export(model=str(exported), bundle=str(tmp_path / "bundle"), listener=notes)
    assert any("have no INT8 form" in text for text in notes.said)
    described = json.loads((tmp_path / "bundle" / "preprocessing.json").read_text())
    assert described["boxes"]["own_boxes"] is True
    readme = (tmp_path / "bundle" / "README.md").read_text()
    assert "visionkd predict model.onnx photo.jpg" in readme and "--format tensorrt" not in readme


def test_engines_and_int8_are_refused_in_words(exported: Path, package: str, scenes: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="two stages .* TensorRT-RTX builds neither"):
        check_onnx(exported)
    with pytest.raises(WorkError, match="two stages.* INT8 is placed in plain graphs only"):
        workflows.export(model=package, data=scenes, int8=True, out=str(tmp_path / "m.onnx"))
    with pytest.raises(RequestError, match="--int8: .*two stages"):
        workflows.distill(
            teacher=package, student="fasterrcnn_test_resnet", data=scenes, epochs=1, int8=True, method="rpn_roi",
            out=str(tmp_path / "run"), options=("student.img_size=64",), pretrained=False,
        )  # fmt: skip
    assert not list(tmp_path.iterdir())


def test_a_file_of_other_weights_does_not_pass(exported: Path, tmp_path: Path) -> None:
    copied = tmp_path / "m.onnx"
    for part in ("rpn.head.cls_logits", "rpn.head.bbox_pred", "roi_heads.box_predictor.cls_score"):
        other = plain_two_stages(score_threshold=0.3, min_stride=8)
        with torch.no_grad():
            weight = other.net.get_submodule(part).weight
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * 0.2 * weight.std())
        copied.write_bytes(exported.read_bytes())
        with pytest.raises(WorkError, match="differs from PyTorch by"):
            verify_onnx(other, copied, IMAGES[:2])
        assert not copied.exists()


def test_an_image_of_one_colour_where_all_anchors_are_equally_sure_passes(
    exported: Path, network: DetectionNetwork, tmp_path: Path
) -> None:
    copied = tmp_path / "m.onnx"
    copied.write_bytes(exported.read_bytes())
    found = verify_onnx(network, copied, torch.full((2, 3, 64, 96), 0.5))
    assert found.relative_diff < 1e-4 and found.agreement == 100.0


def test_a_network_that_is_undecided_is_not_held_to_what_rounding_decides(exported: Path, tmp_path: Path) -> None:
    """Objectness is the same everywhere: which anchors become proposals is a toss."""
    network = plain_two_stages(score_threshold=0.3, min_stride=8)
    assert undecided(network, IMAGES[:2]) < 1e-4
    model = onnx.load(exported)
    (values,) = [each for each in model.graph.initializer if each.name.endswith("rpn.head.cls_logits.weight")]
    values.CopyFrom(onnx.numpy_helper.from_array(0 * onnx.numpy_helper.to_array(values), values.name))
    onnx.save(model, tmp_path / "m.onnx")
    network.net.rpn.head.cls_logits.weight.data.zero_()
    network.net.rpn.head.cls_logits.bias.data.fill_(1.0)
    with pytest.raises(WorkError, match="differs"):  # of another bias: no proposal is as sure, but all are equally so
        verify_onnx(plain_two_stages(score_threshold=0.3, min_stride=8), tmp_path / "m.onnx", IMAGES[:2])
    onnx.save(model, tmp_path / "m.onnx")
    assert undecided(network, IMAGES[:2]) > 0.05
    assert verify_onnx(network, tmp_path / "m.onnx", IMAGES[:2]).max_abs_diff < 1.0


# Open vocabulary ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def opened() -> OpenVocabularyDetector:
    network = open_two_stages(min_stride=8)
    network.net.roi_heads.detections_per_img = 20
    return network


@pytest.fixture(scope="module")
def open_file(opened: OpenVocabularyDetector, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("open") / "m.onnx"
    export_onnx(opened, file, task="detection", classes=CLASSES, metrics={})
    return file


def test_the_scores_of_both_heads_and_the_texts_are_in_the_file(
    open_file: Path, opened: OpenVocabularyDetector, tmp_path: Path
) -> None:
    session = open_session(open_file)
    assert session.rule == opened.rule() and not session.rule.own_boxes and session.rule.max_detections == 20
    for batch in (IMAGES[:1], IMAGES[1:4]):
        with torch.no_grad():
            expected = opened(batch).boxes
        boxes, scores = session.predict_candidates(batch.numpy())
        assert boxes.shape == (len(batch), 40, 4) and scores.shape == (len(batch), 40, 2)
        for given, values, wanted in zip(boxes, scores, expected, strict=True):
            found = choose_boxes(given, values, session.rule)
            assert_alike(found.boxes, found.scores, found.labels, wanted.boxes, wanted.scores, wanted.labels)
    copied = tmp_path / "m.onnx"
    copied.write_bytes(open_file.read_bytes())
    assert verify_onnx(opened, copied, IMAGES).relative_diff < 1e-4
    opened.calibrate(None)
    try:
        with pytest.raises(WorkError, match="differs from PyTorch by"):
            verify_onnx(opened, copied, IMAGES)
    finally:
        opened.calibrate(2 / 3)


# The comparison -------------------------------------------------------------------------------------------------------

RULE = BoxRule(own_boxes=True)


def proposals(count: int, *, real: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    boxes, scores = rng.uniform(0, 96, (1, count, 3, 4)), rng.random((1, count, 3))
    boxes[:, real:], scores[:, real:] = 0.0, 0.0
    return joined(boxes, scores).astype(np.float32)


def worst(given: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(np.subtract(*paired(given, expected, RULE))).max())


def test_candidates_in_another_order_are_compared_with_their_like() -> None:
    expected = proposals(100, real=60)
    boxes, scores = parted(expected, RULE)
    assert boxes.shape == (1, 100, 3, 4) and np.array_equal(joined(boxes, scores), expected)
    given = expected.copy()
    given[0, :60] = expected[0, np.random.default_rng(1).permutation(60)]
    assert worst(given, expected) == 0.0
    given[0, 7] = proposals(1, real=1) * 0.5
    assert worst(given, expected) == 0.0, "one proposal may be another"
    given[0, 8] = proposals(1, real=1) * 0.7
    assert worst(given, expected) > 1.0


def test_candidates_that_count_for_nothing_must_do_so() -> None:
    expected = proposals(100, real=60)
    given = expected.copy()
    given[0, 70:80] = expected[0, :10] + 5.0
    assert worst(given, expected) > 1.0
    missing = expected.copy()
    missing[0, 50:60] = 0.0
    assert worst(missing, expected) > 1.0
    given[0, 0, 0] = np.nan
    assert np.isnan(worst(given, expected))


@pytest.mark.slow
def test_a_run_writes_and_checks_its_own_file(scenes: str, tmp_path: Path) -> None:
    workflows.train(
        model="fasterrcnn_test_resnet", data=scenes, epochs=1, batch_size=1, export="onnx", out=str(tmp_path / "run"),
        pretrained=False, options=("model.img_size=64", "model.args.channels=16", "model.args.head_dim=32",
                                   "data.workers=0", "report.enabled=false"),
    )  # fmt: skip
    assert (tmp_path / "run" / "export" / "model.onnx").is_file()
    (row,) = json.loads((tmp_path / "run" / "export" / "export.json").read_text())
    assert row["max_abs_diff"] < 1e-4


@pytest.mark.slow
def test_so_does_an_open_vocabulary_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    distil(write_encoder(tmp_path / "encoder"), run, export="onnx")
    (row,) = json.loads((run / "export" / "export.json").read_text())
    assert row["max_abs_diff"] < 1e-4 and row["ap_torch"] == pytest.approx(row["ap_exported"], abs=0.5)
    of_run, of_file = (workflows.evaluate(model=str(model)) for model in (run, run / "export" / "model.onnx"))
    for name, value in of_run.metrics.items():
        assert of_file.metrics[name] == pytest.approx(value, abs=0.5), name
    assert "ap50_novel" in of_file.metrics
