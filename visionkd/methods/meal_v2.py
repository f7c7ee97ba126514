"""MEAL V2: an ensemble's averaged probabilities and a discriminator on the final outputs; no labels.

    p_T = mean_k softmax(z_k)
    L   = similarity_weight * CE(p_T, z_s) + discriminator_weight * BCE(D([z_s; m_T]), [student; teacher])

``D`` is three linear layers, each with a ReLU, the last one too: its loss never falls below ln 2 / 2, and is ln 2
without any gradient once all its outputs are 0. Student and discriminator minimise the same sum. ``m_T`` is the mean of
the teachers' logits; where a label store stands for the teachers, both sides are probabilities.

Shen and Savvides, "MEAL V2: Boosting Vanilla ResNet-50 to 80%+ Top-1 Accuracy on ImageNet without Tricks", 2020,
arXiv 2009.08453.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from visionkd.losses.distillation import soft_cross_entropy
from visionkd.methods._base import DistillationModule
from visionkd.models.network import Network
from visionkd.types import Output

NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


@dataclass(frozen=True)
class MEALV2Options:
    """Options of ``meal_v2``.

    Attributes:
        similarity_weight: Weight of the cross-entropy against the averaged probabilities.
        discriminator_weight: Weight of the discriminator's loss; 0 trains without one.
        discriminator_input: ``logits`` as in the paper's training, ``probabilities`` as in its variant with stored
            labels; ``auto`` takes probabilities where a label store stands for the teachers.
        discriminator_reduction: Each hidden layer is so many times narrower than the one before.
        discriminator_lr_ratio: The discriminator's share of the learning rate.
    """

    similarity_weight: NonNegative = 1.0
    discriminator_weight: NonNegative = 1.0
    discriminator_input: Literal["auto", "logits", "probabilities"] = "auto"
    discriminator_reduction: Annotated[int, Field(ge=2)] = 8
    discriminator_lr_ratio: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 1.0

    def __post_init__(self) -> None:
        if self.similarity_weight == 0:
            raise ValueError("similarity_weight is 0: the discriminator alone teaches nothing")


class Discriminator(nn.Sequential):
    """Tells a student's outputs from the teachers': C -> C // r -> C // r // r -> 2, a ReLU after each.

    Args:
        num_classes: C.
        reduction: r.
    """

    def __init__(self, num_classes: int, reduction: int = 8) -> None:
        first = max(1, num_classes // reduction)
        widths = (num_classes, first, max(1, first // reduction), 2)
        layers: list[nn.Module] = []
        for width, following in zip(widths, widths[1:], strict=False):
            layers += [nn.Linear(width, following), nn.ReLU()]
        super().__init__(*layers)


def discriminator_loss(discriminator: nn.Module, *, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return the discriminator's loss, and the share of its outputs that are 0 and have no gradient.

    Args:
        discriminator: From B x C to B x 2.
        student: Outputs of the student, B x C.
        teacher: Outputs of the teachers, B x C; detached.
    """
    outputs = discriminator(torch.cat([student.float(), teacher.detach().float()]))
    target = torch.zeros_like(outputs)
    target[: len(student), 0] = 1.0
    target[len(student) :, 1] = 1.0
    loss = F.binary_cross_entropy_with_logits(outputs, target)
    return loss, (outputs.detach() <= 0).float().mean()


class MEALV2(DistillationModule):
    """Similarity to the ensemble, and the discriminator as a regulariser."""

    uses_labels: ClassVar[bool] = False
    default_weight_decay: ClassVar[float | None] = 0.0
    Options: ClassVar[type] = MEALV2Options
    options: MEALV2Options

    def build_modules(self) -> nn.Module:
        if not self.options.discriminator_weight:
            return nn.ModuleDict()
        reduction = self.options.discriminator_reduction
        return nn.ModuleDict({"discriminator": Discriminator(self.student.num_classes, reduction)})

    @property
    def projector_lr_ratio(self) -> float:
        return self.options.discriminator_lr_ratio

    def distill_loss(self, *, student: Output, teachers: tuple[Output, ...], target: Tensor) -> Mapping[str, Tensor]:
        probs = self.soft_label(teachers)
        assert student.logits is not None
        terms = {"similarity_loss": soft_cross_entropy(student_logits=student.logits, teacher_probs=probs)}
        if self.options.discriminator_weight:
            sides = self._discriminated(student.logits, teachers, probs)
            loss, dead = discriminator_loss(self.projectors["discriminator"], **sides)
            terms |= {"discriminator_loss": loss, "discriminator_dead": dead}
        return terms

    def _discriminated(self, logits: Tensor, teachers: tuple[Output, ...], probs: Tensor) -> dict[str, Tensor]:
        stored = teachers[0].probs is not None
        kind = self.options.discriminator_input
        if kind == "probabilities" or (kind == "auto" and stored):
            return {"student": F.softmax(logits.float(), dim=1), "teacher": probs}
        # a probability of 0 has no logarithm; logits are known up to a constant, which softmax outputs do not show
        known = [probs.clamp(min=1e-12).log()] if stored else [t.logits.float() for t in teachers]
        return {"student": logits, "teacher": torch.stack(known).mean(0)}

    def loss_weights(self) -> Mapping[str, float]:
        return {
            "task_loss": 0.0,
            "similarity_loss": self.options.similarity_weight,
            "discriminator_loss": self.options.discriminator_weight,
            "discriminator_dead": 0.0,  # not a loss: the share of the discriminator's outputs that have died
        }

    @classmethod
    def warnings(cls, *, student: Network, teachers: Sequence[Network], config: Any, options: Any) -> list[str]:
        said = []
        if not student.trained:
            said.append(
                "MEAL V2 improves a student that is trained already, and this one starts from random weights:"
                " give a trained one, such as --student RUN, or leave --no-pretrained out"
            )
        reduction = options.discriminator_reduction
        if options.discriminator_weight and student.num_classes // reduction < 2 < reduction:
            said.append(
                f"MEAL V2's discriminator is {student.num_classes // reduction or 1} unit wide with"
                f" {student.num_classes} classes and tells nothing apart: -o options.discriminator_reduction=2"
            )
        return said


METHOD = MEALV2
