from __future__ import annotations

import pytest
import torch
from torch import Tensor

from visionkd.losses.diswot import class_relation_distance, relation_distance, semantic_distance, zero_share


def pair(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    student, teacher = torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed))
    return student, teacher


def direct(grad: Tensor) -> Tensor:
    """The same gradient as a map of two places, which takes the form with C x C matrices."""
    return torch.stack([grad, torch.zeros_like(grad)], dim=2)[..., None]


def test_closed_form_is_the_direct_one_in_value_and_gradient() -> None:
    student, teacher = pair(6, 5)
    student[1], teacher[1], teacher[2] = 0.0, 0.0, 0.0
    student[3] *= 1e-9
    found, expected = student.clone().requires_grad_(), student.clone().requires_grad_()
    ours = semantic_distance(student_map=found, teacher_map=teacher)
    theirs = semantic_distance(student_map=direct(expected), teacher_map=direct(teacher))
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    normal = [0, 2, 4, 5]
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(found.grad[normal], expected.grad[normal], rtol=1e-3, atol=1e-6)


def test_zero_classes_count_one_in_one_network_and_nothing_in_both() -> None:
    grad = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    assert semantic_distance(student_map=torch.zeros(4, 3), teacher_map=grad).item() == pytest.approx(1.0, rel=1e-6)
    assert semantic_distance(student_map=torch.zeros(4, 3), teacher_map=torch.zeros(4, 3)).item() == 0.0
    grad[1:3] = 0.0
    assert zero_share(grad).item() == 0.5


def test_distances_ignore_scale_and_stay_within_their_bounds() -> None:
    student, teacher = pair(6, 4, 3, 3)
    relation = relation_distance(student_map=student, teacher_map=teacher).item()
    scaled = relation_distance(student_map=7.0 * student, teacher_map=0.1 * teacher).item()
    assert 0.0 < relation <= 4.0 / 6 and scaled == pytest.approx(relation, rel=1e-4)
    student, teacher = pair(6, 4)
    semantic = semantic_distance(student_map=student, teacher_map=teacher).item()
    scales = torch.linspace(0.5, 3.0, 6)[:, None]
    assert 0.0 < semantic <= 4.0
    assert semantic_distance(student_map=scales * student, teacher_map=teacher).item() == pytest.approx(
        semantic, rel=1e-4
    )
    assert 0.0 < class_relation_distance(student_grad=student, teacher_grad=torch.randn(6, 9)).item() <= 4.0


def test_a_zero_sample_gets_a_finite_gradient_and_the_teacher_none() -> None:
    student, teacher = pair(4, 3, 2, 2)
    student[0] = 0.0
    student.requires_grad_()
    teacher.requires_grad_()
    relation = relation_distance(student_map=student, teacher_map=teacher)
    (relation + semantic_distance(student_map=student, teacher_map=teacher)).backward()
    assert student.grad.abs().max() < 10.0 and student.grad[1:].abs().sum() > 0 and teacher.grad is None


def test_half_precision_is_left_under_autocast() -> None:
    student, teacher = pair(4, 3, 2, 2)
    expected = relation_distance(student_map=student, teacher_map=teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = relation_distance(student_map=student, teacher_map=teacher)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_other_channel_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="channels differ"):
        semantic_distance(student_map=torch.ones(2, 3), teacher_map=torch.ones(2, 4))
