"""HARD: the divergence, the spatial transform, and the objectives of both players."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from _reference.base import Case, Check, Comparison
from visionkd.losses.disagreement import augmentor_loss, divergence, log_probabilities
from visionkd.losses.distillation import average_probabilities, kd_loss
from visionkd.methods._augmentors import matrices, warp


def _divergence(case: Case) -> Iterator[Comparison]:
    """Both of our forms of it: the student's loss, and the one with gradient to both sides."""
    temperature, teacher = float(case.hyper["T"]), case.tensor("teacher_logits")
    student = case.tensor("student_logits", requires_grad=True)
    loss = kd_loss(student_logits=student, teacher_logits=teacher, temperature=temperature)
    loss.backward()
    yield Comparison("loss", loss, case.arrays["loss"])
    yield Comparison("grad_student_logits", student.grad, case.arrays["grad_student_logits"])
    again = case.tensor("student_logits", requires_grad=True)
    sides = [log_probabilities([logits], temperature=temperature) for logits in (teacher, again)]
    loss = divergence(teacher_log_probs=sides[0], other_log_probs=sides[1], temperature=temperature)
    loss.backward()
    yield Comparison("loss (both sides)", loss, case.arrays["loss"])
    yield Comparison("grad_student_logits (both sides)", again.grad, case.arrays["grad_student_logits"])


def _affine(case: Case) -> Iterator[Comparison]:
    image, parameter = case.tensor("image"), case.tensor("theta_parameter", requires_grad=True)
    theta = matrices(parameter.reshape(len(image), -1))
    warped = warp(image, theta)
    weights = torch.linspace(-1, 1, warped.numel(), dtype=warped.dtype).view_as(warped)
    (warped * weights).sum().backward()
    yield Comparison("theta_used", theta, case.arrays["theta_used"])
    yield Comparison("warped", warped, case.arrays["warped"])
    yield Comparison("grad_theta_parameter", parameter.grad, case.arrays["grad_theta_parameter"])


def _objective(case: Case) -> Iterator[Comparison]:
    """The augmentor's step, then the student's on the same images without their gradient."""
    temperature = float(case.hyper["T"])
    image, theta = case.tensor("image"), case.tensor("theta", requires_grad=True)
    teacher, student = case.tensor("teacher_weight"), case.tensor("student_weight", requires_grad=True)
    augmented = warp(image, theta)
    found = augmentor_loss(
        student_logits=augmented.flatten(1) @ student,
        teacher_logits=[augmented.flatten(1) @ teacher],
        teacher_clean_probs=average_probabilities([image.flatten(1) @ teacher], temperature=temperature),
        temperature=temperature,
        disagreement_weight=float(case.hyper["lambda_s"]),
        consistency_weight=float(case.hyper["lambda_t"]),
    )
    yield Comparison("x_aug", augmented, case.arrays["x_aug"])
    yield Comparison("disagreement", found.disagreement, case.arrays["disagreement"])
    yield Comparison("teacher_consistency", found.teacher_consistency, case.arrays["teacher_consistency"])
    yield Comparison("augmentor_objective", found.loss, case.arrays["augmentor_objective"])
    yield Comparison("grad_theta", torch.autograd.grad(found.loss, theta)[0], case.arrays["grad_theta"])
    fixed = augmented.detach().flatten(1)
    loss = kd_loss(student_logits=fixed @ student, teacher_logits=fixed @ teacher, temperature=temperature)
    loss.backward()
    yield Comparison("student_loss", loss, case.arrays["student_loss"])
    yield Comparison("grad_student_weight", student.grad, case.arrays["grad_student_weight"])


CHECKS = [
    Check(
        "HARD divergence",
        lambda case: (
            "KnowledgeDistillation.rep_distance" in case.produced_by
            and case.has("student_logits", "teacher_logits", "loss", "grad_student_logits")
        ),
        _divergence,
    ),
    Check("HARD affine", lambda case: case.has("theta_parameter", "theta_used", "warped"), _affine),
    Check(
        "HARD objectives",
        lambda case: case.has("theta", "teacher_weight", "student_weight", "augmentor_objective", "student_loss"),
        _objective,
    ),
]
