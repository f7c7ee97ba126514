"""Files of detectors: all candidates, boxes chosen outside, INT8 for both targets, accuracy by AP."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from PIL import Image

from tests.export.test_qdq import run
from tests.quantization.dense_nets import SIZE
from tests.quantization.detectors import calibrated_detector, pictures, tiny_detector
from visionkd.errors import WorkError
from visionkd.export import gate, qdq
from visionkd.export.accuracy import Boxes, boxes_truth, score
from visionkd.export.answers import answers, difference, divergence
from visionkd.export.differences import Differences
from visionkd.export.onnx import export_onnx
from visionkd.export.ranges import measure_ranges
from visionkd.export.verify import verify_int8, verify_onnx
from visionkd.models.detection.network import DetectionNetwork
from visionkd.runtime.boxes import BoxRule, FoundBoxes
from visionkd.runtime.session import open_session

SETTINGS = {"task": "detection", "classes": tuple("abcde"), "metrics": {}}
IMAGES = pictures(8, seed=9)


def truth_of(network: DetectionNetwork, images: torch.Tensor) -> Boxes:
    """Return what a network finds as what there is to find, so that the AP of another is its agreement with it."""
    with torch.no_grad():
        found = [network(image[None]).boxes[0] for image in images]
    targets = [
        {"boxes": each.boxes[:10].numpy(), "labels": each.labels[:10].numpy(), "crowd": np.zeros(10, bool)}
        for each in found
    ]
    truth = boxes_truth(targets, [(1.0, SIZE)] * len(targets), rule=network.rule(), columns=None, num_classes=5)
    assert truth is not None
    return truth


@dataclass(frozen=True)
class Made:
    network: DetectionNetwork
    quantized: DetectionNetwork
    folder: Path
    signed: ir.Model
    own_error: float


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("detection")
    network = tiny_detector(score_threshold=0.3)
    quantized = calibrated_detector(network)
    export_onnx(network, folder / "float.onnx", **SETTINGS)
    graphs: list[ir.Model] = []
    export_onnx(quantized, folder / "signed.onnx", rewrite=lambda model: graphs.append(model.clone()), **SETTINGS)
    error = difference(quantized, gate.logits_of(quantized, IMAGES), gate.logits_of(network, IMAGES))
    return Made(network, quantized, folder, graphs[0], error)


def test_the_float_file_gives_what_pytorch_gives(made: Made) -> None:
    found = verify_onnx(made.network, made.folder / "float.onnx", IMAGES, truth_of(made.network, IMAGES))
    assert found.relative_diff < 1e-4 and found.agreement == 100.0 and found.batch_sizes == (1, 8)
    assert found.metric == "ap" and found.exported == pytest.approx(found.torch, abs=0.5) and found.torch > 50.0


def test_a_repair_speaks_of_ap(made: Made) -> None:
    ranked = [gate.LayerSensitivity(name, 1.0) for name in ("head.classification_head.cls_logits",) * 2]
    with pytest.raises(gate.Refused, match=r"INT8 loses 9.00 points of AP even with 1 of 2 layers in float"):
        gate.repair(made.quantized, ranked, lambda _: 9.0, max_drop=1.0, title="AP")


def test_the_file_says_how_its_boxes_are_chosen(made: Made) -> None:
    session = open_session(made.folder / "float.onnx")
    assert session.task == "detection" and session.classes == tuple("abcde")
    assert session.rule == made.network.rule() and session.rule.score_threshold == 0.3
    assert session.rule.levels == (96, 24, 6, 2, 1)
    boxes, scores = session.predict_candidates(IMAGES[:3].numpy())
    assert boxes.shape == (3, 129, 4) and scores.shape == (3, 129, 5)
    assert boxes.min() >= 0.0 and (boxes.max((0, 1)) <= [96, 64, 96, 64]).all()
    operators = qdq.count_operators(ir.load(made.folder / "float.onnx"))
    assert not {"NonMaxSuppression", "TopK", "Loop", "NonZero"} & set(operators), "nothing depends on the image"
    assert "boxes" in json.loads(json.dumps(session.metadata))


def test_pictures_of_any_size_get_their_own_boxes(made: Made) -> None:
    session = open_session(made.folder / "float.onnx")
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (h, w, 3), np.uint8)) for h, w in ((50, 70), (200, 90), (64, 96))]
    found = list(session.predict_boxes(images, batch_size=2))
    assert len(found) == 3
    for each, image in zip(found, images, strict=True):
        assert len(each) and each.boxes.min() >= 0 and (each.boxes <= [*image.size, *image.size]).all()
    with torch.no_grad():
        view = torch.from_numpy(np.array(images[2])).permute(2, 0, 1)[None] / 255.0
        (expected,) = made.network(view).boxes
    parts = (getattr(expected, name).numpy() for name in ("boxes", "scores", "labels"))
    wanted = FoundBoxes(*parts).on_picture(1.0, SIZE)  # without those that have no area
    np.testing.assert_allclose(found[2].scores, wanted.scores, rtol=1e-4)
    some = next(session.predict_boxes(images[:1], columns=[3]))
    assert set(some.labels.tolist()) <= {0}


def test_int8_for_tensorrt_computes_what_pytorch_computes(made: Made) -> None:
    found = verify_int8(
        made.quantized, made.folder / "signed.onnx", IMAGES, truth_of(made.network, IMAGES),
        own_error=made.own_error, rounds_results=False,
    )  # fmt: skip
    assert found.rms_diff < 0.5 * made.own_error and found.agreement > 95.0
    assert found.torch is not None and abs(found.exported - found.torch) < 5.0
    with pytest.raises(WorkError, match="differs from PyTorch by"):
        verify_int8(made.network, made.folder / "signed.onnx", IMAGES, own_error=1e-4, rounds_results=False)


def test_int8_for_a_processor_runs_every_quantised_layer_in_integers(made: Made) -> None:
    rounded, shifted = made.signed.clone(), made.signed.clone()
    qdq.round_biases(rounded.graph)
    qdq.to_target(shifted, "cpu")
    image = IMAGES[:2].numpy()
    assert np.array_equal(run(rounded, image), run(shifted, image)), "the same numbers, to the bit"
    model = made.signed.clone()
    names = qdq.float_results(model)
    ir.save(qdq.to_target(model, "cpu", measure_ranges(model, names, [IMAGES.numpy()])), made.folder / "cpu.onnx")
    # ONNX Runtime's precise mode does not load weights that several nodes share, as heads do over the levels
    run(ir.load(made.folder / "cpu.onnx"), image, optimized_to=made.folder / "optimized.onnx", precise=False)
    operators = qdq.count_operators(ir.load(made.folder / "optimized.onnx"))
    products = sum(qdq.quantized(node) for node in shifted.graph)
    assert operators["QLinearConv"] == products > 30, "the heads once for each level"


def test_an_engine(made: Made, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu12 is not installed")
    from visionkd.export.tensorrt import EngineOptions, build_engine

    options = EngineOptions(compute_capability="8.9")
    info = build_engine(made.folder / "signed.onnx", tmp_path / "m.engine", library="tensorrt_rtx", options=options)
    assert info.quantized and info.metadata["task"] == "detection" and "levels" in info.metadata["boxes"]


def test_ap_is_measured_on_the_pictures_themselves() -> None:
    """A box in a letterbox of half the size, one that is cut at the picture's edge, and one of another class."""
    rule = BoxRule(score_threshold=0.1)
    target = {
        "boxes": np.array([[20, 20, 60, 60], [100, 0, 200, 50]], np.float32),
        "labels": np.array([1, 0]), "crowd": np.zeros(2, bool),
    }  # fmt: skip
    truth = boxes_truth([target], [(0.5, (100, 200))], rule=rule, columns=[2, 0], num_classes=3)
    assert truth is not None and truth.title == "AP" and truth.num_classes == 2
    given = np.zeros((1, 3, 4 + 3), np.float32)
    given[0, 0] = [10, 10, 30, 30, 0.9, 0, 0]  # output 0 is the data's class 1
    given[0, 1] = [50, 0, 130, 25, 0, 0, 0.8]
    given[0, 2] = [10, 10, 30, 30, 0, 0.95, 0]  # a class that the data has not
    assert score(truth, [given]) == pytest.approx(100.0)
    given[0, 1, 4:] = [0.8, 0, 0]
    assert score(truth, [given]) == pytest.approx(50.0)
    assert boxes_truth([{**target, "crowd": np.ones(2, bool)}], [(1.0, (9, 9))], rule=rule, columns=None,
                       num_classes=3) is None  # fmt: skip
    with pytest.raises(ValueError, match="0 answers for 1 images"):
        score(truth, [])


