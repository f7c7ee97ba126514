from __future__ import annotations

import numpy as np
import pytest
from report_sample import evaluation

from visionkd.report import analysis

TARGETS = np.array([0, 0, 1, 1, 2])
PROBS = np.array(
    [[0.9, 0.1, 0.0], [0.2, 0.7, 0.1], [0.1, 0.8, 0.1], [0.6, 0.3, 0.1], [0.5, 0.1, 0.4]], dtype=np.float32
)


def test_answers():
    found = analysis.answers(PROBS, TARGETS)
    assert found.pred.tolist() == [0, 1, 1, 0, 0]
    assert found.correct.tolist() == [True, False, True, False, False]
    assert found.confidence == pytest.approx([0.9, 0.7, 0.8, 0.6, 0.5])
    assert found.top1 == pytest.approx(40.0)


def test_topk_agrees_with_sorting_and_chunks(monkeypatch):
    data = evaluation(500, 20)
    expected = np.mean(
        [target in np.argsort(-row)[:5] for row, target in zip(data.student_probs, data.targets, strict=True)]
    )
    monkeypatch.setattr(analysis, "CHUNK", 64)
    assert analysis.topk_accuracy(data.student_probs, data.targets) == pytest.approx(100 * expected)


def test_class_accuracy_and_confusion_agree():
    found = analysis.answers(PROBS, TARGETS)
    accuracy, counts = analysis.class_accuracy(found.correct, TARGETS, 4)
    matrix = analysis.confusion(found.pred, TARGETS, 4)
    assert accuracy[:3].tolist() == [50.0, 50.0, 0.0] and np.isnan(accuracy[3])
    assert counts.tolist() == [2, 2, 1, 0] == matrix.sum(axis=1).tolist()
    assert matrix[2].tolist() == [1, 0, 0, 0] and matrix[0, 1] == 1


def test_confused_pairs_are_ordered_and_single_mistakes_left_out():
    matrix = np.array([[5, 2, 1], [3, 5, 0], [2, 0, 6]])
    pairs = analysis.confused_pairs(matrix, 10)
    assert [(p.target, p.pred, p.count) for p in pairs] == [(1, 0, 3), (0, 1, 2), (2, 0, 2)]
    assert pairs[0].share == pytest.approx(37.5)
    assert len(analysis.confused_pairs(matrix, 2)) == 2
    assert len(analysis.confused_pairs(np.array([[1, 1], [1, 1]]), 10)) == 2
    assert analysis.confused_pairs(np.eye(3, dtype=int), 10) == []


def test_agreement_adds_up():
    teacher = np.array([[0.9, 0.1, 0.0], [0.8, 0.1, 0.1], [0.9, 0.1, 0.0], [0.9, 0.1, 0.0], [0.1, 0.1, 0.8]])
    found = analysis.agreement(analysis.answers(PROBS, TARGETS), analysis.answers(teacher, TARGETS), 0.5)
    assert (found.both_right, found.only_teacher, found.only_student, found.both_wrong) == (1, 2, 1, 1)
    assert found.same_mistake == 1 and found.rate == pytest.approx(40.0)


def test_kl_is_from_teacher_to_student_and_never_infinite(monkeypatch):
    teacher, student = np.array([[0.5, 0.5, 0.0]]), np.array([[0.25, 0.5, 0.25]])
    assert analysis.mean_kl(student, teacher) == pytest.approx(0.5 * np.log(2), rel=1e-5)
    assert analysis.mean_kl(teacher, student) != pytest.approx(0.5 * np.log(2), rel=1e-2)
    assert np.isfinite(analysis.mean_kl(np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])))
    data = evaluation(300, 7)
    whole = analysis.mean_kl(data.student_probs, data.teacher_probs)
    monkeypatch.setattr(analysis, "CHUNK", 64)
    assert analysis.mean_kl(data.student_probs, data.teacher_probs) == pytest.approx(whole, rel=1e-6)


def test_calibration_error_by_hand():
    found = analysis.answers(np.array([[0.95, 0.05], [0.95, 0.05], [0.65, 0.35], [0.65, 0.35]]), np.array([0, 1, 0, 0]))
    bins = analysis.reliability(found, bins=10)
    assert bins.counts[9] == 2 and bins.counts[6] == 2
    assert bins.ece == pytest.approx(0.5 * (95 - 50) + 0.5 * (100 - 65), abs=1e-4)


def test_confidence_of_one_falls_into_the_last_bin():
    bins = analysis.reliability(analysis.answers(np.eye(3, dtype=np.float32), np.arange(3)))
    assert bins.counts[-1] == 3 and bins.ece == 0.0


def test_confident_errors():
    assert analysis.confident_errors(analysis.answers(PROBS, TARGETS), 2) == [1, 3]


def test_paired_difference_of_equal_networks_is_nothing():
    data = evaluation(200)
    found = analysis.answers(data.student_probs, data.targets)
    same = analysis.paired_difference(found, found)
    assert (same.points, same.low, same.high) == (0.0, 0.0, 0.0)
    other = analysis.paired_difference(analysis.answers(data.teacher_probs, data.targets), found)
    assert other.low < other.points < other.high and other.points > 0
    few = analysis.answers(PROBS, TARGETS)
    assert analysis.paired_difference(few, few) is None
