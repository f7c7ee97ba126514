"""SSLD and its relatives: symmetric KL in three releases, soft cross-entropy, temperature KL, UDML's feature term.

Two cases are there to be avoided, and the product does: (1) release/2.2 gave each network the gradient of one direction
only; (2) JSDivLoss scaled by a class count that was not the problem's. Their values are rebuilt here from our loss and
the documented difference. A third, smoothing of raw logits, is rebuilt from its wrong target.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from _reference.base import Case, Check, Comparison
from visionkd.losses.distillation import kd_loss, soft_cross_entropy
from visionkd.losses.symmetric_kl import feature_distance_loss, multilabel_symmetric_kl_loss, symmetric_kl_loss

_EPS_OF_RELEASE_20 = 1e-10
_EPS_OF_DEVELOP = 1e-12


def _pair(case: Case, kind: str = "logits") -> tuple[Tensor, Tensor]:
    student = case.tensor(f"student_{kind}", requires_grad=True)
    return student, case.tensor(f"teacher_{kind}", requires_grad=True)


def _compared(case: Case, loss: Tensor, student: Tensor, teacher: Tensor, kind: str = "logits") -> Iterator[Comparison]:
    loss.backward()
    yield Comparison("loss", loss, case.arrays["loss"])
    for role, tensor in (("student", student), ("teacher", teacher)):
        # a detached teacher has no gradient, where the authors' framework writes zeros
        ours = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        yield Comparison(f"grad_{role}_{kind}", ours, case.arrays[f"grad_{role}_{kind}"])


def _symmetric_kl(case: Case) -> Iterator[Comparison]:
    student, teacher = _pair(case)
    eps = float(case.hyper.get("eps", _EPS_OF_DEVELOP))
    sigmoid = case.hyper.get("act", "softmax") == "sigmoid"
    divergence = multilabel_symmetric_kl_loss if sigmoid else symmetric_kl_loss
    loss = divergence(student_logits=student, teacher_logits=teacher, eps=eps, detach_teacher=False)
    # the authors multiply every element by the number of classes, which only their mean over all elements takes back
    factor = student.shape[1] if case.hyper.get("sum_across_class_dim", False) else 1
    yield from _compared(case, factor * loss, student, teacher)
    if not sigmoid:
        yield from _from_probabilities(case, eps, factor)


def _from_probabilities(case: Case, eps: float, factor: int) -> Iterator[Comparison]:
    """The path of SSLD itself: the teacher's probabilities, as a label store holds them, and no gradient to it."""
    student = case.tensor("student_logits", requires_grad=True)
    probs = case.tensor("teacher_logits").softmax(1)
    loss = factor * symmetric_kl_loss(student_logits=student, teacher_probs=probs, eps=eps)
    loss.backward()
    yield Comparison("loss (stored probabilities)", loss, case.arrays["loss"])
    yield Comparison("grad_student_logits (stored probabilities)", student.grad, case.arrays["grad_student_logits"])


def _release_22(case: Case) -> Iterator[Comparison]:
    student, teacher = _pair(case)
    ours = symmetric_kl_loss(student_logits=student, teacher_logits=teacher, eps=0.0)
    yield Comparison("loss (ours)", ours, case.arrays["loss"])
    # kl_div gave its target no gradient: each network learned from one direction, which is ours with a detach in each
    half = kd_loss(student_logits=student, teacher_logits=teacher, temperature=1.0)
    other = kd_loss(student_logits=teacher, teacher_logits=student, temperature=1.0)
    yield from _compared(case, 0.5 * (half + other), student, teacher)


def _release_20(case: Case) -> Iterator[Comparison]:
    student, teacher = _pair(case)
    eps = float(case.hyper.get("eps", _EPS_OF_RELEASE_20))
    loss = symmetric_kl_loss(student_logits=student, teacher_logits=teacher, eps=eps, detach_teacher=False)
    yield from _compared(case, float(case.hyper["class_dim"]) / student.shape[1] * loss, student, teacher)


def _soft_ce(case: Case) -> Iterator[Comparison]:
    student, teacher = _pair(case)
    if case.hyper.get("epsilon") is None:
        loss = soft_cross_entropy(student_logits=student, teacher_probs=teacher.softmax(1))
        yield from _compared(case, loss, student, teacher)
        return
    # the trap: with smoothing the authors' target is made of raw logits, and has a gradient
    kept = 1 - float(case.hyper["epsilon"])
    target = kept * teacher.detach() + (1 - kept) / teacher.shape[1]
    teacher.grad = kept / len(teacher) * _losses_of_single_classes(student.detach())
    yield from _compared(case, soft_cross_entropy(student_logits=student, teacher_probs=target), student, teacher)


def _losses_of_single_classes(student: Tensor) -> Tensor:
    """The loss of each sample against each class alone, B x C: the loss is linear in the target, so its derivative."""
    classes = torch.eye(student.shape[1])
    rows = [
        [soft_cross_entropy(student_logits=row[None], teacher_probs=one[None]) for one in classes] for row in student
    ]
    return torch.stack([torch.stack(row) for row in rows])


def _temperature_kl(case: Case) -> Iterator[Comparison]:
    student, teacher = _pair(case)
    temperature = float(case.hyper["temperature"])
    loss = kd_loss(student_logits=student, teacher_logits=teacher, temperature=temperature)
    yield from _compared(case, loss, student, teacher)


def _feature_distance(case: Case) -> Iterator[Comparison]:
    student, teacher = _pair(case, "feature")
    loss = feature_distance_loss(
        student_feature=student, teacher_feature=teacher, mode=case.hyper.get("mode", "l2"), detach_teacher=False
    )
    yield from _compared(case, loss, student, teacher, "feature")


def _made_by(*names: str, old: str | None = None) -> Callable[[Case], bool]:
    """Recognise a case by the authors' file and class, and by the release where its code differs."""

    def matches(case: Case) -> bool:
        release = case.produced_by.split()[0] if case.produced_by.startswith("release/") else None
        return all(name in case.produced_by for name in names) and release == old

    return matches


CHECKS = [
    Check("symmetric KL", _made_by("dmlloss.py", "DMLLoss"), _symmetric_kl),
    Check("symmetric KL, release/2.2", _made_by("dmlloss.py", "DMLLoss", old="release/2.2"), _release_22),
    Check("symmetric KL, release/2.0", _made_by("JSDivLoss", old="release/2.0"), _release_20),
    Check("soft cross-entropy", _made_by("celoss.py", "CELoss"), _soft_ce),
    Check("KL with temperature", _made_by("kldivloss.py", "KLDivLoss"), _temperature_kl),
    Check("feature distance", _made_by("distanceloss.py", "DistanceLoss"), _feature_distance),
]
