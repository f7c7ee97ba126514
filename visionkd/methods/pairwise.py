"""Pair-wise distillation: how alike any two places of an image look in the deepest features, to student and teacher.

    L = task_loss + weight * mean_{i, j} (A_S[i, j] - A_T[i, j])^2,      A[i, j] = cosine of the features at i and j

on features that are pooled first, so that places are parts of the image; the channels need not agree.

Liu, Chen, Liu, Qin, Luo and Wang, "Structured Knowledge Distillation for Semantic Segmentation", CVPR 2019.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from visionkd.config.schema import NonNegative
from visionkd.losses.pairwise import pairwise_loss
from visionkd.methods._base import DistillationModule
from visionkd.methods._dense import sized
from visionkd.types import Output


@dataclass(frozen=True)
class PairwiseOptions:
    """Options of ``pairwise``.

    Attributes:
        weight: Weight of the term. It is small by nature, since cosines lie within 1.
        scale: Side of a place as a share of the map's side; 0.5 compares the four quarters of an image.
        task_loss_weight: Weight of the loss against the labels.
        stage: Which features, for the student and the teacher alike; -1 is the deepest stage.
        detach_norm: Take the lengths of the student's features as constants, as the authors do.
    """

    weight: NonNegative = 1.0
    scale: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    task_loss_weight: NonNegative = 1.0
    stage: int = -1
    detach_norm: bool = True


class Pairwise(DistillationModule):
    """Similarities of places; several teachers count as the mean of their terms."""

    tasks: ClassVar[frozenset[str]] = frozenset({"segmentation"})
    needs: ClassVar[frozenset[str]] = frozenset({"features"})
    Options: ClassVar[type] = PairwiseOptions
    options: PairwiseOptions

    def student_stages(self) -> Sequence[int]:
        return (self.options.stage,)

    def teacher_stages(self) -> Sequence[int]:
        return (self.options.stage,)

    def distill_loss(self, *, student: Output, teachers: tuple[Output, ...], target: Tensor) -> Mapping[str, Tensor]:
        own = student.features[0]
        losses = [
            pairwise_loss(
                student_map=own, teacher_map=sized(teacher.features[0], own.shape[2:]), scale=self.options.scale,
                detach_norm=self.options.detach_norm,
            )
            for teacher in teachers
        ]  # fmt: skip
        return {"pairwise_loss": torch.stack(losses).mean()}

    def loss_weights(self) -> Mapping[str, float]:
        return {"task_loss": self.options.task_loss_weight, "pairwise_loss": self.options.weight}


METHOD = Pairwise
