"""What is kept of the answers of segmentation networks."""

from __future__ import annotations

import numpy as np
import pytest

from visionkd.runtime.metrics import pixel_confusion, segmentation_metrics
from visionkd.workflows._pixel_counts import Evaluations, PixelCount, load
from visionkd.workflows._segmentation import some, worst_and_best
from visionkd.workflows._tasks import work_of


def counted(seed: int, *, images: int = 4, right: float = 0.5):
    """Answers of which this share is right, to maps with unlabelled pixels."""
    rng, count, confusion = np.random.default_rng(seed), PixelCount(3), np.zeros((3, 3), np.int64)
    for _ in range(images):
        label = rng.choice([0, 1, 2, 255], size=(9, 8)).astype(np.uint8)
        given = np.where(rng.random(label.shape) < right, label, rng.integers(0, 3, label.shape)).astype(np.uint8)
        given[given == 255] = 0
        count.add(given, label)
        confusion += pixel_confusion(given, label, 3)
    return count.answers(np.arange(images), ()), confusion


def evaluations(**right: float) -> Evaluations:
    answers = {role: counted(0, right=share)[0] for role, share in right.items()}
    return Evaluations(
        confusion={role: found.confusion for role, found in answers.items()},
        intersection={role: found.intersection for role, found in answers.items()},
        union={role: found.union for role, found in answers.items()},
        indices=np.arange(4),
        names=("a", "b", "c", "ü"),
        pictured=(2, 0),
        labels=(np.zeros((2, 3), np.uint8), np.full((1, 4), 255, np.uint8)),
        maps={role: (np.ones((2, 3), np.uint8), np.zeros((1, 4), np.uint8)) for role in answers},
    )


def test_counts_of_images_add_up_to_those_of_all():
    found, confusion = counted(1)
    assert np.array_equal(found.confusion, confusion)
    assert found.metrics() == pytest.approx(segmentation_metrics(confusion))
    assert found.per_class() == pytest.approx(
        100 * np.diag(confusion) / (confusion.sum(0) + confusion.sum(1) - np.diag(confusion))
    )


def test_written_and_read(tmp_path):
    before = evaluations(student=0.5, baseline=0.2)
    before.save(tmp_path / "evaluation.npz")
    found = load(tmp_path / "evaluation.npz")
    assert found.names == before.names and found.pictured == (2, 0) and found.maps.keys() == before.maps.keys()
    assert found.metrics("baseline") == before.metrics("baseline") and np.array_equal(found.labels[1], before.labels[1])
    assert np.array_equal(found.confusion["student"], before.confusion["student"])


def test_the_best_of_several_teachers_stands_for_them():
    before = evaluations(student=0.5, teacher0=0.3, teacher1=0.9)
    found = before.joined(["teacher0", "teacher1"], np.array([10, 20, 30, 40]))
    assert found.metrics("teacher") == before.metrics("teacher1") and set(found.maps) == {"student", "teacher"}
    assert found.indices.tolist() == [10, 20, 30, 40]
    assert set(before.joined([], None).union) == {"student", "teacher0", "teacher1"}


@pytest.mark.parametrize(("images", "expected"), [(9, (8, 7, 6, 5, 0, 1)), (3, (2, 0, 1)), (1, (0,)), (0, ())])
def test_worst_and_best_images(images, expected):
    intersection = np.array([[100 - 10 * place, 50] for place in range(images)]).reshape(-1, 2)
    assert worst_and_best(intersection, np.full((images, 2), 100)) == expected


def test_an_image_without_labels_is_neither_good_nor_bad():
    union = np.array([[0, 0], [10, 10], [10, 10]])
    assert worst_and_best(np.array([[0, 0], [1, 1], [9, 9]]), union) == (1, 2)


def test_samples_are_spread_over_the_frames():
    assert some(range(100), 5, seed=0).tolist() == [0, 25, 50, 74, 99] and len(some(range(3), 9, seed=0)) == 3


def test_tasks_have_all_that_is_asked_of_them():
    from visionkd.workflows import _tasks

    wanted = {name for name in vars(_tasks.Work) if not name.startswith("_")} | set(_tasks.Work.__annotations__)
    for task in _tasks.TASKS:
        assert all(hasattr(work_of(task), name) for name in wanted)
    with pytest.raises(_tasks.RequestError, match="pose"):
        work_of("pose")
