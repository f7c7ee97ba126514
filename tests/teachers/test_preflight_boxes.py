"""What is said about a detector before it teaches."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from visionkd.errors import WorkError
from visionkd.teachers.preflight_boxes import preflight_boxes
from visionkd.types import Detections, InputSpec, Output

BOX = torch.tensor([[2.0, 3.0, 20.0, 20.0]])


class Fixed(nn.Module):
    """Finds one box, the same one or another at each call."""

    def __init__(self, num_classes: int = 2, label: int = 0, step: float = 0.0, score: float = 0.9) -> None:
        super().__init__()
        self.num_classes, self.label, self.step, self.score, self.calls = num_classes, label, step, score, 0
        self.input = InputSpec(img_size=(32, 32))

    def forward(self, image: torch.Tensor) -> Output:
        self.calls += 1
        box = BOX + self.step * self.calls
        return Output(boxes=tuple(
            Detections(box, torch.tensor([self.score]), torch.tensor([self.label])) for _ in image
        ))  # fmt: skip


def batches(boxes: torch.Tensor = BOX):
    target = {"boxes": boxes, "labels": torch.zeros(len(boxes), dtype=torch.int64),
              "crowd": torch.zeros(len(boxes), dtype=torch.bool), "scale": torch.tensor(1.0).double(),
              "size": torch.tensor([32, 32])}  # fmt: skip
    return [(torch.zeros(3, 3, 32, 32), [target] * 3)] * 2


def look(network: nn.Module, given=None):
    return preflight_boxes(network, batches() if given is None else given, num_classes=2, device=torch.device("cpu"),
                           name="teacher")  # fmt: skip


def test_a_good_teacher() -> None:
    found = look(Fixed())
    assert found.num_images == 6 and found.top1 is None and {each.status for each in found.findings} == {"ok"}
    text = " ".join(each.text for each in found.findings)
    assert "32 x 32 pixels" in text and "1.0 boxes an image" in text and "AP50 100.0 % on 6 images" in text


def test_a_teacher_that_knows_other_classes() -> None:
    assert "finds next to nothing" in look(Fixed(label=1)).findings[-1].text
    assert look(Fixed(label=1)).findings[-1].status == "warning"
    assert "has 5 classes, the data 2" in look(Fixed(num_classes=5)).findings[-1].text
    assert "have no boxes" in look(Fixed(), batches(BOX[:0])).findings[-1].text


@pytest.mark.parametrize(("network", "message"), [
    (Fixed(step=0.5), "differently on each pass"), (Fixed(score=float("nan")), "NaN or infinite"),
])  # fmt: skip
def test_a_teacher_that_is_no_use(network: nn.Module, message: str) -> None:
    with pytest.raises(WorkError, match=message):
        look(network)
    with pytest.raises(WorkError, match="no images"):
        look(Fixed(), [])
