"""Knowledge distillation from the teacher's softened class probabilities.

    L = task_loss_weight * CE(y, s) + distill_loss_weight * T^2 * KL(softmax(z_t / T) || softmax(z_s / T))

With ``hard_labels`` the second term becomes DeiT's CE(argmax z_t, s), which has no temperature. The probabilities of
several teachers are averaged, which gives the gradient of the mean of their terms.

Maps of classes are distilled at every pixel of the logits, with T = 1 and both weights 1 unless they are given. Three
ways to reduce the pixels' divergences to one number are in use (:func:`visionkd.losses.pixel_kd.pixel_kd_loss`).

Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv 1503.02531.
Touvron et al., "Training data-efficient image transformers & distillation through attention", 2021, arXiv 2012.12877.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor

from visionkd.losses.distillation import hard_kd_loss, kd_loss
from visionkd.losses.pixel_kd import Reduction, pixel_kd_loss
from visionkd.methods._base import DistillationModule
from visionkd.methods._dense import labelled, of_one_size
from visionkd.types import Output

NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


@dataclass(frozen=True)
class KDOptions:
    """Options of ``kd``.

    Attributes:
        temperature: ``T`` of the equation.
        task_loss_weight: Weight of the cross-entropy against the labels; 0 learns from the teacher alone.
        distill_loss_weight: Weight of the distillation term.
        hard_labels: Learn the teacher's most probable class instead of its distribution.
        reduction: Of the pixels of a map: ``kl_batchmean``, ``kl_elementmean`` or ``pixel_ce``.
        labelled_only: Leave out the pixels that have no label, such as those that padding adds.
    """

    temperature: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 4.0
    task_loss_weight: NonNegative = 0.1
    distill_loss_weight: NonNegative = 0.9
    hard_labels: bool = False
    reduction: Reduction = "kl_batchmean"
    labelled_only: bool = False

    def __post_init__(self) -> None:
        if self.task_loss_weight == self.distill_loss_weight == 0:
            raise ValueError("task_loss_weight and distill_loss_weight are both 0: nothing would be learned")


class KD(DistillationModule):
    """Hinton's distillation; the probabilities of several teachers are averaged."""

    tasks: ClassVar[frozenset[str]] = frozenset({"classification", "segmentation"})
    task_defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "segmentation": {"temperature": 1.0, "task_loss_weight": 1.0, "distill_loss_weight": 1.0}
    }
    Options: ClassVar[type] = KDOptions
    options: KDOptions

    @classmethod
    def label_temperature(cls, options: KDOptions) -> float:
        return 1.0 if options.hard_labels else options.temperature

    def soft_label(self, teachers: tuple[Output, ...]) -> Tensor:
        first = teachers[0].logits
        several_maps = len(teachers) > 1 and first is not None and first.ndim == 4
        return super().soft_label(of_one_size(teachers, first.shape[2:]) if several_maps else teachers)

    def distill_loss(self, *, student: Output, teachers: tuple[Output, ...], target: Tensor) -> Mapping[str, Tensor]:
        assert student.logits is not None
        dense = student.logits.ndim == 4
        if dense:
            teachers = of_one_size(teachers, student.logits.shape[2:])
        given = {"student_logits": student.logits, "teacher_probs": self.soft_label(teachers)}
        if self.options.hard_labels:
            return {"kd_loss": hard_kd_loss(**given)}
        if dense:
            valid = labelled(target, student.logits.shape[2:]) if self.options.labelled_only else None
            options = {"temperature": self.options.temperature, "reduction": self.options.reduction, "valid": valid}
            return {"kd_loss": pixel_kd_loss(**given, **options)}
        return {"kd_loss": kd_loss(**given, temperature=self.options.temperature)}

    def loss_weights(self) -> Mapping[str, float]:
        return {"task_loss": self.options.task_loss_weight, "kd_loss": self.options.distill_loss_weight}


METHOD = KD
