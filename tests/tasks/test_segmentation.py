"""Loss and metrics of segmentation, and the three ways to look at a picture."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from visionkd.config.schema import AugmentConfig, TrainConfig
from visionkd.errors import RequestError
from visionkd.runtime.metrics import pixel_confusion, segmentation_metrics
from visionkd.tasks.make import task_of
from visionkd.tasks.segmentation import SegmentationTask, segment
from visionkd.types import IGNORE, DataSet, InputSpec, Output


def example(batch: int = 4, classes: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, classes, 6, 8, generator=generator)
    target = torch.randint(0, classes, (batch, 24, 32), generator=generator).byte()
    target[torch.rand(target.shape, generator=generator) < 0.2] = IGNORE
    return logits, target


def up(logits: torch.Tensor, size: tuple[int, int] = (24, 32)) -> torch.Tensor:
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def test_loss_is_the_mean_over_labelled_pixels() -> None:
    logits, target = example()
    task = SegmentationTask(num_classes=5)
    wanted = F.cross_entropy(up(logits), target.long(), ignore_index=IGNORE)
    assert torch.allclose(task.loss(Output(logits=logits), target), wanted, atol=1e-6)


def test_auxiliary_heads_count_with_their_weight() -> None:
    logits, target = example()
    aux = example(seed=1)[0]
    task = SegmentationTask(num_classes=5, aux_weight=0.3)
    own, other = (task.loss(Output(logits=each), target) for each in (logits, aux))
    assert torch.allclose(task.loss(Output(logits=logits, aux=(aux, aux)), target), own + 0.6 * other, atol=1e-6)


def test_loss_of_a_batch_without_labels_is_zero() -> None:
    logits, target = example()
    logits.requires_grad_()
    loss = SegmentationTask(num_classes=5).loss(Output(logits=logits), torch.full_like(target, IGNORE))
    loss.backward()
    assert loss == 0 and logits.grad is not None and not logits.grad.any()


def test_loss_of_maps_of_several_sizes() -> None:
    logits, target = example()
    maps = [target[0], target[1, :20, :30], target[2, :20, :30], target[3]]
    sums = [F.cross_entropy(up(one[None], tuple(each.shape)), each[None].long(), ignore_index=IGNORE, reduction="sum")
            for one, each in zip(logits, maps, strict=True)]  # fmt: skip
    count = sum(int((each != IGNORE).sum()) for each in maps)
    found = SegmentationTask(num_classes=5).loss(Output(logits=logits), maps)
    assert torch.allclose(found, sum(sums) / count, atol=1e-6)


def test_half_precision_is_summed_in_float32() -> None:
    logits, target = example()
    loss = SegmentationTask(num_classes=5).loss(Output(logits=logits.bfloat16()), target)
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("listed", [False, True])
def test_metrics_are_those_of_the_whole_split(listed: bool) -> None:
    task = SegmentationTask(num_classes=5)
    metrics = task.metrics()
    confusion = np.zeros((5, 5), np.int64)
    for seed in range(3):
        logits, target = example(seed=seed)
        maps = [target[0], target[1, :20, :30], target[2, :17], target[3, :17]] if listed else target
        task.update(metrics, Output(logits=logits), maps)
        for one, each in zip(logits, maps, strict=True):
            answer = up(one[None], tuple(each.shape))[0].argmax(0)
            confusion += pixel_confusion(answer.numpy(), each.numpy(), 5)
    found = metrics.compute()
    assert set(found) == {"miou", "pixel_acc"} and task.main_metric == "miou"
    assert {name: 100.0 * float(value) for name, value in found.items()} == pytest.approx(
        segmentation_metrics(confusion)
    )


def test_a_class_that_nobody_has_does_not_count() -> None:
    task = SegmentationTask(num_classes=3)
    metrics = task.metrics()
    target = torch.tensor([[[0, 0], [1, IGNORE]]], dtype=torch.uint8)
    logits = F.one_hot(torch.tensor([[[0, 1], [1, 2]]]), 3).permute(0, 3, 1, 2).float()
    task.update(metrics, Output(logits=logits), target)
    assert float(metrics.compute()["miou"]) == pytest.approx((1 / 2 + 1 / 2) / 2)
    assert float(metrics.compute()["pixel_acc"]) == pytest.approx(2 / 3)
    metrics.reset()
    task.update(metrics, Output(logits=logits[:0]), [])


def test_the_task_of_data_with_maps() -> None:
    data = DataSet("x", "segmentation", ("a", "b", "c"), {}, "")
    config = TrainConfig(model={"name": "x"}, segmentation={"aux_weight": 0.7, "evaluation": "slide"})
    task = task_of(data, config)
    assert isinstance(task, SegmentationTask) and (task.num_classes, task.aux_weight) == (3, 0.7)
    assert task.evaluation == "slide"
    config.augment = AugmentConfig(mixup_alpha=0.2, random_erasing=0.1)
    with pytest.raises(RequestError, match=r"(?s)augment.random_erasing.*augment.mixup_alpha"):
        task_of(data, config)


# One picture ----------------------------------------------------------------------------------------------------------


class Pixelwise(nn.Module):
    """Answers at a stride of 4 with what it sees, and remembers the sizes of what it was shown."""

    def __init__(self, img_size: tuple[int, int] = (32, 32)) -> None:
        super().__init__()
        self.input = InputSpec(img_size=img_size, mean=(0.25, 0.5, 0.75))
        self.seen: list[tuple[int, ...]] = []

    def forward(self, image: torch.Tensor) -> Output:
        self.seen.append(tuple(image.shape))
        return Output(logits=F.avg_pool2d(image, 4))


@pytest.mark.parametrize("mode", ["resize", "native", "slide"])
@pytest.mark.parametrize("size", [(32, 32), (45, 70), (20, 100), (90, 33)])
def test_logits_have_the_size_of_the_picture(mode: str, size: tuple[int, int]) -> None:
    ramp = torch.linspace(0, 1, size[1]).expand(3, *size).contiguous()
    found = segment(Pixelwise(), ramp, mode=mode)
    assert found.shape == (3, *size)
    middle = found[0, 8 : max(9, size[0] - 8), 8 : size[1] - 8]
    assert torch.allclose(middle, ramp[0, 8 : max(9, size[0] - 8), 8 : size[1] - 8], atol=0.09)


def test_windows_cover_the_picture_and_each_other() -> None:
    network = Pixelwise()
    segment(network, torch.rand(3, 80, 32), mode="slide", overlap=0.5, batch_size=2)
    assert sum(shape[0] for shape in network.seen) == 4 and {shape[1:] for shape in network.seen} == {(3, 32, 32)}
    assert max(shape[0] for shape in network.seen) == 2
    network = Pixelwise()
    segment(network, torch.rand(3, 64, 64), mode="slide", overlap=0.0)
    assert network.seen == [(4, 3, 32, 32)]


def test_windows_are_averaged_where_they_overlap() -> None:
    class Counted(Pixelwise):
        def forward(self, image: torch.Tensor) -> Output:
            return Output(logits=torch.arange(1.0, len(image) + 1)[:, None, None, None].expand(-1, 1, 8, 8))

    found = segment(Counted(), torch.rand(3, 48, 32), mode="slide", overlap=0.5)
    assert found[0, :, 0].tolist() == [1.0] * 16 + [1.5] * 16 + [2.0] * 16


def test_what_is_put_around_a_picture_is_its_mean_colour() -> None:
    shown: list[torch.Tensor] = []

    def network(image: torch.Tensor) -> Output:
        shown.append(image)
        return Output(logits=image[:, :2])

    given = SimpleNamespace(input=InputSpec(img_size=(32, 32), mean=(0.25, 0.5, 0.75)))
    wrapped = type("Wrapped", (), {"input": given.input, "__call__": staticmethod(network)})()
    segment(wrapped, torch.zeros(4, 30, 32), mode="native")
    assert shown[0].shape == (1, 4, 32, 32) and shown[0][0, :, 31, 0].tolist() == [0.25, 0.5, 0.75, 0.0]


def test_validation_looks_in_the_way_of_the_settings() -> None:
    image = torch.rand(1, 3, 45, 70)
    task = SegmentationTask(num_classes=3, evaluation="slide", slide_overlap=0.25)
    answer = task.answer(Pixelwise(), image)
    assert torch.equal(answer.logits[0], segment(Pixelwise(), image[0], mode="slide", overlap=0.25))
    assert SegmentationTask(num_classes=3).answer(Pixelwise(), image).logits.shape == (1, 3, 11, 17)
