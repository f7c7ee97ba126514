"""Losses of OADP: what they are 0 for, what they do not depend on, and their weights in time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from visionkd.losses.oadp import WEIGHTS, asymmetric_loss, embedding_loss, global_loss, relation_loss


def unit(rows: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(rows, 16, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.mark.parametrize("loss", [embedding_loss, relation_loss, global_loss])
def test_zero_only_where_student_and_cache_agree(loss) -> None:
    teacher = unit(5, 0)
    assert loss(student_embedding=teacher.clone(), teacher_embedding=teacher) == pytest.approx(0.0, abs=1e-10)
    moved = teacher.clone()
    moved[3] = unit(1, 1)[0]
    assert loss(student_embedding=moved, teacher_embedding=teacher) > 0


def test_relations_see_no_order_and_no_common_turn() -> None:
    student, teacher, order = unit(6, 0), unit(6, 1), torch.randperm(6, generator=torch.Generator().manual_seed(2))
    plain = relation_loss(student_embedding=student, teacher_embedding=teacher)
    shuffled = relation_loss(student_embedding=student[order], teacher_embedding=teacher[order])
    assert shuffled.item() == pytest.approx(plain.item(), rel=1e-5)
    turn = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(3)))[0]
    assert relation_loss(student_embedding=teacher @ turn, teacher_embedding=teacher) < 1e-10
    assert embedding_loss(student_embedding=teacher @ turn, teacher_embedding=teacher) > 0.1


def test_the_global_loss_grows_with_the_batch_and_the_object_loss_does_not() -> None:
    student, teacher = unit(4, 0), unit(4, 1)
    twice = {"student_embedding": student.repeat(2, 1), "teacher_embedding": teacher.repeat(2, 1)}
    once = {"student_embedding": student, "teacher_embedding": teacher}
    assert global_loss(**twice).item() == pytest.approx(2 * global_loss(**once).item())
    assert embedding_loss(**twice).item() == pytest.approx(embedding_loss(**once).item())


@pytest.mark.parametrize("loss", [embedding_loss, relation_loss, global_loss])
def test_the_teacher_gets_no_gradient_and_no_objects_give_a_zero_gradient(loss) -> None:
    student, teacher = unit(3, 0).requires_grad_(), unit(3, 1).requires_grad_()
    loss(student_embedding=student, teacher_embedding=teacher).backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0
    none = torch.zeros(0, 16, requires_grad=True)
    value = loss(student_embedding=none, teacher_embedding=torch.zeros(0, 16))
    value.backward()
    assert value == 0 and none.grad is not None


def test_half_precision_does_not_reach_the_products() -> None:
    student, teacher = unit(5, 0), unit(5, 1)
    full = relation_loss(student_embedding=student, teacher_embedding=teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert relation_loss(student_embedding=student, teacher_embedding=teacher) == full
        assert (student @ teacher.T).dtype == torch.bfloat16  # which is what would have happened


def test_masked_classes_cost_nothing_and_count_in_the_mean() -> None:
    logits, target = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), torch.zeros(4, 6, dtype=torch.bool)
    target[0, 1] = target[2, 0] = True
    masked = torch.cat([logits, torch.full((4, 2), float("-inf"))], dim=1).requires_grad_()
    wider = torch.cat([target, torch.zeros(4, 2, dtype=torch.bool)], dim=1)
    loss = asymmetric_loss(student_logits=masked, target=wider)
    loss.backward()
    plain = asymmetric_loss(student_logits=logits, target=target)
    assert loss.item() == pytest.approx(plain.item() * 6 / 8, rel=1e-6)
    assert masked.grad[:, 6:].abs().sum() == 0 and masked.grad.isfinite().all()


def test_easy_negatives_are_forgiven_and_positives_are_not() -> None:
    easy = torch.logit(torch.tensor([[0.04]]))
    absent = torch.zeros(1, 1, dtype=torch.bool)
    assert asymmetric_loss(student_logits=easy, target=absent) == 0
    assert asymmetric_loss(student_logits=easy, target=~absent).item() == pytest.approx(
        -torch.tensor(0.04).log().item()
    )
    undamped = asymmetric_loss(student_logits=-easy, target=absent, gamma_negative=0)
    damped = asymmetric_loss(student_logits=-easy, target=absent)
    assert damped.item() == pytest.approx(undamped.item() * (1 - 0.09) ** 4, rel=1e-4)  # p_m = 1 - 0.96 + 0.05


def test_weights_warm_up_and_the_released_trainer_leaves_two_at_their_first_step() -> None:
    label = WEIGHTS["block_label_loss"]
    assert label.at(1) == pytest.approx(0.016) and label.at(500) == pytest.approx(8) and label.at(5000) == 16
    assert label.at(5000, released=True) == pytest.approx(0.016)
    assert WEIGHTS["global_label_loss"].at(5000, released=True) == pytest.approx(0.002)
    objects = WEIGHTS["object_loss"]
    assert objects.at(100) == objects.at(100, released=True) == 128 and objects.at(10**6) == 256
