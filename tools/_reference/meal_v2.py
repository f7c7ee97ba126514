"""MEAL V2: the ensemble's soft label, the similarity loss, the discriminator and their sum."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from _reference.base import Case, Check, Comparison
from visionkd.losses.distillation import average_probabilities, soft_cross_entropy
from visionkd.methods.meal_v2 import Discriminator, discriminator_loss

_LAYERS = {"conv1": 0, "conv2": 2, "conv3": 4}  # the authors' names, and places in our sequence


def _teachers(case: Case) -> list[Tensor]:
    return [case.tensor(f"teacher_logits_{number}") for number in range(case.hyper["teachers"])]


def _discriminator(case: Case, num_classes: int) -> Discriminator:
    made = Discriminator(num_classes, int(case.hyper["K"]))
    for name, value in case.tensors("param:").items():
        layer, _, kind = name.partition(".")
        getattr(made[_LAYERS[layer]], kind).data.copy_(value.flatten(1) if kind == "weight" else value)
    return made


def _gradients(case: Case, discriminator: Discriminator) -> Iterator[Comparison]:
    for name in case.tensors("grad:"):
        layer, _, kind = name.partition(".")
        ours = getattr(discriminator[_LAYERS[layer]], kind).grad
        yield Comparison(f"grad:{name}", ours, case.tensor(f"grad:{name}").reshape(ours.shape).numpy())


def _similarity(case: Case) -> Iterator[Comparison]:
    student, teachers = case.tensor("student_logits", requires_grad=True), _teachers(case)
    probs = average_probabilities(teachers)
    loss = soft_cross_entropy(student_logits=student, teacher_probs=probs)
    loss.backward()
    yield Comparison("soft_label", probs, case.arrays["soft_label"])
    yield Comparison("mean_teacher_logits", torch.stack(teachers).mean(0), case.arrays["mean_teacher_logits"])
    yield Comparison("g_loss", loss, case.arrays["g_loss"])
    yield Comparison("grad_student_logits", student.grad, case.arrays["grad_student_logits"])


def _discrimination(case: Case) -> Iterator[Comparison]:
    student = case.tensor("student_logits", requires_grad=True)
    teacher = case.tensor("teacher_logits_mean")
    discriminator = _discriminator(case, student.shape[1])
    sides = (student, teacher)
    if "softmax" in case.hyper["inputs"]:
        sides = (student.softmax(1), _stored(case, teacher))
    loss, _ = discriminator_loss(discriminator, student=sides[0], teacher=sides[1])
    loss.backward()
    yield Comparison("d_output", discriminator(torch.cat(sides)), case.arrays["d_output"])
    yield Comparison("d_loss", loss, case.arrays["d_loss"])
    yield Comparison("grad_student_logits", student.grad, case.arrays["grad_student_logits"])
    yield from _gradients(case, discriminator)


def _stored(case: Case, teacher: Tensor) -> Tensor:
    """The teacher's side of the variant with stored labels is a distribution already, or the logits of one."""
    is_distribution = bool((teacher >= 0).all()) and torch.allclose(teacher.sum(1), torch.ones(len(teacher)), atol=1e-4)
    return teacher if is_distribution else teacher.softmax(1)


def _total(case: Case) -> Iterator[Comparison]:
    student, teachers = case.tensor("student_logits", requires_grad=True), _teachers(case)
    discriminator = _discriminator(case, student.shape[1])
    similarity = soft_cross_entropy(student_logits=student, teacher_probs=average_probabilities(teachers))
    loss, _ = discriminator_loss(discriminator, student=student, teacher=torch.stack(teachers).mean(0))
    (similarity + loss).backward()
    yield Comparison("g_loss", similarity, case.arrays["g_loss"])
    yield Comparison("d_loss", loss, case.arrays["d_loss"])
    yield Comparison("loss_total", similarity + loss, case.arrays["loss_total"])
    yield Comparison("grad_student_logits", student.grad, case.arrays["grad_student_logits"])
    yield from _gradients(case, discriminator)


CHECKS = [
    Check("MEAL V2 similarity", lambda case: case.has("soft_label", "g_loss", "mean_teacher_logits"), _similarity),
    Check("MEAL V2 discriminator", lambda case: case.has("d_output", "teacher_logits_mean"), _discrimination),
    Check("MEAL V2 total", lambda case: case.has("g_loss", "d_loss", "loss_total"), _total),
]
