from __future__ import annotations

import xml.etree.ElementTree as ET

import matplotlib
import numpy as np
import pytest
from report_sample import curves

from visionkd.report import analysis, figures
from visionkd.report.data import Curves, ModelRow


def texts(svg: str) -> list[str]:
    root = ET.fromstring(svg.replace("xlink:href", "href"))
    return ["".join(node.itertext()) for node in root.iter("text")]


def test_pictures_are_well_formed_and_text_stays_text():
    for picture in figures.learning_curves(curves(), curves(offset=2.0)):
        assert "epoch" in texts(picture.svg)
        assert len(picture.svg) < 40_000


def test_baseline_training_loss_is_left_out_because_it_is_another_loss():
    pictures = {picture.title: picture for picture in figures.learning_curves(curves(), curves(distilled=False))}
    assert [item.text for item in pictures["Loss"].legend] == [
        "Student, training",
        "Student, validation",
        "Baseline, validation",
    ]
    assert len(pictures["Accuracy, top-1 in %"].legend) == 4
    assert [item.text for item in pictures["Parts of the training loss"].legend] == ["kd", "task"]


def test_no_curves_without_two_points():
    assert figures.learning_curves(Curves()) == []
    assert figures.learning_curves(Curves.from_rows([{"epoch": 1, "split": "val", "top1": 3}])) == []


def test_cost_needs_two_networks_that_differ():
    student = ModelRow("s", top1=80.0, params_m=1.0, macs_g=0.1)
    twin = ModelRow("s", top1=79.0, params_m=1.0, macs_g=0.1)
    teacher = ModelRow("t", top1=90.0, params_m=20.0, latency_ms={"torch": 5.0})
    assert figures.accuracy_against_cost(student, (), twin) == []
    assert [picture.title for picture in figures.accuracy_against_cost(student, (teacher,), twin)] == ["Parameters, M"]


@pytest.mark.parametrize("top1", [0.0, 0.1, 100.0])
def test_cost_at_the_ends_of_the_scale(top1):
    pictures = figures.accuracy_against_cost(
        ModelRow("s", top1=top1, params_m=1e-5), (ModelRow("t", top1=top1, params_m=1e3),), None
    )
    ticks = [float(text) for text in texts(pictures[0].svg) if text.replace(".", "").isdigit()]
    assert len(ticks) >= 2


def test_class_bars_show_the_worst_and_say_so():
    accuracy = {"student": np.linspace(99.0, 1.0, 40)}
    picture = figures.class_bars(accuracy, np.ones(40, dtype=int), [f"c{i}" for i in range(40)])
    assert "15 worst of 40" in picture.caption
    shown = [text for text in texts(picture.svg) if text.startswith("c")]
    assert shown == [f"c{i}" for i in range(39, 24, -1)]


def test_class_without_images_is_left_out_and_named_in_the_caption():
    accuracy = {"student": np.array([50.0, np.nan, 70.0])}
    picture = figures.class_bars(accuracy, np.array([2, 0, 3]), ["a", "b", "c"])
    assert "1 of 3 classes have no image" in picture.caption and "b" not in texts(picture.svg)


def test_confusion_map_prints_shares_of_rows():
    picture = figures.confusion_map(np.array([[3, 1], [0, 0]]), ["$x_1^", "日本"])
    assert {"75", "25", "$x_1^", "日本"} <= set(texts(picture.svg))
    assert figures.confusion_map(np.ones((31, 31), dtype=int), [str(i) for i in range(31)]) is None


def test_reliability_of_one_sample():
    found = analysis.answers(np.array([[0.9, 0.1]]), np.array([0]))
    assert (
        figures.reliability_diagram({"student": analysis.reliability(found)}, student="Model").legend[0].text
        == "Model, error 10.0\u00a0%"
    )


def test_global_style_is_left_alone_and_ignored():
    before = dict(matplotlib.rcParams)
    first = figures.learning_curves(curves())[0].svg
    assert dict(matplotlib.rcParams) == before
    with matplotlib.rc_context({"lines.linewidth": 9.0, "font.size": 30.0}):
        assert figures.learning_curves(curves())[0].svg == first