def test_differences_of_boxes_and_of_scores_are_told_apart() -> None:
    expected = np.zeros((2, 4, 6), np.float32)
    expected[..., :4], expected[..., 4] = 100.0, 0.5
    given = expected.copy()
    seen = Differences(BoxRule(score_threshold=0.3))
    seen.add(given, expected, averaged=True)
    assert (seen.largest, seen.relative, seen.rms, seen.agreement) == (0.0, 0.0, 0.0, 100.0)
    given[0, 0, :4] += 10.0
    seen.add(given, expected, averaged=True)
    assert seen.largest == 0.0 and seen.relative == pytest.approx(0.1) and 0.0 < seen.rms < 0.1
    given[1, 1, 4:] = [0.1, 0.6]
    seen.add(given, expected, averaged=True)
    assert seen.largest == pytest.approx(0.6) and seen.relative == pytest.approx(1.2)
    assert seen.agreement == pytest.approx(100 * 23 / 24)
    given[0, 3, 4] = np.nan
    seen.add(given, expected, averaged=True)
    assert np.isnan(seen.largest) and not seen.relative <= 1.0


def test_the_worst_layer_comes_first(made: Made) -> None:
    images = IMAGES[:2]
    reference = gate.logits_of(made.network, images)
    assert divergence(made.network, reference, reference) == 0.0
    moved = reference.clone()
    moved[..., :4] += 5.0
    voted = reference.clone()
    voted[..., 4:] = (voted[..., 4:] + 0.2).clamp(max=0.99)
    assert divergence(made.network, moved, reference) > 0.1 and divergence(made.network, voted, reference) > 0.1
    ranked = gate.sensitivity(made.quantized, images, reference=reference)
    values = [row.divergence for row in ranked]
    assert values == sorted(values, reverse=True) and values[0] > 10 * values[-1] >= 0.0
    worst = ranked[0].name
    assert worst not in dict(made.network.net.named_modules()) or "bbox_reg" not in worst
    with torch.no_grad():
        assert torch.equal(answers(made.quantized, images), gate.logits_of(made.quantized, images)), "all on again"
