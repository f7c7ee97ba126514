from __future__ import annotations

import pytest

from visionkd.report.data import ModelRow
from visionkd.report.text import flatten, quantity, shorten, signed, summary_sentence


def sentence(*args: object) -> str:
    return summary_sentence(*args).replace("\u00a0", " ")


TEACHER = ModelRow("vit", top1=90.0, params_m=86.4)


@pytest.mark.parametrize(
    ("student", "expected"),
    [
        (
            ModelRow("s", top1=87.3, params_m=7.2),
            "The student keeps 97.0 % of the teacher's accuracy with 12× fewer parameters.",
        ),
        (
            ModelRow("s", top1=87.3, params_m=28.8),
            "The student keeps 97.0 % of the teacher's accuracy with 3× fewer parameters.",
        ),
        (
            ModelRow("s", top1=89.99, params_m=86.0),
            "The student keeps 99.9 % of the teacher's accuracy with as many parameters.",
        ),
        (ModelRow("s", top1=90.0), "The student matches the teacher's accuracy."),
        (
            ModelRow("s", top1=90.4, params_m=200.0),
            "The student is 0.40 points more accurate than the teacher with 2.3× as many parameters.",
        ),
        (ModelRow("s"), "The student's accuracy was not measured."),
    ],
)
def test_distilled(student, expected):
    assert sentence(student, [TEACHER]) == expected


def test_macs_stand_in_for_parameters():
    assert "with 4× fewer MACs" in sentence(
        ModelRow("s", top1=80.0, macs_g=1.0), [ModelRow("t", top1=90.0, macs_g=4.0)]
    )


def test_baseline():
    student = ModelRow("s", top1=87.3)
    assert sentence(student, [TEACHER], ModelRow("s", top1=85.0)).endswith(
        ", and is 2.30 points above the same network trained alone."
    )
    assert sentence(student, [TEACHER], ModelRow("s", top1=88.0)).endswith(
        ", and is 0.70 points below the same network trained alone."
    )
    assert sentence(student, [TEACHER], ModelRow("s", top1=87.3)).endswith(
        ", and is level with the same network trained alone."
    )
    assert "the same network" in sentence(student, [TEACHER], ModelRow("s alone", top1=80.0))
    assert sentence(student, [TEACHER], ModelRow("other", top1=88.0)).endswith("below the baseline other.")


def test_best_of_several_teachers():
    assert "97.0 % of the best teacher's" in sentence(
        ModelRow("s", top1=87.3), [ModelRow("weak", top1=70.0), TEACHER, ModelRow("unknown")]
    )


def test_supervised():
    assert (
        sentence(ModelRow("resnet20", top1=91.2, params_m=0.272))
        == "resnet20 reaches 91.20 % top-1 accuracy with 0.272 M parameters."
    )
    assert sentence(ModelRow("resnet20")) == "The accuracy was not measured."


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "–"),
        (float("nan"), "–"),
        (0, "0"),
        (0.0412, "0.0412"),
        (2.0, "2.00"),
        (25.56, "25.6"),
        (304.3, "304"),
        (1217.4, "1\u00a0217"),
        (3.4e-6, "3.40e-06"),
    ],
)
def test_quantity(value, expected):
    assert quantity(value) == expected


def test_signed():
    assert [signed(1.3), signed(-0.45), signed(-0.001)] == ["+1.30", "\u22120.45", "0.00"]


def test_shorten_keeps_both_ends_and_one_line():
    assert shorten("a\nb\x07", 10) == "a b\ufffd"
    assert shorten("n01440764_tench_variant_17", 13) == "n0144076…t_17"
    assert len(shorten("x" * 99, 22)) == 22


def test_flatten():
    assert flatten({"a": {"b": 1, "c": [1, 2]}, "d": None, "e": []}) == [
        ("a.b", "1"),
        ("a.c", "1, 2"),
        ("d", "–"),
        ("e", "–"),
    ]
