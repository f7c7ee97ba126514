from __future__ import annotations

import math

import numpy as np
import pytest

from visionkd.runtime.metrics import (
    classification_metrics,
    confusion_matrix,
    expected_calibration_error,
    negative_log_likelihood,
    per_class_accuracy,
    softmax,
    top_k_accuracy,
)

PROBS = np.array([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.5, 0.4, 0.1], [0.2, 0.3, 0.5]])
TARGETS = np.array([0, 1, 1, 0])


def test_accuracy_is_in_percent() -> None:
    assert top_k_accuracy(PROBS, TARGETS, 1) == 50.0
    assert top_k_accuracy(PROBS, TARGETS, 2) == 75.0
    assert top_k_accuracy(PROBS, TARGETS, 3) == 100.0


def test_a_constant_answer_is_not_right_for_every_class() -> None:
    assert top_k_accuracy(np.zeros((4, 3)), np.array([0, 1, 2, 2]), 1) == 25.0
    assert top_k_accuracy(np.full((4, 3), np.nan), np.array([0, 1, 2, 2]), 1) == 0.0


def test_confusion_and_classes() -> None:
    matrix = confusion_matrix(PROBS, TARGETS)
    assert matrix.tolist() == [[1, 0, 1], [1, 1, 0], [0, 0, 0]], "rows are targets"
    accuracy = per_class_accuracy(PROBS, TARGETS)
    assert accuracy[:2].tolist() == [50.0, 50.0] and math.isnan(accuracy[2])


def test_calibration_by_hand() -> None:
    # Bins of width 0.5: confidences 0.7, 0.6 in the upper one (both right), 0.5, 0.5 in the lower one (both wrong).
    assert expected_calibration_error(PROBS, TARGETS, num_bins=2) == pytest.approx(100 * (0.7 + 1.0) / 4)
    sure = np.eye(3)[[0, 1, 2]]
    assert expected_calibration_error(sure, np.array([0, 1, 2])) == 0.0
    assert expected_calibration_error(sure, np.array([1, 2, 0])) == 100.0


def test_nll_by_hand() -> None:
    expected = -np.mean(np.log([0.7, 0.6, 0.4, 0.2]))
    assert negative_log_likelihood(PROBS, TARGETS) == pytest.approx(expected)
    assert math.isfinite(negative_log_likelihood(np.eye(2), np.array([1, 0])))


def test_softmax_survives_large_logits() -> None:
    np.testing.assert_allclose(
        softmax(np.array([[1000.0, 1000.0], [0.0, np.log(3.0)]])), [[0.5, 0.5], [0.25, 0.75]], rtol=1e-6
    )


def test_top5_only_above_five_classes() -> None:
    assert set(classification_metrics(PROBS, TARGETS)) == {"top1", "ece", "nll"}
    wide = np.random.default_rng(0).dirichlet(np.ones(8), 20)
    assert (
        classification_metrics(wide, np.arange(20) % 8)["top5"]
        >= classification_metrics(wide, np.arange(20) % 8)["top1"]
    )


@pytest.mark.parametrize(
    ("scores", "targets"),
    [(np.zeros((2, 3)), [0]), (np.zeros((0, 3)), []), (np.zeros(3), [0]), (np.zeros((1, 3)), [3])],
)
def test_shapes_that_do_not_fit(scores: np.ndarray, targets: list[int]) -> None:
    with pytest.raises(ValueError):
        classification_metrics(scores, np.array(targets, dtype=int))
