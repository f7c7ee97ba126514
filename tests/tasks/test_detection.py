"""Loss and metrics of detection, also of two processes, and which settings are refused."""

from __future__ import annotations

import os

import pytest
import torch
import torch.multiprocessing as multiprocessing

from tests.runtime.test_box_metrics import example
from visionkd.config.schema import TrainConfig
from visionkd.errors import RequestError
from visionkd.runtime.box_metrics import average_precision, box_set
from visionkd.tasks.detection import DetectionTask, in_picture
from visionkd.tasks.make import task_of
from visionkd.types import DataSet, Detections, Output


def batch(found: list[dict], truth: list[dict], scale: float = 1.0) -> tuple[Output, list[dict]]:
    """What a network answers about letterboxed images, and what the loader gives beside them."""
    boxes = tuple(
        Detections(torch.tensor(each["boxes"] * scale), torch.tensor(each["scores"]), torch.tensor(each["labels"]))
        for each in found
    )
    target = [
        {**{name: torch.tensor(value) for name, value in each.items()}, "scale": torch.tensor(scale).double(),
         "size": torch.tensor([200, 200])}
        for each in truth
    ]  # fmt: skip
    return Output(boxes=boxes), target


def test_the_loss_is_the_sum_of_the_detectors_own() -> None:
    task = DetectionTask(num_classes=3)
    losses = {"a": torch.tensor(1.5, requires_grad=True), "b": torch.tensor(2.0, dtype=torch.bfloat16)}
    loss = task.loss(Output(losses=losses), None)
    loss.backward()
    assert float(loss) == 3.5 and losses["a"].grad == 1 and loss.dtype == torch.float32
    with pytest.raises(ValueError, match="no losses in eval mode"):
        task.loss(Output(), None)


@pytest.mark.parametrize("scale", [1.0, 0.37])
def test_metrics_are_those_of_the_whole_split(scale: float) -> None:
    found, truth = example(0)
    for each in (*found, *truth):
        each["boxes"] = each["boxes"].clip(0, 200)
    task = DetectionTask(num_classes=5, novel=(1,))
    metrics = task.metrics()
    for start in range(0, len(found), 7):
        task.update(metrics, *batch(found[start : start + 7], truth[start : start + 7], scale))
    measured = {name: 100.0 * float(value) for name, value in metrics.compute().items()}
    wanted = average_precision(box_set(found), box_set(truth), num_classes=5).metrics(novel=(1,))
    assert task.main_metric == "ap" and measured == pytest.approx(wanted, abs=0.3 if scale != 1 else 1e-4)
    assert set(measured) == {"ap", "ap50", "ap75", "ap50_base", "ap50_novel"}
    metrics.reset()
    task.update(metrics, *batch(found[:1], truth[:1]))
    assert set(metrics.compute()) == set(measured)


def test_boxes_come_back_to_the_picture() -> None:
    found = Detections(
        torch.tensor([[-3.0, 2.0, 20.0, 30.0], [5.0, 5.0, 60.0, 60.0], [45.0, 5.0, 60.0, 20.0]]),
        torch.tensor([0.9, 0.8, 0.7]), torch.tensor([1, 0, 2]),
    )  # fmt: skip
    back = in_picture(found, {"scale": torch.tensor(0.5), "size": torch.tensor([100, 80])})
    assert back.boxes.tolist() == [[0, 4, 40, 60], [10, 10, 80, 100]] and back.labels.tolist() == [1, 0]
    assert back.scores.tolist() == pytest.approx([0.9, 0.8]), "what lies beside the picture is nothing"


def _measure(rank: int, directory: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=3)
    found, truth = example(1)
    share = [slice(0, 20), slice(20, 30), slice(0, 0)][rank]  # the last one has nothing to look at
    task = DetectionTask(num_classes=5)
    metrics = task.metrics()
    if found[share]:
        task.update(metrics, *batch(found[share], truth[share]))
    torch.save({name: float(value) for name, value in metrics.compute().items()}, f"{directory}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_processes_measure_together(tmp_path) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    multiprocessing.spawn(_measure, args=(str(tmp_path),), nprocs=3)
    found, truth = example(1)
    for each in found:
        each["boxes"] = each["boxes"].clip(0, 200)
    wanted = average_precision(box_set(found), box_set(truth), num_classes=5).metrics()
    for rank in range(3):
        measured = torch.load(tmp_path / f"{rank}.pt")
        assert {name: 100.0 * value for name, value in measured.items()} == pytest.approx(wanted, abs=1e-4)


def test_the_task_of_data_with_boxes() -> None:
    data = DataSet("x", "detection", ("a", "b", "c"), {}, "", novel=("c",))
    task = task_of(data, TrainConfig(model={"name": "x"}))
    assert isinstance(task, DetectionTask) and (task.num_classes, task.novel) == (3, (2,))
    config = TrainConfig(
        model={"name": "x"}, augment={"mixup_alpha": 0.2, "randaugment_ops": 2}, training={"label_smoothing": 0.1}
    )
    with pytest.raises(RequestError, match=r"(?s)augment.randaugment_ops.*augment.mixup_alpha.*label_smoothing"):
        task_of(data, config)
