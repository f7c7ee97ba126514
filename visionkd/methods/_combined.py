"""Several methods' terms, added up with weights: ``losses:`` in a recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from visionkd.errors import Problem
from visionkd.methods._base import DistillationModule
from visionkd.models.network import Network
from visionkd.types import Output


@dataclass(frozen=True)
class Part:
    """One method of a combination.

    Attributes:
        name: Name of the method.
        method: Its class.
        options: Its own options.
        weight: Factor of all its terms.
    """

    name: str
    method: type[DistillationModule]
    options: Any
    weight: float


@dataclass(frozen=True)
class CombinedOptions:
    """Options of a combination.

    Attributes:
        parts: The methods.
        task_loss_weight: Weight of the loss against the labels; what the methods say of it does not count.
    """

    parts: tuple[Part, ...]
    task_loss_weight: float


class Combined(DistillationModule):
    """Each method computes its terms from the same outputs; they are logged as ``<method>.<term>``.

    A method is asked for its terms through an instance that shares student and settings with this module and owns
    nothing but its projectors. Methods that change the step itself cannot be combined.
    """

    Options: ClassVar[type] = CombinedOptions
    options: CombinedOptions

    @classmethod
    def of(cls, parts: Sequence[Part]) -> type[Combined]:
        """Return the class of a combination, which declares what its parts need."""
        declared = {
            "tasks": frozenset.intersection(*(part.method.tasks for part in parts)),
            "needs": frozenset.union(*(part.method.needs for part in parts)),
            "uses_labels": any(part.method.uses_labels for part in parts),
        }
        return type("Combined", (cls,), declared)

    def __init__(self, *, teachers: Sequence[Network] = (), **rest: Any) -> None:
        self.__dict__["_given"] = tuple(teachers)  # before the base, which asks for the modules first
        super().__init__(teachers=teachers, **rest)
        for own in self._parts:
            own.frozen = self.frozen  # for those that ask a teacher for more than its output

    def build_modules(self) -> nn.Module:
        made = []
        for part in self.options.parts:
            # it may look at the teachers, and never runs them
            alone = type(part.method.__name__, (part.method,), {"prepare_teacher": lambda self, teacher: teacher})
            own = alone(
                student=self.student, teachers=self._given, task=self.task, config=self._without_ema(),
                options=part.options, budget=self.budget,
            )  # fmt: skip
            made.append(own)
        self.__dict__["_parts"] = tuple(made)  # not submodules: the student would be counted several times
        named = zip(self.options.parts, made, strict=True)
        return nn.ModuleDict({part.name: own.projectors for part, own in named if len(own.projectors)})

    def _without_ema(self) -> Any:
        return self.config.model_copy(
            update={"training": self.config.training.model_copy(update={"ema_decay": None, "compile": False})}
        )

    def student_stages(self) -> Sequence[int]:
        return tuple(sorted({stage for own in self._parts for stage in own.student_stages()}))

    def teacher_stages(self) -> Sequence[int]:
        return tuple(sorted({stage for own in self._parts for stage in own.teacher_stages()}))

    @classmethod
    def label_temperature(cls, options: CombinedOptions) -> float:
        return options.parts[0].method.label_temperature(options.parts[0].options)

    def distill_loss(self, *, student: Output, teachers: tuple[Output, ...], target: Tensor) -> Mapping[str, Tensor]:
        terms = {}
        known, known_of_teachers = self.student_stages(), self.teacher_stages()
        for part, own in zip(self.options.parts, self._parts, strict=True):
            output = _picked(student, known, own.student_stages())
            answers = tuple(_picked(teacher, known_of_teachers, own.teacher_stages()) for teacher in teachers)
            for name, value in own.distill_loss(student=output, teachers=answers, target=target).items():
                terms[f"{part.name}.{name}"] = value
        return terms

    def loss_weights(self) -> Mapping[str, float]:
        weights = {"task_loss": self.options.task_loss_weight}
        for part, own in zip(self.options.parts, self._parts, strict=True):
            own_weights = own.loss_weights()
            weights |= {
                f"{part.name}.{name}": part.weight * weight
                for name, weight in own_weights.items()
                if name != "task_loss"
            }
        return weights

    @classmethod
    def can_store_labels(cls, options: CombinedOptions) -> bool:
        # one store holds probabilities of one temperature
        temperatures = {part.method.label_temperature(part.options) for part in options.parts}
        return len(temperatures) == 1 and all(part.method.can_store_labels(part.options) for part in options.parts)

    @classmethod
    def check(
        cls, *, student: Network, teachers: Sequence[Network], config: Any, options: CombinedOptions
    ) -> list[Problem]:
        problems = []
        for part in options.parts:
            if part.method.training_step is not DistillationModule.training_step:
                problems.append(
                    Problem(f"losses.{part.name}", "changes the training step itself and cannot be combined")
                )
            if len(part.method.stages(config, part.options)) > 1:
                problems.append(Problem(f"losses.{part.name}", "consists of several trainings and cannot be combined"))
            if part.method.needs == {"probabilities"} and not part.method.can_store_labels(part.options):
                text = "wants teachers of its own with these options (teacher_mode: train) and cannot be combined"
                problems.append(Problem(f"losses.{part.name}", text))
            problems += part.method.check(student=student, teachers=teachers, config=config, options=part.options)
        return problems

    @classmethod
    def warnings(
        cls, *, student: Network, teachers: Sequence[Network], config: Any, options: CombinedOptions
    ) -> list[str]:
        given = {"student": student, "teachers": teachers, "config": config}
        return [text for part in options.parts for text in part.method.warnings(**given, options=part.options)]


def _picked(output: Output, known: Sequence[int], wanted: Sequence[int]) -> Output:
    """Return an output with the maps of the stages ``wanted`` alone, out of those ``known``."""
    at = [known.index(stage) for stage in wanted]
    picked: dict[str, Any] = {"features": tuple(output.features[place] for place in at)}
    if prefixes := getattr(output, "prefix_tokens", ()):
        picked["prefix_tokens"] = tuple(prefixes[place] for place in at)
    return dataclasses.replace(output, **picked)
