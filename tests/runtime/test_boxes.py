"""From candidates to boxes, without torch; where it is there, torchvision has to agree."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from visionkd.runtime import draw
from visionkd.runtime.boxes import BoxRule, FoundBoxes, choose_boxes, suppress
from visionkd.runtime.preprocess import letterbox
from visionkd.types import InputSpec

BOXES = np.array([[0, 0, 10, 10], [1, 0, 11, 10], [20, 20, 30, 30], [0, 0, 10, 10]], np.float32)


def boxes_like(rng: np.random.Generator, count: int) -> np.ndarray:
    corner = rng.uniform(0, 80, (count, 2))
    return np.concatenate([corner, corner + rng.uniform(2, 30, (count, 2))], axis=1).astype(np.float32)


def test_of_two_boxes_of_a_class_on_one_object_the_surer_one_stays():
    scores, labels = np.array([0.6, 0.9, 0.3, 0.8], np.float32), np.array([0, 0, 0, 1])
    assert suppress(BOXES, scores, labels, threshold=0.5).tolist() == [1, 3, 2]
    assert suppress(BOXES, scores, labels, threshold=0.9).tolist() == [1, 3, 0, 2], "they overlap by 9 / 11"
    assert suppress(BOXES, scores, labels, threshold=0.5, most=2).tolist() == [1, 3]
    flat = np.zeros((2, 4), np.float32)
    assert len(suppress(flat, scores[:2], labels[:2], threshold=0.0)) == 2, "no area, no overlap, and no warning"
    assert suppress(BOXES[:0], scores[:0], labels[:0], threshold=0.5).shape == (0,)


@pytest.mark.parametrize("seed", range(3))
def test_suppresses_as_torchvision_does(seed):
    torch = pytest.importorskip("torch")
    ops = pytest.importorskip("torchvision.ops")
    rng = np.random.default_rng(seed)
    boxes, scores, labels = boxes_like(rng, 400), rng.random(400).astype(np.float32), rng.integers(0, 4, 400)
    expected = ops.batched_nms(*(torch.from_numpy(each) for each in (boxes, scores, labels)), 0.4)
    assert suppress(boxes, scores, labels, threshold=0.4).tolist() == expected.tolist()


def test_only_scores_above_the_threshold_answer_and_each_candidate_for_every_class():
    scores = np.array([[0.5, 0.4], [0.2, 0.9], [0.05, 0.5], [np.nan, 0.0]], np.float32)
    found = choose_boxes(BOXES, scores, BoxRule(score_threshold=0.3, nms_threshold=0.99))
    rounded = [round(score, 1) for score in found.scores.tolist()]
    assert list(zip(found.labels.tolist(), rounded, strict=True)) == [
        (1, 0.9), (0, 0.5), (1, 0.5), (1, 0.4),
    ]  # fmt: skip
    assert found.boxes[1].tolist() == found.boxes[3].tolist() == BOXES[0].tolist()
    assert len(choose_boxes(BOXES, scores, BoxRule(score_threshold=0.95))) == 0


def test_each_level_or_class_has_its_candidates():
    rng = np.random.default_rng(0)
    boxes, scores = boxes_like(rng, 30) + np.arange(30, dtype=np.float32)[:, None] * 1000, rng.random((30, 3))
    by_level = choose_boxes(boxes, scores, BoxRule(0.0, 1.0, 100, candidates=5, per="level", levels=(20, 10)))
    rows = (by_level.boxes[:, 0] // 1000).astype(int)
    assert (rows < 20).sum() == 5 and (rows >= 20).sum() == 5
    assert by_level.scores.max() == scores.max().astype(np.float32)
    by_class = choose_boxes(boxes, scores, BoxRule(0.0, 1.0, 100, candidates=5, per="class"))
    assert np.bincount(by_class.labels).tolist() == [5, 5, 5]
    assert sorted(by_class.scores[by_class.labels == 2]) == sorted(np.sort(scores[:, 2])[-5:].astype(np.float32))
    with pytest.raises(ValueError, match="levels of 25"):
        choose_boxes(boxes, scores, BoxRule(candidates=5, levels=(20, 5)))


def test_classes_may_have_boxes_of_their_own():
    boxes = np.stack([BOXES, BOXES + 50], axis=1)
    scores = np.array([[0.9, 0.0], [0.0, 0.8], [0.0, 0.0], [0.0, 0.0]], np.float32)
    found = choose_boxes(boxes, scores, BoxRule())
    assert found.boxes.tolist() == [[0, 0, 10, 10], [51, 50, 61, 60]] and found.labels.tolist() == [0, 1]
    turned = choose_boxes(boxes, scores, BoxRule(), columns=[1])
    assert turned.boxes.tolist() == [[51, 50, 61, 60]] and turned.labels.tolist() == [0]


def test_only_asked_classes_compete_and_they_are_renumbered():
    scores = np.array([[0.9, 0.2, 0.5], [0.1, 0.2, 0.3], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]], np.float32)
    found = choose_boxes(BOXES, scores, BoxRule(score_threshold=0.4), columns=[2, 1])
    assert found.labels.tolist() == [0] and found.scores.tolist() == [0.5]


def test_too_small_boxes_are_no_answer():
    boxes = BOXES.copy()
    boxes[2] = [20, 20, 20.001, 30]
    scores = np.full((4, 1), 0.5, np.float32)
    assert len(choose_boxes(boxes, scores, BoxRule(nms_threshold=1.0, min_side=0.01))) == 3


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"\(4, 4\) and \(3, 2\)"):
        choose_boxes(BOXES, np.zeros((3, 2)), BoxRule())


def test_a_rule_travels_as_plain_values():
    rule = BoxRule(0.1, 0.4, 20, candidates=7, per="class", levels=(3, 2), min_side=0.01)
    assert BoxRule.from_dict(rule.to_dict() | {"later": 1}) == rule
    assert BoxRule.from_dict({}) == BoxRule()


def test_boxes_come_back_from_a_letterbox_to_their_picture():
    image = Image.new("RGB", (200, 100), "white")
    view, scale = letterbox(image, InputSpec(img_size=(64, 64), mean=(0.5, 0.2, 0.0)))
    assert scale == 64 / 200 and view.shape == (64, 64, 3)
    assert view[:32].min() == 255 and (view[32:] == (128, 51, 0)).all(), "the network's mean below the picture"
    found = FoundBoxes(
        np.array([[0, 0, 64, 32], [16, 8, 80, 40], [0, 33, 10, 50]], np.float32), np.ones(3), np.arange(3)
    )
    back = found.on_picture(scale, (100, 200))
    assert back.boxes.tolist() == [[0, 0, 200, 100], [50, 25, 200, 100]], "cut at the edge, and none beside it"
    assert back.labels.tolist() == [0, 1]


@pytest.mark.parametrize("size", [(10, 7), (7, 10), (640, 3), (3, 640), (64, 96), (1, 1)])
def test_a_letterbox_takes_pictures_of_any_shape(size):
    view, scale = letterbox(Image.new("RGB", size, "white"), InputSpec(img_size=(64, 96), mean=(0, 0, 0)))
    white = (view == 255).all(-1)
    height, width = white.any(1).sum(), white.any(0).sum()
    assert view.shape == (64, 96, 3) and white[:height, :width].all(), "at the upper left, as a whole"
    assert max(height / 64, width / 96) == 1.0
    assert abs(height - size[1] * scale) <= 0.5 or height == 1
    assert abs(width - size[0] * scale) <= 0.5 or width == 1


def test_the_surest_boxes_are_kept():
    found = FoundBoxes(BOXES, np.array([0.9, 0.5, 0.3, 0.1], np.float32), np.arange(4))
    assert found.above(0.3).labels.tolist() == [0, 1, 2] and found.above(0.0, 2).labels.tolist() == [0, 1]
    assert len(found.above(0.95)) == 0


def test_boxes_are_drawn_in_the_colour_of_their_class():
    image = Image.new("RGB", (300, 260))
    picture = draw.draw_boxes(image, np.array([[50, 60, 120, 200.0]]), [1], [0.87], ["cat", "dog"])
    pixels, color = np.asarray(picture), draw.palette(2)[1]
    assert picture.size == image.size and (np.asarray(image) == 0).all()
    assert (pixels[130, 50] == color).all() and (pixels[199, 80] == color).all() and (pixels[130, 80] == 0).all()
    assert (pixels[:60] != 0).any(), "its name stands above it"
    small = draw.draw_boxes(Image.new("RGB", (30, 20)), np.array([[0, 0, 30, 20.0]]), [0], [], ["cat"])
    assert small.size == (390, 260), "small pictures are enlarged, and boxes with them"
    assert len(np.unique(np.asarray(draw.draw_boxes(image, np.zeros((0, 4)), [], [], ["cat"])))) == 1
