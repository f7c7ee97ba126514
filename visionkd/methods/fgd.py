"""FGD: focal and global distillation of a detector's pyramid, for closed sets of classes.

    L = task_loss + scale * (alpha L_foreground + beta L_background + gamma L_attention + lambda L_relation)

summed over the levels that both pyramids have. The focal terms weigh the squared difference of the maps by the
teacher's attention over places and channels, apart for cells inside and outside of true boxes; the attention term
compares both networks' attention; the relation term compares the maps after each got the context of its whole image
(:mod:`visionkd.losses.fgd` has the equations).

Yang, Li, Jiang, Gong, Yuan, Zhao and Yuan, "Focal and Global Knowledge Distillation for Detectors", CVPR 2022,
arXiv 2111.11837.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from visionkd.config.schema import DistillConfig, NonNegative
from visionkd.errors import Problem
from visionkd.losses.fgd import context_loss, fgd_terms
from visionkd.methods._base import DistillationModule
from visionkd.methods._detectors import teacher_problems, view_size
from visionkd.models.classes import align_classes, counted
from visionkd.models.context import ContextBlock
from visionkd.models.detection.steps import DetectorOutput, levels, matched_levels
from visionkd.models.detection.transfer import take_neck_and_heads
from visionkd.models.network import Network
from visionkd.types import Output

Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
_TERMS = ("foreground", "background", "attention", "relation")
#: The authors' weights of the four terms, for pyramids of 256 channels.
_ONE_STAGE = (1e-3, 5e-4, 5e-4, 5e-6)
_TWO_STAGE = (5e-5, 2.5e-5, 5e-5, 5e-7)


@dataclass(frozen=True)
class FGDOptions:
    """Options of ``fgd``.

    Attributes:
        foreground: Weight alpha of the cells inside boxes; None takes the authors' for the student's kind, one stage or
            two, here and in the next three.
        background: Weight beta of the other cells.
        attention: Weight gamma of the attention.
        relation: Weight lambda of the context.
        scale: Factor of all four. They are sums over channels, boxes and, two of them, places: change it until the
            smallest weighted term is about a tenth of the task's loss, and none is more than twice it.
        temperature: Softens the attention; less looks at fewer places.
        task_loss_weight: Weight of the detector's own losses.
        init_student: Begin with the teacher's neck and heads where shapes agree, unless the student was trained before.
        other_classes: Take a teacher of other classes, for its features alone; it is then neither looked at nor
            compared with the student.
    """

    foreground: NonNegative | None = None
    background: NonNegative | None = None
    attention: NonNegative | None = None
    relation: NonNegative | None = None
    scale: Positive = 1.0
    temperature: Positive = 0.5
    task_loss_weight: NonNegative = 1.0
    init_student: bool = True
    other_classes: bool = False


class FGD(DistillationModule):
    """Focal and global distillation from one detector into another."""

    tasks: ClassVar[frozenset[str]] = frozenset({"detection"})
    needs: ClassVar[frozenset[str]] = frozenset({"features"})
    Options: ClassVar[type] = FGDOptions
    options: FGDOptions

    def __init__(self, *, student: Network, teachers: Sequence[Network] = (), **rest: Any) -> None:
        # the base asks for modules and levels before it takes the teachers
        size = view_size(student, *teachers)
        own, others = levels(student, size), levels(teachers[0], size)
        self.__dict__["_pairs"] = matched_levels(own, others)
        self.__dict__["_channels"] = [(own[one].channels, others[two].channels) for one, two in self._pairs]
        super().__init__(student=student, teachers=teachers, **rest)

    def build_modules(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.config.training.seed)
            built = [
                nn.ModuleDict({
                    "align": nn.Identity() if own == other else nn.Conv2d(own, other, 1),
                    "student_context": ContextBlock(other),
                    "teacher_context": ContextBlock(other),
                })
                for own, other in self._channels
            ]  # fmt: skip
        device = next(self.student.parameters()).device
        return nn.ModuleList(built).to(device=device, memory_format=self.memory_format)

    def student_stages(self) -> Sequence[int]:
        return tuple(own for own, _ in self._pairs)

    def teacher_stages(self) -> Sequence[int]:
        return tuple(other for _, other in self._pairs)

    def distill_loss(
        self, *, student: Output, teachers: tuple[Output, ...], target: Sequence[Mapping[str, Tensor]]
    ) -> Mapping[str, Tensor]:
        assert isinstance(student, DetectorOutput)
        boxes = [self.student.wanted(each)["boxes"] for each in target]
        sums: dict[str, list[Tensor]] = {name: [] for name in _TERMS}
        for parts, own, other in zip(self.projectors, student.features, teachers[0].features, strict=True):
            other = other.detach()
            lifted = parts["align"](own)
            terms = fgd_terms(
                student_map=lifted, teacher_map=other, boxes=boxes, image_size=student.image_size,
                temperature=self.options.temperature,
            )  # fmt: skip
            relation = context_loss(
                student_context=parts["student_context"](lifted), teacher_context=parts["teacher_context"](other)
            )
            values = (terms.foreground, terms.background, terms.attention, relation)
            for name, value in zip(_TERMS, values, strict=True):
                sums[name].append(value)
        return {f"{name}_loss": torch.stack(each).sum() for name, each in sums.items()}

    def loss_weights(self) -> Mapping[str, float]:
        usual = _TWO_STAGE if self.student.two_stage else _ONE_STAGE
        weights = {"task_loss": self.options.task_loss_weight}
        for name, value in zip(_TERMS, usual, strict=True):
            given = getattr(self.options, name)
            weights[f"{name}_loss"] = self.options.scale * (value if given is None else given)
        return weights

    # What the method says about itself --------------------------------------------------------------------------------

    @classmethod
    def asks(cls, teacher: Network, options: FGDOptions) -> bool:
        return not options.other_classes

    @classmethod
    def check(
        cls, *, student: Network, teachers: Sequence[Network], config: DistillConfig, options: FGDOptions
    ) -> list[Problem]:
        if student.task != "detection":
            return []  # the task is refused as a whole
        if problems := teacher_problems("fgd", teachers):
            return problems
        (teacher,) = teachers
        size = view_size(student, teacher)
        own, others = levels(student, size), levels(teacher, size)
        if not matched_levels(own, others):
            names = [f"{', '.join(str(level.stride) for level in each)}" for each in (own, others)]
            text = f"the pyramids have no level in common: strides {names[0]} of '{student.architecture}',"
            text += f" {names[1]} of '{teacher.architecture}'"
            return [Problem("--teacher", text, "Take a teacher with a level of one of the student's strides.")]
        fits = options.other_classes or config.fit_teacher.mode == "finetune"
        if fits or align_classes(teacher.classes, student.classes, teacher.num_classes).columns is not None:
            return []
        text = f"the {counted(teacher.num_classes, 'class')} of '{teacher.architecture}' are not the data's"
        hint = "Use --fit-teacher finetune, or -o options.other_classes=true to take it for its features alone."
        return [Problem("--teacher", text, hint)]

    @classmethod
    def settle(
        cls, *, student: Network, teachers: Sequence[Network], config: DistillConfig, options: FGDOptions
    ) -> list[str]:
        if student.task != "detection":
            return []
        (teacher,) = teachers
        size = view_size(student, teacher)
        own = levels(student, size)
        pairs = matched_levels(own, levels(teacher, size))
        strides = ", ".join(str(own[one].stride) for one, _ in pairs)
        said = [f"FGD compares the levels of stride {strides} of both pyramids"]
        if options.init_student and student.trained:
            said.append(f"'{student.architecture}' was trained before, so its neck and heads stay as they are")
        elif options.init_student:
            taken, count = take_neck_and_heads(student, teacher, same_levels=all(one == two for one, two in pairs))
            said.append(
                f"{taken} of the {count} tensors of the student's neck and heads begin with the teacher's"
                " (-o options.init_student=false begins with random ones)"
                if taken
                else "The student's neck and heads have other shapes than the teacher's and begin with random weights"
            )
        return said


METHOD = FGD
