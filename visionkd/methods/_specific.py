"""The specific stage of G2SD: the labels at the class token, the tuned teacher's answers at the distillation token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from visionkd.losses.masked import hard_label_loss, nkd_loss
from visionkd.methods._base import DistillationModule
from visionkd.models.distilled import keep_without_position
from visionkd.types import Output


class SpecificStage(DistillationModule):
    """Trains a student with two heads, or one with ``nkd``, from one teacher that is tuned for the task."""

    needs: ClassVar[frozenset[str]] = frozenset({"probabilities"})
    options: Any

    def __init__(self, **given: Any) -> None:
        from visionkd.methods.g2sd import specific_teacher, with_one_teacher  # which names this class

        super().__init__(**with_one_teacher(given, specific_teacher(given["teachers"])))
        if self.options.specific_loss == "hard":
            self.student.net.set_distilled_training(True)
            keep_without_position(self.student.net)

    def loss_terms(self, image: Tensor, target: Tensor, teacher_probs: Tensor | None = None) -> dict[str, Tensor]:
        (teacher,) = self.teacher_outputs(image)
        if self.options.specific_loss == "nkd":
            student = self.student_output(image)
            loss = nkd_loss(
                student_logits=student.logits, teacher_logits=teacher.logits, target=target,
                alpha=self.options.nkd_alpha, temperature=self.options.nkd_temperature,
            )  # fmt: skip
            return {"nkd_loss": loss}
        own, distilled = self.student.net(self.student.prepare(image))
        return {
            "task_loss": self.task.loss(Output(logits=own), target),
            "hard_label_loss": hard_label_loss(student_logits=distilled, teacher_logits=teacher.logits),
        }

    def loss_weights(self) -> Mapping[str, float]:
        if self.options.specific_loss == "nkd":
            return {"nkd_loss": 1.0}
        return {"task_loss": 0.5, "hard_label_loss": 0.5}

    @classmethod
    def can_store_labels(cls, options: Any) -> bool:
        return False
