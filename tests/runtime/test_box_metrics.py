"""Average precision: the numbers of torchmetrics, and cases that can be counted by hand."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from torchmetrics.detection import MeanAveragePrecision

from visionkd.runtime.box_metrics import IOUS, BoxPrecision, average_precision, box_set


def example(seed: int, images: int = 30, classes: int = 5) -> tuple[list[dict], list[dict]]:
    """True boxes, some of them crowds, and noisy copies with as many inventions; nothing is of class 3."""
    rng = np.random.default_rng(seed)

    def some(count: int) -> tuple[np.ndarray, np.ndarray]:
        corner, sides = rng.random((count, 2)) * 80, rng.random((count, 2)) * 40 + 4
        return np.concatenate([corner, corner + sides], 1).astype(np.float32), rng.integers(0, classes, count)

    truth, found = [], []
    scores_left = iter((rng.permutation(4096) / 4096).astype(np.float32))  # all different: ties are sorted anyhow
    for _ in range(images):
        boxes, labels = some(int(rng.integers(0, 6)))
        labels = np.where(labels == 3, 2, labels)
        truth.append({"boxes": boxes, "labels": labels, "crowd": rng.random(len(labels)) < 0.15})
        extra, more = some(len(labels) + 1)
        near = boxes + rng.normal(0, 2, boxes.shape).astype(np.float32)
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        all_labels = np.concatenate([labels, more])
        scores = np.array([next(scores_left) for _ in all_labels], np.float32)
        found.append({"boxes": np.concatenate([near, extra]), "labels": all_labels, "scores": scores})
    return found, truth


@pytest.mark.parametrize("seed", range(4))
def test_the_numbers_are_those_of_torchmetrics(seed: int) -> None:
    found, truth = example(seed)
    mine = average_precision(box_set(found), box_set(truth), num_classes=5)
    # its own thresholds are numbers of single precision, and a recall of 0.6 is then not reached by 3 of 5
    theirs = MeanAveragePrecision(
        backend="faster_coco_eval", class_metrics=True, iou_thresholds=IOUS.tolist(),
        rec_thresholds=np.linspace(0, 1, 101).tolist(),
    )  # fmt: skip
    theirs.update(
        [{name: torch.as_tensor(value) for name, value in each.items()} for each in found],
        [{"boxes": torch.as_tensor(each["boxes"]), "labels": torch.as_tensor(each["labels"]),
          "iscrowd": torch.as_tensor(each["crowd"])} for each in truth],
    )  # fmt: skip
    wanted = theirs.compute()
    metrics = mine.metrics()
    for name, other in (("ap", "map"), ("ap50", "map_50"), ("ap75", "map_75")):
        assert metrics[name] == pytest.approx(100.0 * float(wanted[other]), abs=1e-4)
    per_class = 100.0 * wanted["map_per_class"].numpy()
    assert np.allclose(np.nan_to_num(mine.per_class(), nan=-100.0), per_class, atol=1e-4)
    assert np.isnan(mine.per_class()[3]) and 5 < metrics["ap"] < 95


def one(box: list[float], label: int = 0, **more) -> dict:
    return {"boxes": np.array([box], np.float32), "labels": np.array([label]), **more}


def score(value: float) -> dict:
    return {"scores": np.array([value], np.float32)}


def crowd(value: bool) -> dict:
    return {"crowd": np.array([value])}


NOTHING = {"boxes": np.zeros((0, 4), np.float32), "labels": np.zeros(0, np.int64)}


def test_what_can_be_counted_by_hand() -> None:
    truth = box_set([one([0, 0, 10, 10]), one([0, 0, 10, 10]), NOTHING])
    right = average_precision(box_set([one([0, 0, 10, 10], **score(0.4))] * 2 + [NOTHING]), truth, num_classes=2)
    assert right.metrics() == {"ap": 100.0, "ap50": 100.0, "ap75": 100.0}
    # overlaps by 0.81 with the first: right up to 0.8, which are 7 of 10 thresholds; the second is not found
    half = average_precision(box_set([one([0, 0, 9, 9], **score(0.4)), NOTHING, NOTHING]), truth, num_classes=2)
    share = 51 / 101  # recalls of 0 to 0.5
    assert half.metrics()["ap50"] == pytest.approx(100 * share) and half.metrics()["ap"] == pytest.approx(70 * share)
    # a surer box on the picture without any halves the precision
    wrong = [one([0, 0, 10, 10], **score(0.4))] * 2 + [one([0, 0, 5, 5], **score(0.9))]
    assert average_precision(box_set(wrong), truth, num_classes=2).metrics()["ap"] == pytest.approx(100 * 2 / 3)
    less_sure = [one([0, 0, 10, 10], **score(0.4))] * 2 + [one([0, 0, 5, 5], **score(0.1))]
    assert average_precision(box_set(less_sure), truth, num_classes=2).metrics()["ap"] == 100.0


def test_a_crowd_counts_neither_way() -> None:
    truth = box_set([one([0, 0, 50, 50], **crowd(True)), one([0, 0, 10, 10], **crowd(False))])
    found = box_set([one([5, 5, 15, 15], **score(0.9)), one([0, 0, 10, 10], **score(0.5))])
    assert average_precision(found, truth, num_classes=1).metrics()["ap"] == 100.0


def test_classes_that_do_not_occur_and_nothing_at_all() -> None:
    truth = box_set([one([0, 0, 10, 10], 1)])
    nothing = average_precision(box_set([NOTHING]), truth, num_classes=3)
    assert nothing.metrics()["ap"] == 0.0 and np.isnan(nothing.per_class()).tolist() == [True, False, True]
    found = average_precision(box_set([one([0, 0, 10, 10], 1, **score(0.9))]), truth, num_classes=3)
    assert np.isnan(found.per_class()).tolist() == [True, False, True]
    unknown = average_precision(box_set([one([0, 0, 10, 10], 1, **score(0.9))]), box_set([NOTHING]), num_classes=3)
    assert np.isnan(unknown.metrics()["ap"]) and np.isnan(unknown.per_class()).all()
    with pytest.raises(ValueError, match="1 images were looked at, and 2 have boxes"):
        average_precision(box_set([NOTHING]), box_set([NOTHING] * 2), num_classes=1)


def test_base_and_novel_classes_apart() -> None:
    precision = np.zeros((len(IOUS), 101, 4))
    precision[:, :, 0], precision[:, :, 1], precision[:, :, 2], precision[:, :, 3] = 0.9, 0.5, 0.1, np.nan
    metrics = BoxPrecision(precision).metrics(novel=(2, 3))
    assert metrics["ap50_base"] == pytest.approx(70.0) and metrics["ap50_novel"] == pytest.approx(10.0)
    assert metrics["ap"] == pytest.approx(50.0) and "ap50_novel" not in BoxPrecision(precision).metrics()


def test_only_the_best_hundred_boxes_of_an_image_count() -> None:
    truth = box_set([one([0, 0, 10, 10])])
    many = {"boxes": np.tile(np.float32([[50, 50, 60, 60]]), (100, 1)), "labels": np.zeros(100, np.int64),
            "scores": np.linspace(0.5, 0.9, 100, dtype=np.float32)}  # fmt: skip
    last = {name: np.concatenate([values, one([0, 0, 10, 10], **score(0.1))[name]]) for name, values in many.items()}
    assert average_precision(box_set([last]), truth, num_classes=1).metrics()["ap"] == 0.0


def test_parts_of_a_set() -> None:
    found, _ = example(0, images=6)
    boxes = box_set(found)
    taken = boxes.taken([4, 1])
    assert len(taken) == 2 and np.array_equal(taken.boxes[taken.of(1)], found[1]["boxes"])
    assert np.array_equal(taken.scores[taken.of(0)], found[4]["scores"]) and len(boxes.taken([])) == 0
    assert boxes.images().tolist() == [n for n, each in enumerate(found) for _ in each["labels"]]


def test_it_needs_no_torch_and_says_what_is_missing() -> None:
    program = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', *sys.argv[1:]):\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "import numpy as np\n"
        "from visionkd.runtime.box_metrics import average_precision, box_set\n"
        "box = {'boxes': np.array([[0, 0, 9, 9]]), 'labels': np.array([0])}\n"
        "print(average_precision(box_set([box | {'scores': np.array([.5])}]), box_set([box]), num_classes=1).metrics())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and "'ap': 100.0" in done.stdout, done.stderr
    done = subprocess.run([sys.executable, "-c", program, "faster_coco_eval"], capture_output=True, text=True)
    assert done.returncode and "pip install faster-coco-eval" in done.stderr
