from __future__ import annotations

import pytest
import torch
from torch import Tensor

from visionkd.losses.distillation import soft_cross_entropy
from visionkd.losses.ofa import ofa_loss


def example(*, seed: int, size: int = 5, num_classes: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Student's logits, teacher's logits and class indices."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = 2.0 * torch.randn(2, size, num_classes, generator=generator)
    return student, teacher, torch.randint(0, num_classes, (size,), generator=generator)


def written_out(student: Tensor, probs: Tensor, target: Tensor, exponent: float, temperature: float) -> Tensor:
    """The sum of the card, one term after the other, in float64."""
    total = 0.0
    for row in range(len(student)):
        p = torch.softmax(student[row].double() / temperature, 0)
        for column in range(student.shape[1]):
            mask = float(column == target[row])
            weight = (probs[row, column].double() + mask) ** exponent - mask
            total = total - weight * torch.log(p[column])
    return total / len(student)


@pytest.mark.parametrize(("exponent", "temperature"), [(1.0, 1.0), (1.5, 1.0), (1.2, 3.0), (0.7, 0.5), (2.0, 2.0)])
def test_it_is_the_sum_of_the_paper(exponent: float, temperature: float) -> None:
    student, teacher, target = example(seed=1)
    probs = torch.softmax(teacher / temperature, 1)
    given = {"teacher_probs": probs, "target": target, "exponent": exponent, "temperature": temperature}
    expected = written_out(student, probs, target, exponent, temperature)
    assert ofa_loss(student_logits=student, **given).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_exponent_1_is_the_cross_entropy_against_the_teacher_whatever_the_label(temperature: float) -> None:
    student, teacher, target = example(seed=2)
    given = {"student_logits": student, "teacher_probs": torch.softmax(teacher / temperature, 1)}
    expected = soft_cross_entropy(**given, temperature=temperature)
    for label in (target, (target + 1) % 7):
        assert ofa_loss(**given, target=label, temperature=temperature).item() == pytest.approx(expected.item())


@pytest.mark.parametrize(("exponent", "temperature"), [(1.0, 2.0), (1.4, 1.0), (0.8, 3.0)])
def test_the_gradient_is_that_of_the_equation(exponent: float, temperature: float) -> None:
    student, teacher, target = example(seed=3)
    student.requires_grad_()
    probs = torch.softmax(teacher / temperature, 1).requires_grad_()
    ofa_loss(
        student_logits=student, teacher_probs=probs, target=target, exponent=exponent, temperature=temperature
    ).backward()
    q, mask = probs.detach(), torch.nn.functional.one_hot(target, 7)
    weights = (q + mask) ** exponent - mask
    p = torch.softmax(student.detach() / temperature, 1)
    expected = (weights.sum(1, keepdim=True) * p - weights) / (len(student) * temperature)
    torch.testing.assert_close(student.grad, expected, rtol=1e-4, atol=1e-7)
    assert probs.grad is None, "the teacher learns nothing"


@pytest.mark.parametrize("exponent", [1.0, 1.5, 3.0])
def test_a_certain_and_correct_teacher_leaves_the_label_alone(exponent: float) -> None:
    student, _, target = example(seed=4)
    certain = torch.nn.functional.one_hot(target, 7).float()
    found = ofa_loss(student_logits=student, teacher_probs=certain, target=target, exponent=exponent)
    label_loss = torch.nn.functional.cross_entropy(student, target)
    assert found.item() == pytest.approx((2**exponent - 1) * label_loss.item(), rel=1e-5)


def test_of_a_mixed_label_the_larger_share_counts() -> None:
    student, teacher, target = example(seed=5)
    other = (target + 3) % 7
    mixed = 0.6 * torch.nn.functional.one_hot(target, 7) + 0.4 * torch.nn.functional.one_hot(other, 7)
    given = {"student_logits": student, "teacher_probs": torch.softmax(teacher, 1), "exponent": 1.5}
    assert ofa_loss(**given, target=mixed).item() == ofa_loss(**given, target=target).item()
    assert ofa_loss(**given, target=mixed).item() != pytest.approx(ofa_loss(**given, target=other).item(), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_logits_give_a_number_and_a_gradient(dtype: torch.dtype) -> None:
    # 0 * log(0) where softmax underflows is what the released code answers with NaN
    student = torch.tensor([[300.0, 0.0, -300.0], [-1000.0, 1000.0, 0.0]], dtype=dtype, requires_grad=True)
    probs = torch.softmax(torch.tensor([[500.0, 0.0, -500.0], [0.0, 800.0, -800.0]]), 1)
    loss = ofa_loss(student_logits=student, teacher_probs=probs, target=torch.tensor([0, 0]), exponent=1.5)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite() and student.grad.isfinite().all()
    assert loss.item() == pytest.approx(0.0, abs=1e-4), "student and teacher are certain of the same classes"


def test_a_tiny_probability_of_the_label_keeps_its_weight() -> None:
    # (1 + 1e-9)^1.5 - 1 is 0 in float32 when it is computed as it is written
    probs = torch.tensor([[1e-9, 1.0]])
    student = torch.tensor([[-1e4, 1e4]], requires_grad=True)
    loss = ofa_loss(student_logits=student, teacher_probs=probs, target=torch.tensor([0]), exponent=1.5)
    assert loss.item() == pytest.approx(1.5e-9 * 2e4, rel=1e-3)
