"""What a report shows of detectors: matches, pictures, curves."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from visionkd.report.box_matches import match
from visionkd.report.detection import MOST_CURVES, Detection, describe, precision_curves, worst_and_best
from visionkd.runtime.box_metrics import average_precision, box_set


def part(boxes: list, labels: list[int], *, scores: list[float] | None = None, crowd: list[bool] | None = None) -> dict:
    found = {"boxes": np.array(boxes, np.float32).reshape(-1, 4), "labels": np.array(labels, np.int64)}
    found |= {"scores": np.array(scores, np.float32)} if scores is not None else {}
    return found | ({"crowd": np.array(crowd, bool)} if crowd is not None else {})


A, B, FAR = [0, 0, 10, 10], [20, 20, 40, 40], [60, 60, 70, 70]
TRUTH = box_set([
    part([A, B], [0, 1]), part([A], [0]), part([], []), part([B], [1], crowd=[True]), part([A, B], [0, 0]),
    part([A], [1]), part([B], [0]),
])  # fmt: skip
FOUND = box_set([
    part([A, [1, 0, 10, 10], B], [0, 0, 0], scores=[0.6, 0.9, 0.8]),  # the surer of two takes A, B is of another class
    part([A], [0], scores=[0.7]),
    part([], [], scores=[]),
    part([[25, 25, 30, 30], FAR], [1, 1], scores=[0.9, 0.2]),  # in a crowd; and nowhere
    part([A, B], [0, 0], scores=[0.95, 0.3]),
    part([FAR], [1], scores=[0.99]),
    part([B], [0], scores=[0.85]),
])  # fmt: skip


def detection(classes: int = 2, **more) -> Detection:
    precision = {"student": average_precision(FOUND, TRUTH, num_classes=classes)}
    return Detection(precision, {"student": FOUND}, TRUTH, classes, tuple(f"{n}.png" for n in range(7)), **more)


def test_each_box_takes_the_best_that_is_left() -> None:
    found = match(FOUND, TRUTH)
    assert found.taken.tolist() == [-1, 0, -1, 2, -2, -1, 4, 5, -1, 7] and found.num_true == 8 - 1
    right, wrong = (found.taken >= 0).sum(), (found.taken == -1).sum()
    assert (right, wrong) == (5, 4)
    # from 0.7 on: right are 0.9, 0.7, 0.95, 0.85 of six counted; taking 0.6 and 0.3 in gains less than it costs
    best = found.best_score()
    f1 = {score: 2 * ((found.taken >= 0) & (found.scores >= score)).sum()
          / (((found.taken != -2) & (found.scores >= score)).sum() + 7) for score in found.scores}  # fmt: skip
    assert f1[np.float32(best)] == max(f1.values())
    nothing = match(box_set([part([], [], scores=[])] * 7), TRUTH)
    assert nothing.best_score() == 0.5 and not len(nothing.taken)


def test_worst_and_best_images() -> None:
    pictured, num_worst = worst_and_best(np.array([50.0, 100.0, np.nan, 0.0, 80.0, 0.0, 90.0, 70.0]))
    assert pictured == (3, 5, 0, 7, 1, 6) and num_worst == 4
    assert worst_and_best(np.array([np.nan, np.nan])) == ((), 0)
    assert worst_and_best(np.array([20.0])) == ((0,), 1) and worst_and_best(np.array([20.0, 60.0])) == ((0, 1), 1)


@pytest.mark.parametrize("with_pictures", [True, False])
def test_what_the_page_shows(with_pictures: bool) -> None:
    def load(index: int) -> Image.Image:
        if index == 5:
            raise OSError("gone")
        return Image.new("RGB", (80, 80), (90, 90, 90))

    shown = describe(
        detection(novel=(1,)), classes=("red", "blue"), load=load if with_pictures else None, student="Model"
    )
    scenes = {scene.name: scene for scene in shown["scenes"]}
    assert sorted(scenes) == ["0.png", "1.png", "4.png", "5.png", "6.png"], "2 has nothing, and 3 a crowd alone"
    titles = [panel.title for panel in scenes["1.png"].panels]
    assert titles == (["image"] if with_pictures else []) + ["truth", "model", "errors"]
    assert [panel.title for panel in scenes["5.png"].panels] == ["truth", "model", "errors"]
    assert scenes["1.png"].score == 100.0 and scenes["5.png"].score == 0.0 and scenes["1.png"].teacher_score is None
    assert all(panel.image.startswith("data:image/") for scene in shown["scenes"] for panel in scene.panels)
    assert "the F1 of the image alone" in shown["scene_text"] and [key.name for key in shown["color_keys"]] == [
        "red", "blue (novel)",
    ]  # fmt: skip
    assert "Average precision" in shown["classes"].caption


def test_curves_are_those_of_the_worst_classes() -> None:
    many = 20
    boxes = [part([A], [label]) for label in range(many)]
    found = [part([A if label % 2 else FAR], [label], scores=[0.5]) for label in range(many)]
    truth, given = box_set(boxes), box_set(found)
    precision = average_precision(given, truth, num_classes=many)
    several = Detection({"student": precision, "teacher": precision}, {"student": given}, truth, many)
    curves = precision_curves(several, [f"c{n}" for n in range(many)], student="Student")
    assert len(curves) == MOST_CURVES and curves[0].title == "c0: AP50 0.0 %" and curves[-1].title == "c3: AP50 100.0 %"
    assert [item.text for item in curves[0].legend] == ["Student", "Teacher"] and "<svg" in curves[0].svg
