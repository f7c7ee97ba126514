"""The accuracy that exports are held to: top-1 of images, mIoU of maps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from visionkd.export.accuracy import Labels, Masks, score, truth_of
from visionkd.tasks.segmentation import SegmentationTask
from visionkd.types import Output


def maps_and_logits(sizes: list[tuple[int, int]], classes: int = 4) -> tuple[list[np.ndarray], np.ndarray]:
    random = np.random.default_rng(0)
    maps = [random.integers(0, classes, size).astype(np.uint8) for size in sizes]
    maps[0][:3] = 255
    return maps, random.normal(size=(len(sizes), classes, 6, 9)).astype(np.float32)


def test_miou_is_that_of_the_task() -> None:
    maps, logits = maps_and_logits([(11, 13), (24, 20), (6, 9)])
    task = SegmentationTask(num_classes=4)
    metrics = task.metrics()
    task.update(metrics, Output(logits=torch.from_numpy(logits)), [torch.from_numpy(each) for each in maps])
    found = score(Masks(maps, 4), np.split(logits, [2]))
    assert found == pytest.approx(100.0 * float(metrics.compute()["miou"]), abs=1e-4) and 5.0 < found < 60.0


def test_miou_by_hand() -> None:
    logits = np.zeros((1, 3, 2, 2), np.float32)
    logits[0, 1, 0, 0] = logits[0, 0, 0, 1] = logits[0, 2, 1, 0] = logits[0, 0, 1, 1] = 1.0  # 1 0 / 2 0
    maps = [np.array([[1, 1], [255, 0]], np.uint8)]
    # class 0: one of two; class 1: one of two; class 2 is answered only where there is no label
    assert score(Masks(maps, 3), [logits]) == pytest.approx(50.0)
    with pytest.raises(ValueError, match="1 answers for 2 maps"):
        score(Masks(maps * 2, 3), [logits])


def test_top1_of_batches() -> None:
    logits = np.eye(4, dtype=np.float32)
    assert score(Labels(np.array([0, 1, 0, 0])), [logits[:3], logits[3:]]) == 50.0


def test_classes_are_counted_as_the_network_counts_them() -> None:
    labels = truth_of(np.array([0, 1, 1]), columns=[3, 2], num_classes=5)
    assert isinstance(labels, Labels) and labels.targets.tolist() == [3, 2, 2] and labels.metric == "top1"
    masks = truth_of([np.array([[0, 1, 255]], np.uint8)], columns=[3, 2], num_classes=5)
    assert isinstance(masks, Masks) and masks.maps[0].tolist() == [[3, 2, 255]] and masks.num_classes == 5
    plain = truth_of([np.array([[0, 1, 255]], np.uint8)], columns=None, num_classes=5)
    assert isinstance(plain, Masks) and plain.maps[0].tolist() == [[0, 1, 255]] and plain.metric == "miou"
