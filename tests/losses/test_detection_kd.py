"""Distillation of objectness, classes and deltas."""

from __future__ import annotations

import pytest
import torch

from visionkd.losses.detection_kd import delta_loss, objectness_loss, proposal_class_loss


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_equal_classes_cost_nothing_and_the_teacher_is_left_alone() -> None:
    student, teacher = rand(5, 4).requires_grad_(), rand(5, 4, seed=1).requires_grad_()
    assert proposal_class_loss(student_logits=teacher.detach(), teacher_logits=teacher) == pytest.approx(0, abs=1e-7)
    loss = proposal_class_loss(student_logits=student, teacher_logits=teacher, temperature=2.0)
    p, q = (student / 2).softmax(1), (teacher / 2).softmax(1)
    assert loss.item() == pytest.approx((4 * (q * (q / p).log()).sum(1).mean()).item(), rel=1e-5)
    loss.backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0


def test_objectness_is_least_where_it_equals_the_teachers() -> None:
    student, teacher = rand(7).requires_grad_(), rand(7, seed=1).requires_grad_()
    objectness_loss(student_logits=student, teacher_logits=teacher, temperature=2.0).backward()
    # d/ds of T^2 BCE(s / T, sigmoid(t / T)) / N
    expected = 2 * ((student / 2).sigmoid() - (teacher / 2).sigmoid()) / 7
    assert torch.allclose(student.grad, expected, atol=1e-6) and teacher.grad is None
    same = teacher.detach().clone().requires_grad_()
    objectness_loss(student_logits=same, teacher_logits=teacher).backward()
    assert torch.allclose(same.grad, torch.zeros(7), atol=1e-7)


def test_deltas_count_where_they_are_chosen() -> None:
    student, teacher = torch.zeros(3, 4, requires_grad=True), torch.ones(3, 4)
    loss = delta_loss(student_deltas=student, teacher_deltas=teacher, chosen=torch.tensor([True, False, True]))
    loss.backward()
    assert loss == 4 and student.grad[1].abs().sum() == 0 and torch.equal(student.grad[0], torch.full((4,), -0.5))


def test_nothing_to_compare_is_a_zero_with_a_gradient() -> None:
    logits, classes, deltas = (torch.zeros(0, *shape, requires_grad=True) for shape in ((), (4,), (4,)))
    total = objectness_loss(student_logits=logits, teacher_logits=torch.zeros(0))
    total = total + proposal_class_loss(student_logits=classes, teacher_logits=torch.zeros(0, 4))
    chosen = torch.zeros(0, dtype=torch.bool)
    total = total + delta_loss(student_deltas=deltas, teacher_deltas=torch.zeros(0, 4), chosen=chosen)
    total.backward()
    assert total == 0 and all(x.grad is not None for x in (logits, classes, deltas))
