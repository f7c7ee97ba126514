"""LAD: a teacher that is shown the labels, in numbers that mean nothing by themselves, teaches a student that is not.

First the teacher is trained. It is a network of the student's or another architecture with a fourth input channel, into
which the label map goes after every class was given a random number, anew for each image: only together with the image
does it say anything. Each step shows it two recodings of the same labels, and its answers must not depend on which:

    L_T = CE(z_1, y) + CE(z_2, y) + 0.4 sum CE(a, y) + 5 [CWD(z_1, z_2) + CWD(z_2, z_1)]

Then the student learns from it, with fixed numbers for the classes, and sees the image alone:

    L_S = CE(z_S, y) + 0.02 CE(a_S, y) + 3 CWD(z_S, z_T)

``a`` are auxiliary heads' logits, CWD the channel-wise distance at T = 4, whose second argument gets no gradient.

Qiu, Chen, Li, Wan, Xue and Pu, "Make a Strong Teacher with Label Assistance: A Novel Knowledge Distillation Approach
for Semantic Segmentation", ECCV 2024, arXiv 2407.13254.
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
from visionkd.losses.lad import Distance, fixed_codes, label_channel, student_terms, with_label
from visionkd.methods._base import DistillationModule
from visionkd.methods._dense import sized
from visionkd.methods._privileged import PrivilegedTeacher
from visionkd.methods._stage import TrainingStage
from visionkd.models.label_input import sees_labels, with_label_input
from visionkd.models.network import Network

Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


@dataclass(frozen=True)
class LADOptions:
    """Options of ``lad``; the values are the authors', apart from ``gain`` and ``label_init_std``, which stand in for
    theirs on images of another scale.

    Attributes:
        distill_loss_weight: Weight of the distance between student and teacher.
        distance: ``cwd``, or what the authors tried beside it: ``kl`` at every pixel, or ``dist``.
        temperature: Of the distance, in both trainings.
        aux_weight: Weight of the student's auxiliary heads, in place of the task's.
        consistency_weight: Weight of the distance between the teacher's two paths.
        teacher_aux_weight: Weight of its auxiliary heads.
        class_sigma: Standard deviation of the numbers that stand for classes in its training.
        teacher_sigma: That of the noise at each pixel in its training, before the gain.
        student_sigma: That of the noise at each pixel while the student is trained.
        gain: Spread of the label channel against that of an image channel: 100 / 57 of the authors' images in 0..255.
        label_init_std: Standard deviation of the weights that a new label channel begins with. A teacher that begins
            with small ones may learn to do without the labels: that, too, makes its two paths agree.
        teacher_epochs: Epochs of the teacher's training; None takes those of the configuration, and 0 takes a teacher
            that was trained in another run of lad as it is.
        teacher_lr: Its learning rate; None takes that of the configuration.
    """

    distill_loss_weight: NonNegative = 3.0
    distance: Distance = "cwd"
    temperature: Positive = 4.0
    aux_weight: NonNegative = 0.02
    consistency_weight: NonNegative = 5.0
    teacher_aux_weight: NonNegative = 0.4
    class_sigma: NonNegative = 1.0
    teacher_sigma: NonNegative = 0.03
    student_sigma: NonNegative = 0.02
    gain: Positive = 1.75
    label_init_std: NonNegative = 1.0
    teacher_epochs: Annotated[int, Field(ge=0)] | None = None
    teacher_lr: Positive | None = None


class LAD(DistillationModule):
    """The student's training, and what the method says about itself; :class:`PrivilegedTeacher` trains the teacher."""

    tasks: ClassVar[frozenset[str]] = frozenset({"segmentation"})
    trains_teacher: ClassVar[bool] = True
    Options: ClassVar[type] = LADOptions
    options: LADOptions

    def loss_terms(self, image: Tensor, target: Tensor, teacher_probs: Tensor | None = None) -> dict[str, Tensor]:
        student = self.student_output(image)
        assert student.logits is not None
        terms = student_terms(
            student_logits=student.logits, student_aux=student.aux,
            teacher_logits=sized(self.privileged_logits(image, target), student.logits.shape[2:]), target=target,
            aux_weight=self.options.aux_weight, distance=self.options.distance, temperature=self.options.temperature,
        )  # fmt: skip
        return dict(terms)

    def privileged_logits(self, image: Tensor, target: Tensor) -> Tensor:
        """Return what the teacher says of images whose labels it sees, B x C x h x w, without gradient."""
        noise = torch.randn(len(image), 1, *image.shape[2:], device=image.device)
        channel = label_channel(
            target=target, codes=fixed_codes(self.student.num_classes).to(image.device), noise=noise,
            sigma=self.options.student_sigma, gain=self.options.gain,
        )  # fmt: skip
        (teacher,) = self.teacher_outputs(with_label(image, channel))
        assert teacher.logits is not None
        return teacher.logits

    def loss_weights(self) -> Mapping[str, float]:
        return {"task_loss": 1.0, "distill_loss": self.options.distill_loss_weight}

    # What the method says about itself --------------------------------------------------------------------------------

    @classmethod
    def stages(cls, config: RunConfig, options: LADOptions) -> tuple[TrainingStage, ...]:
        settings = {} if options.teacher_lr is None else {"optimizer.lr": options.teacher_lr}
        title = "Train the teacher, which sees the labels" if options.teacher_epochs != 0 else "Take the teacher"
        teacher = TrainingStage(
            "teacher", title, epochs=options.teacher_epochs, kind="teacher", settings=settings, trains="teacher"
        )
        return teacher, TrainingStage("distill", "Distil")

    @classmethod
    def module_of(cls, training: TrainingStage, options: LADOptions) -> type[Any]:
        return PrivilegedTeacher if training.trains == "teacher" else cls

    @classmethod
    def prepare_student(
        cls, student: Network, training: TrainingStage, config: RunConfig, options: LADOptions
    ) -> Network:
        if training.trains == "student" or sees_labels(student):
            return student
        return with_label_input(student, std=options.label_init_std, seed=config.training.seed)

    @classmethod
    def can_store_labels(cls, options: LADOptions) -> bool:
        return False  # the teacher's answer depends on noise

    @classmethod
    def check(
        cls, *, student: Network, teachers: Sequence[Network], config: RunConfig, options: LADOptions
    ) -> list[Problem]:
        if len(teachers) != 1:
            return [Problem("--teacher", f"lad trains one teacher, and {len(teachers)} are named")]
        problems = []
        if teachers[0].task != "segmentation":
            text = f"'{teachers[0].architecture}' names images, not pixels"
            problems.append(Problem("--teacher", text, "Leave it out to take the student's own architecture."))
        if options.teacher_epochs == 0 and not sees_labels(teachers[0]):
            text = f"0 takes the teacher as it is, and '{teachers[0].architecture}' was never shown labels"
            hint = "Name the teacher of another run of lad (--teacher RUN/stages/teacher), or leave the option out."
            problems.append(Problem("options.teacher_epochs", text, hint))
        return problems

    @classmethod
    def settle(
        cls, *, student: Network, teachers: Sequence[Network], config: RunConfig, options: LADOptions
    ) -> list[str]:
        same = " as the student's" if teachers[0].architecture == student.architecture else ""
        how = "is taken as it was trained" if options.teacher_epochs == 0 else "is trained first"
        return [
            f"The teacher ({teachers[0].architecture}{same}) {how}. It is shown the labels beside the images, so it is"
            " no model to use: it is neither packaged nor compared with the student"
        ]


METHOD = LAD
