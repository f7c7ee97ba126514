"""HARD: distillation on images that a learned augmentation makes hard for the student and leaves easy for the teacher.

    student's turn:    minimise over theta   (1 - share) * D(t(x), s(x)) + share * D(t(x'), s(x'))
    augmentor's turn:  minimise over phi     -lambda_s * D(t(x'), s(x')) + lambda_t * D(t(x), t(x'))

with ``D(u, v) = T^2 * KL(softmax(u / T) || softmax(v / T))`` and ``x' = a(x; phi, noise)``. The game is in
:mod:`._learned_augmentation`, which ``augment.learned: hard`` puts around other methods; its settings are
``augment.hard``.

Nix, Burg and Sinz, "HARD: Hard Augmentations for Robust Distillation", 2023, arXiv 2305.14890. No code was published;
docs/methods/hard.md says what is reconstructed and what is this project's choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor

from visionkd.config.schema import RunConfig
from visionkd.errors import Problem
from visionkd.losses.distillation import kd_loss
from visionkd.methods._base import DistillationModule
from visionkd.methods._learned_augmentation import LearnedAugmentation
from visionkd.models.network import Network
from visionkd.types import Output


@dataclass(frozen=True)
class HardOptions:
    """Options of ``hard``; those of the augmentor and of the turns are ``augment.hard``.

    Attributes:
        temperature: ``T`` of both players' divergences.
        task_loss_weight: Weight of the cross-entropy against the labels, on clean images; 0 uses no labels.
    """

    temperature: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 1.0
    task_loss_weight: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 0.0


class Divergence(DistillationModule):
    """The student's side: the divergence from the teachers, and the labels where they are asked for."""

    uses_labels: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"probabilities", "gradients"})
    Options: ClassVar[type] = HardOptions
    options: HardOptions

    @classmethod
    def label_temperature(cls, options: HardOptions) -> float:
        return options.temperature

    def distill_loss(self, *, student: Output, teachers: tuple[Output, ...], target: Tensor) -> Mapping[str, Tensor]:
        probs, temperature = self.soft_label(teachers), self.options.temperature
        return {"kd_loss": kd_loss(student_logits=student.logits, teacher_probs=probs, temperature=temperature)}

    def loss_weights(self) -> Mapping[str, float]:
        return {"task_loss": self.options.task_loss_weight, "kd_loss": 1.0}

    @classmethod
    def check(cls, *, student: Network, teachers: Sequence[Network], config: RunConfig, options: Any) -> list[Problem]:
        problems = super().check(student=student, teachers=teachers, config=config, options=options)
        if options.task_loss_weight and config.data.unlabeled is not None:
            message = "is above 0, and the images of data.unlabeled have no labels"
            problems.append(Problem("options.task_loss_weight", message, "Set it to 0, or leave data.unlabeled out."))
        return problems


class Hard(LearnedAugmentation, Divergence):
    """The divergence with the game around it; several teachers' probabilities are averaged."""


METHOD = Hard
