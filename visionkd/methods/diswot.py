"""DisWOT's two distances as losses beside knowledge distillation.

    L = task_loss_weight * CE(y, s) + kd_loss_weight * T^2 KL(t || s)
        + relation_loss_weight * d_rel + semantic_loss_weight * d_sem

Both distances compare the deepest maps before pooling (:mod:`visionkd.losses.diswot`): ``d_rel`` how the samples of the
batch relate, ``d_sem`` how the channels do. Several teachers count equally.

Dong, Li and Wei, "DisWOT: Student Architecture Search for Distillation WithOut Training", CVPR 2023, arXiv 2303.15678.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from visionkd.config.schema import RunConfig
from visionkd.errors import Problem, RequestError
from visionkd.losses.distillation import kd_loss
from visionkd.losses.diswot import relation_distance, semantic_distance
from visionkd.methods._base import DistillationModule
from visionkd.models.features import stages
from visionkd.models.network import Network
from visionkd.types import Output

NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


@dataclass(frozen=True)
class DisWOTOptions:
    """Options of ``diswot``.

    Attributes:
        temperature: ``T`` of the distillation term.
        task_loss_weight: Weight of the cross-entropy against the labels.
        kd_loss_weight: Weight of the distillation term.
        relation_loss_weight: Weight of the relation distance; 3000 is the released setting.
        semantic_loss_weight: Weight of the semantic distance, which wants equal widths; 0 leaves it out.
    """

    temperature: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 4.0
    task_loss_weight: NonNegative = 0.1
    kd_loss_weight: NonNegative = 0.9
    relation_loss_weight: NonNegative = 3000.0
    semantic_loss_weight: NonNegative = 1.0

    def __post_init__(self) -> None:
        if not any((self.kd_loss_weight, self.relation_loss_weight, self.semantic_loss_weight)):
            raise ValueError("kd_, relation_ and semantic_loss_weight are all 0: the teacher would teach nothing")


class DisWOT(DistillationModule):
    """Relations of samples and of channels on the deepest maps, beside soft labels."""

    needs = frozenset({"probabilities", "features"})
    Options: ClassVar[type] = DisWOTOptions
    options: DisWOTOptions

    def student_stages(self) -> Sequence[int]:
        return (-1,)

    def teacher_stages(self) -> Sequence[int]:
        return (-1,)

    @classmethod
    def label_temperature(cls, options: DisWOTOptions) -> float:
        return options.temperature

    def distill_loss(self, *, student: Output, teachers: tuple[Output, ...], target: Tensor) -> Mapping[str, Tensor]:
        assert student.logits is not None
        own, maps = student.features[-1], [teacher.features[-1] for teacher in teachers]
        terms = {}
        # a weight of 0 leaves the work out: every term costs a pass over the maps
        if self.options.kd_loss_weight:
            terms["kd_loss"] = kd_loss(
                student_logits=student.logits,
                teacher_probs=self.soft_label(teachers),
                temperature=self.options.temperature,
            )
        if self.options.relation_loss_weight:
            terms["relation_loss"] = _mean([relation_distance(student_map=own, teacher_map=each) for each in maps])
        if self.options.semantic_loss_weight:
            terms["semantic_loss"] = _mean([semantic_distance(student_map=own, teacher_map=each) for each in maps])
        return terms

    def loss_weights(self) -> Mapping[str, float]:
        names = ("task_loss", "kd_loss", "relation_loss", "semantic_loss")
        return {name: getattr(self.options, f"{name}_weight") for name in names}

    @classmethod
    def check(
        cls, *, student: Network, teachers: Sequence[Network], config: RunConfig, options: DisWOTOptions
    ) -> list[Problem]:
        problems, widths = [], []
        for key, network in [("student", student), *((f"teachers.{n}", each) for n, each in enumerate(teachers))]:
            try:
                widths.append(stages(network)[-1].channels)
            except RequestError as error:
                problems.append(Problem(f"{key}.name", error.message, error.hint))
        if problems or not options.semantic_loss_weight or len(set(widths)) == 1:
            return problems
        of_teachers = ", ".join(map(str, widths[1:]))
        text = (
            "compares channels one by one:"
            f" the deepest map has {widths[0]} in the student, {of_teachers} in the teacher"
        )
        hint = "Take networks of one width, or leave this term out: -o options.semantic_loss_weight=0"
        return [Problem("options.semantic_loss_weight", text, hint)]


def _mean(losses: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(losses)).mean()


METHOD = DisWOT
