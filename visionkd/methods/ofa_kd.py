"""OFA-KD: distillation between networks whose features cannot be compared, in the space of class logits.

    L_g(z) = -sum_c w_c log softmax(z / T)_c,  w_y = (1 + q_y)^g - 1,  w_c = q_c^g elsewhere,  q = softmax(z_t / T)
    L = task_loss_weight * CE(y, z_s) + kd_loss_weight * L_g(z_s) + exit_loss_weight * sum_k L_gk(exit_k(f_k))

Each stage of the student has an exit, a small network from its features ``f_k`` to class logits that learns what the
teacher finally says; the teacher's features are never used. Exits train with the student and are dropped.

Hao, Guo, Han, Tang, Hu, Wang and Xu, "One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge
Distillation", NeurIPS 2023, arXiv 2310.19444.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor, nn

from visionkd.errors import Problem, RequestError
from visionkd.losses.ofa import ofa_loss
from visionkd.methods._base import DistillationModule
from visionkd.models.features import FeatureOutput, Stage, final_width, four_stages, has_class_token
from visionkd.models.network import Network
from visionkd.models.projectors import MapExit, TokenExit
from visionkd.types import Output

NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Above0 = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
OneOrMore = Annotated[
    tuple[Above0, ...],
    BeforeValidator(lambda given: given if isinstance(given, (list, tuple)) else (given,)),
    Field(min_length=1, max_length=5),
]


@dataclass(frozen=True)
class OFAKDOptions:
    """Options of ``ofa_kd``.

    Attributes:
        exponent: ``g`` of the equation (gamma of the paper): one number, or one for each exit and a last one for the
            final logits. Above 1 strengthens the label where the teacher is sure of it.
        temperature: ``T``, of student and teacher.
        stages: Stages that get an exit, 4 being the deepest; null takes all that the student has, none trains without.
        readout: What the exits of a transformer read: the ``mean`` over its tokens, or its ``class_token``.
        task_loss_weight: Weight of the cross-entropy against the labels.
        kd_loss_weight: Weight of the loss on the final logits.
        exit_loss_weight: Weight of the sum over exits; 0 trains without them.
    """

    exponent: OneOrMore = (1.0,)
    temperature: Above0 = 1.0
    stages: tuple[Literal[1, 2, 3, 4], ...] | None = None
    readout: Literal["mean", "class_token"] = "mean"
    task_loss_weight: NonNegative = 1.0
    kd_loss_weight: NonNegative = 1.0
    exit_loss_weight: NonNegative = 1.0

    def __post_init__(self) -> None:
        if self.stages is not None and len(set(self.stages)) != len(self.stages):
            raise ValueError(f"stages {list(self.stages)} name a stage twice")
        if self.stages is not None and self.has_exits:
            self.exponents(len(self.stages))
        if not self.kd_loss_weight and not self.has_exits:
            raise ValueError("kd_loss_weight is 0 and there are no exits: the teacher would teach nothing")

    @property
    def has_exits(self) -> bool:
        return bool(self.exit_loss_weight) and self.stages != ()

    def exponents(self, num_exits: int) -> tuple[float, ...]:
        """Return one exponent for each exit, and a last one for the final logits.

        Raises:
            ValueError: If another number of them is given.
        """
        given = self.exponent
        if len(given) == 1:
            return given * (num_exits + 1)
        if len(given) != num_exits + 1:
            exits = f"{num_exits} exit" if num_exits == 1 else f"{num_exits} exits"
            raise ValueError(
                f"{len(given)} values of exponent for {exits}:"
                f" give one, or {num_exits + 1}, the last one for the final logits"
            )
        return given


def ofa_terms(
    *,
    student_logits: Tensor,
    student_exits: Sequence[Tensor],
    teacher_probs: Tensor,
    target: Tensor,
    exponents: Sequence[float],
    temperature: float = 1.0,
) -> tuple[Tensor, list[Tensor]]:
    """Return the loss on the final logits and that of each exit.

    Args:
        student_logits: B x C.
        student_exits: Logits of the exits, B x C each.
        teacher_probs: B x C, ``softmax(z_t / T)``.
        target: Class indices, B, or probabilities, B x C.
        exponents: ``g`` of each exit, and a last one for the final logits.
        temperature: ``T``.
    """
    losses = [
        ofa_loss(
            student_logits=logits,
            teacher_probs=teacher_probs,
            target=target,
            exponent=exponent,
            temperature=temperature,
        )
        for logits, exponent in zip((*student_exits, student_logits), exponents, strict=True)
    ]
    return losses[-1], losses[:-1]


def make_exit(
    stage: Stage,
    *,
    number: int,
    student_width: int,
    student_grid: tuple[int, int] = (7, 7),
    teacher_width: int,
    num_classes: int,
    class_token: bool = False,
) -> nn.Module:
    """Return the exit of one stage.

    Args:
        stage: Where its features come from.
        number: 1 to 4, 4 being the deepest.
        student_width: Width of the student's final features.
        student_grid: Height and width of the student's deepest map.
        teacher_width: Width of the teachers' final features; only exits from maps are as wide as the wider of the two.
        num_classes: Outputs C.
        class_token: Read the class token instead of the mean over tokens.
    """
    if stage.layout == "map":
        width = max(student_width, teacher_width)
        return MapExit(channels=stage.channels, stage=number, width=width, num_classes=num_classes)
    return TokenExit(
        channels=stage.channels,
        grid=stage.grid,
        stage=number,
        width=student_width,
        num_classes=num_classes,
        final_grid=student_grid,
        class_token=class_token,
    )


class OFAKD(DistillationModule):
    """Exits at the student's stages; several teachers count as the mean of their probabilities."""

    Options: ClassVar[type] = OFAKDOptions
    options: OFAKDOptions

    def __init__(self, *, student: Network, teachers: Sequence[Network] = (), **rest: Any) -> None:
        # the base makes the exits before it takes the teachers, and their width is the teachers' too
        self.__dict__["_teacher_width"] = max((final_width(teacher) for teacher in teachers), default=0)
        super().__init__(student=student, teachers=teachers, **rest)

    def build_modules(self) -> nn.Module:
        stages = _exit_stages(self.student, self.options)
        self.exponents = self.options.exponents(len(stages))
        self.stage_indices = tuple(stage.index for stage in stages.values())
        if not stages:
            return nn.ModuleDict()
        deepest = four_stages(self.student)[4]
        # the same weights whatever was drawn before, and nothing drawn from the others' randomness
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.config.training.seed)
            exits = {
                f"exit{number}": make_exit(
                    stage,
                    number=number,
                    student_width=deepest.channels,
                    student_grid=deepest.grid,
                    teacher_width=self._teacher_width,
                    num_classes=self.student.num_classes,
                    class_token=self.options.readout == "class_token",
                )
                for number, stage in stages.items()
            }
        device = next(self.student.parameters()).device
        return nn.ModuleDict(exits).to(device=device, memory_format=self.memory_format)

    def student_stages(self) -> Sequence[int]:
        return self.stage_indices

    @classmethod
    def label_temperature(cls, options: OFAKDOptions) -> float:
        return options.temperature

    def distill_loss(self, *, student: Output, teachers: tuple[Output, ...], target: Tensor) -> Mapping[str, Tensor]:
        assert student.logits is not None
        kd_loss, exit_losses = ofa_terms(
            student_logits=student.logits,
            student_exits=self.exit_logits(student),
            teacher_probs=self.soft_label(teachers),
            target=target,
            exponents=self.exponents,
            temperature=self.options.temperature,
        )
        terms = {"kd_loss": kd_loss}
        if exit_losses:
            terms["exit_loss"] = torch.stack(exit_losses).sum()
            terms |= {f"{name}_loss": loss.detach() for name, loss in zip(self.projectors, exit_losses, strict=True)}
        return terms

    def exit_logits(self, student: Output) -> list[Tensor]:
        """Return the logits of each exit, B x C, from the features of its stage."""
        prefixes = student.prefix_tokens if isinstance(student, FeatureOutput) else ()
        given = prefixes or (None,) * len(student.features)
        return [
            exit_(feature, prefix_tokens=prefix)
            for exit_, feature, prefix in zip(self.projectors.values(), student.features, given, strict=True)
        ]

    def loss_weights(self) -> Mapping[str, float]:
        return {
            "task_loss": self.options.task_loss_weight,
            "kd_loss": self.options.kd_loss_weight,
            "exit_loss": self.options.exit_loss_weight,
            **{f"{name}_loss": 0.0 for name in self.projectors},  # parts of exit_loss, for the logs
        }

    @classmethod
    def check(cls, *, student: Network, teachers: Sequence[Network], config: Any, options: Any) -> list[Problem]:
        if not options.has_exits:
            return []
        try:
            known = four_stages(student)
        except RequestError as error:
            hint = "Take another student, or train without exits: -o options.stages=[]"
            return [Problem("student.name", error.message, hint)]
        problems = []
        missing = [number for number in options.stages or () if number not in known]
        if missing:
            there = ", ".join(f"{number} ({stage.name})" for number, stage in known.items())
            text = f"'{student.architecture}' has no stage {missing[0]}"
            problems.append(Problem("options.stages", text, f"Its stages, the deepest last: {there}."))
        else:
            try:
                options.exponents(len(_exit_stages(student, options)))
            except ValueError as error:
                there = ", ".join(str(number) for number in _exit_stages(student, options))
                problems.append(Problem("options.exponent", str(error), f"The exits are those of the stages {there}."))
        if options.readout == "class_token" and not _reads_class_token(student, known):
            text = f"the stages of '{student.architecture}' carry no class token"
            problems.append(Problem("options.readout", text, "Read the mean over tokens: -o options.readout=mean"))
        return problems


def _exit_stages(student: Network, options: OFAKDOptions) -> dict[int, Stage]:
    """Return the stages that get an exit, by number, in the order of the options."""
    if not options.has_exits:
        return {}
    known = four_stages(student)
    return known if options.stages is None else {number: known[number] for number in options.stages}


def _reads_class_token(student: Network, known: Mapping[int, Stage]) -> bool:
    return has_class_token(student) and all(
        stage.layout == "tokens" and stage.channels == known[4].channels for stage in known.values()
    )


METHOD = OFAKD
