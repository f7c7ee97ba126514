from __future__ import annotations

import pytest
import torch

from visionkd.losses.distillation import hard_kd_loss, kd_loss


def logits(seed: int, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(6, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kd_loss_is_the_papers_sum(temperature):
    student, teacher = logits(0), logits(1)
    p = (teacher.double() / temperature).exp()
    p = p / p.sum(1, keepdim=True)
    q = (student.double() / temperature).exp()
    q = q / q.sum(1, keepdim=True)
    expected = temperature**2 * (p * (p / q).log()).sum(1).mean()
    found = kd_loss(student_logits=student, teacher_logits=teacher, temperature=temperature)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_kd_gradient_is_the_difference_of_the_soft_labels():
    student, teacher = logits(0).requires_grad_(), logits(1)
    temperature = 2.5
    kd_loss(student_logits=student, teacher_logits=teacher, temperature=temperature).backward()
    difference = (student.detach() / temperature).softmax(1) - (teacher / temperature).softmax(1)
    torch.testing.assert_close(student.grad, temperature * difference / len(student))


def test_kd_gradient_approaches_the_logit_match_at_high_temperature():
    """Hinton et al., equation 4: the gradient tends to (z_s - z_t) / C for centred logits."""
    student, teacher = logits(0).requires_grad_(), logits(1)
    kd_loss(student_logits=student, teacher_logits=teacher, temperature=1e3).backward()
    centred = [z - z.mean(1, keepdim=True) for z in (student.detach(), teacher)]
    torch.testing.assert_close(student.grad * len(student), (centred[0] - centred[1]) / 5, rtol=2e-2, atol=2e-3)


def test_kd_loss_is_zero_for_equal_distributions_and_gives_the_teacher_no_gradient():
    student, teacher = logits(0).requires_grad_(), logits(0).add(7.0).requires_grad_()
    loss = kd_loss(student_logits=student, teacher_logits=teacher)
    assert loss.item() == pytest.approx(0.0, abs=1e-5)
    loss.backward()
    assert teacher.grad is None


def test_kd_loss_is_finite_for_extreme_and_half_precision_logits():
    student = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0]])
    loss = kd_loss(student_logits=student, teacher_logits=teacher, temperature=1.0)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(student.grad).all()
    half = kd_loss(student_logits=logits(0).bfloat16(), teacher_logits=logits(1).bfloat16())
    assert half.dtype == torch.float32


def test_swapping_teacher_and_student_changes_the_loss():
    one = kd_loss(student_logits=logits(0), teacher_logits=logits(1))
    other = kd_loss(student_logits=logits(1), teacher_logits=logits(0))
    assert one.item() != pytest.approx(other.item(), rel=1e-2)


def test_hard_kd_loss_is_cross_entropy_with_the_teachers_class():
    student, teacher = logits(0).requires_grad_(), logits(1)
    expected = -student.double().log_softmax(1)[torch.arange(6), teacher.argmax(1)].mean()
    loss = hard_kd_loss(student_logits=student, teacher_probs=teacher)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    assert student.grad.abs().sum() > 0
