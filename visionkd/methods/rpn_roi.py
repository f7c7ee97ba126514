"""Logit distillation of two-stage detectors: what the teacher says of the anchors and proposals that the student takes.

    L = task_loss + rpn_weight * T^2 BCE(sigmoid(o_S / T), sigmoid(o_T / T))
                  + roi_weight * T^2 KL(softmax(z_T / T) || softmax(z_S / T))

The first is the mean over the anchors that the student's own loss samples, the second the mean over the proposals that
it samples, which the teacher pools from its own pyramid. Differences of box deltas can be added to both. No paper
defines it: it is the plain floor that other methods have to beat (:mod:`visionkd.losses.detection_kd`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from visionkd.config.schema import NonNegative, RunConfig
from visionkd.errors import Problem
from visionkd.losses.detection_kd import delta_loss, objectness_loss, proposal_class_loss
from visionkd.methods._base import DistillationModule
from visionkd.methods._detectors import teacher_problems, view_size
from visionkd.models.detection.steps import (
    DetectorOutput,
    TwoStage,
    is_two_stage,
    levels,
    look_at_anchors,
    look_at_boxes,
)
from visionkd.models.network import Network
from visionkd.types import Output

_LIKELY = 0.5  # objectness above which the teacher holds an anchor for an object


@dataclass(frozen=True)
class RPNRoIOptions:
    """Options of ``rpn_roi``.

    Attributes:
        temperature: ``T``; above 1 it softens the answers of both networks.
        rpn_weight: Weight of the anchors' objectness; 0 where the networks' anchors are not the same.
        roi_weight: Weight of the proposals' classes.
        rpn_box_weight: Weight of the distance of box deltas, over sampled anchors that the teacher holds for objects.
        roi_box_weight: Weight of the distance of box deltas, over proposals of objects, for the object's class.
        task_loss_weight: Weight of the detector's own losses.
    """

    temperature: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 1.0
    rpn_weight: NonNegative = 1.0
    roi_weight: NonNegative = 1.0
    rpn_box_weight: NonNegative = 0.0
    roi_box_weight: NonNegative = 0.0
    task_loss_weight: NonNegative = 1.0

    def __post_init__(self) -> None:
        if not (self.looks_at_anchors or self.looks_at_boxes):
            raise ValueError("all weights of rpn and roi are 0: nothing would be learned from the teacher")

    @property
    def looks_at_anchors(self) -> bool:
        return bool(self.rpn_weight or self.rpn_box_weight)

    @property
    def looks_at_boxes(self) -> bool:
        return bool(self.roi_weight or self.roi_box_weight)


class RPNRoI(DistillationModule):
    """The teacher answers for the student's own anchors and proposals, in eval mode and without gradient."""

    tasks: ClassVar[frozenset[str]] = frozenset({"detection"})
    needs: ClassVar[frozenset[str]] = frozenset({"features"})
    Options: ClassVar[type] = RPNRoIOptions
    options: RPNRoIOptions

    def __init__(self, *, student: Network, teachers: Sequence[Network] = (), **rest: Any) -> None:
        # the base asks for levels before it takes the teachers
        names = [tuple(level.name for level in levels(network)) for network in (student, *teachers)]
        self.__dict__["_names"] = names
        super().__init__(student=student, teachers=teachers, **rest)

    def student_stages(self) -> Sequence[int]:
        return (0,)  # any: the student's steps come with its maps

    def teacher_stages(self) -> Sequence[int]:
        return tuple(range(len(self._names[1])))

    def distill_loss(
        self, *, student: Output, teachers: tuple[Output, ...], target: Sequence[Mapping[str, Tensor]]
    ) -> Mapping[str, Tensor]:
        assert isinstance(student, DetectorOutput) and student.two_stage is not None
        maps = dict(zip(self._names[1], teachers[0].features, strict=True))
        terms: dict[str, Tensor] = {}
        if self.options.looks_at_anchors:
            terms.update(self._of_anchors(student.two_stage, maps))
        if self.options.looks_at_boxes:
            terms.update(self._of_boxes(student.two_stage, maps))
        weights = self.loss_weights()
        return {name: value for name, value in terms.items() if weights[name]}

    def _of_anchors(self, steps: TwoStage, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with self.frozen.answering(0, steps.objectness.device) as teacher:
            objectness, deltas = look_at_anchors(teacher, maps)
        sampled = steps.sampled_anchors
        theirs = objectness[sampled]
        return {
            "rpn_loss": objectness_loss(
                student_logits=steps.objectness[sampled], teacher_logits=theirs, temperature=self.options.temperature
            ),
            "rpn_box_loss": delta_loss(
                student_deltas=steps.anchor_deltas[sampled], teacher_deltas=deltas[sampled],
                chosen=theirs.float().sigmoid() > _LIKELY,
            ),
        }  # fmt: skip

    def _of_boxes(self, steps: TwoStage, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with self.frozen.answering(0, steps.class_logits.device) as teacher:
            logits, deltas = look_at_boxes(teacher, maps, steps.proposals, steps.image_sizes)
        return {
            "roi_loss": proposal_class_loss(
                student_logits=steps.class_logits, teacher_logits=logits, temperature=self.options.temperature
            ),
            "roi_box_loss": delta_loss(
                student_deltas=_of_class(steps.box_deltas, steps.labels),
                teacher_deltas=_of_class(deltas, steps.labels), chosen=steps.labels > 0,
            ),
        }  # fmt: skip

    def loss_weights(self) -> Mapping[str, float]:
        options = self.options
        return {
            "task_loss": options.task_loss_weight, "rpn_loss": options.rpn_weight, "roi_loss": options.roi_weight,
            "rpn_box_loss": options.rpn_box_weight, "roi_box_loss": options.roi_box_weight,
        }  # fmt: skip

    @classmethod
    def check(
        cls, *, student: Network, teachers: Sequence[Network], config: RunConfig, options: RPNRoIOptions
    ) -> list[Problem]:
        if student.task != "detection":
            return []  # the task is refused as a whole
        if problems := teacher_problems("rpn_roi", teachers):
            return problems
        for key, network in (("--student", student), ("--teacher", teachers[0])):
            if not is_two_stage(network):
                what = "takes texts for classes" if getattr(network, "two_stage", False) else "has one stage"
                text = f"'{network.architecture}' {what}, and rpn_roi compares what two stages say of fixed classes"
                hint = "Take fasterrcnn_BACKBONE, or --method fgd, which takes any detectors."
                problems.append(Problem(key, text, hint))
        if problems or not options.looks_at_anchors:
            return problems
        if _anchors(student, teachers) != _anchors(teachers[0], [student]):
            text = f"the anchors of '{teachers[0].architecture}' are not those of '{student.architecture}'"
            hint = "Build both with the same anchor_scale and min_stride, or compare the second stage alone:"
            hint += " -o options.rpn_weight=0 -o options.rpn_box_weight=0"
            return [Problem("options.rpn_weight", text, hint)]
        return []


def _of_class(deltas: Tensor, labels: Tensor) -> Tensor:
    """Return of N x 4 (K + 1) deltas those of each box's class, N x 4."""
    return deltas.unflatten(1, (-1, 4))[torch.arange(len(labels), device=labels.device), labels]


def _anchors(network: Network, others: Sequence[Network]) -> Any:
    """Return what decides where a detector's anchors lie, for images of the size that all of the networks see."""
    generator: Any = network.net.rpn.anchor_generator
    grids = [level.grid for level in levels(network, view_size(network, *others))]
    return generator.sizes, generator.aspect_ratios, grids


METHOD = RPNRoI
