"""CWD: each channel's distribution over the places of the image, instead of each place's over the channels.

    L = task_loss + weight * T^2 / (B C) sum_{b, c} KL(softmax_places(t / T) || softmax_places(s / T))

on the logits, or on the deepest features, where a convolution 1 x 1 brings the student to the teacher's channels.

Shu, Liu, Gao, Yan and Shen, "Channel-wise Knowledge Distillation for Dense Prediction", ICCV 2021, arXiv 2011.13256.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from visionkd.config.schema import NonNegative
from visionkd.losses.cwd import channel_wise_loss
from visionkd.methods._base import DistillationModule
from visionkd.methods._dense import sized
from visionkd.models.features import stages
from visionkd.models.network import Network
from visionkd.types import Output

_WEIGHTS = {"logits": 3.0, "features": 50.0}  # the authors'


@dataclass(frozen=True)
class CWDOptions:
    """Options of ``cwd``.

    Attributes:
        maps: ``logits``, which need the same classes and nothing else, or ``features``.
        temperature: ``T`` of the equation.
        weight: Weight of the distance; None takes 3 on logits and 50 on features.
        task_loss_weight: Weight of the loss against the labels.
        stage: Which features, for the student and the teacher alike; -1 is the deepest stage.
    """

    maps: Literal["logits", "features"] = "logits"
    temperature: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 4.0
    weight: NonNegative | None = None
    task_loss_weight: NonNegative = 1.0
    stage: int = -1


class CWD(DistillationModule):
    """Channel-wise distillation; several teachers count as the mean of their distances."""

    tasks: ClassVar[frozenset[str]] = frozenset({"segmentation"})
    needs: ClassVar[frozenset[str]] = frozenset({"features"})
    Options: ClassVar[type] = CWDOptions
    options: CWDOptions

    def __init__(self, *, student: Network, teachers: Sequence[Network] = (), **rest: Any) -> None:
        # the base makes the convolutions before it takes the teachers
        self.__dict__["_given"] = tuple(teachers)
        super().__init__(student=student, teachers=teachers, **rest)

    def build_modules(self) -> nn.Module:
        if self.options.maps == "logits":
            return nn.ModuleDict()
        own = stages(self.student)[self.options.stage].channels
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.config.training.seed)
            lifts = {
                f"lift{number}": nn.Conv2d(own, stages(teacher)[self.options.stage].channels, 1, bias=False)
                for number, teacher in enumerate(self._given)
            }
        device = next(self.student.parameters()).device
        return nn.ModuleDict(lifts).to(device=device, memory_format=self.memory_format)

    def student_stages(self) -> Sequence[int]:
        return () if self.options.maps == "logits" else (self.options.stage,)

    def teacher_stages(self) -> Sequence[int]:
        return self.student_stages()

    def distill_loss(self, *, student: Output, teachers: tuple[Output, ...], target: Tensor) -> Mapping[str, Tensor]:
        if self.options.maps == "logits":
            assert student.logits is not None
            pairs = [(student.logits, teacher.logits) for teacher in teachers]
        else:
            lifted = [lift(student.features[0]) for lift in self.projectors.values()]
            pairs = [(own, teacher.features[0]) for own, teacher in zip(lifted, teachers, strict=True)]
        losses = [
            channel_wise_loss(
                student_map=own, teacher_map=sized(other, own.shape[2:]), temperature=self.options.temperature
            )
            for own, other in pairs
        ]
        return {"cwd_loss": torch.stack(losses).mean()}

    def loss_weights(self) -> Mapping[str, float]:
        weight = _WEIGHTS[self.options.maps] if self.options.weight is None else self.options.weight
        return {"task_loss": self.options.task_loss_weight, "cwd_loss": weight}


METHOD = CWD
