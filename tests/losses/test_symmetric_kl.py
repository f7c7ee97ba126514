from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from visionkd.losses.symmetric_kl import feature_distance_loss, multilabel_symmetric_kl_loss, symmetric_kl_loss


def logits(seed: int, scale: float = 3.0, classes: int = 5) -> torch.Tensor:
    return scale * torch.randn(6, classes, generator=torch.Generator().manual_seed(seed))


def authors_form(student: torch.Tensor, teacher: torch.Tensor, eps: float = 1e-12) -> torch.Tensor:
    """As the card writes it: each term times C, and the mean over all B x C entries."""
    p, q = teacher.double().softmax(1), student.double().softmax(1)
    forward = p * torch.log((p + eps) / (q + eps))
    backward = q * torch.log((q + eps) / (p + eps))
    return (p.shape[1] * (forward + backward) / 2).mean()


@pytest.mark.parametrize("scale", [0.1, 3.0, 40.0])
@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-10])
def test_it_is_the_papers_sum(scale, eps):
    if eps == 0.0 and scale > 10:
        pytest.skip("without eps the divergence of such outputs has no bound")
    student, teacher = logits(0, scale), logits(1, scale)
    found = symmetric_kl_loss(student_logits=student, teacher_logits=teacher, eps=eps)
    assert found.item() == pytest.approx(authors_form(student, teacher, eps).item(), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("scale", [3.0, 40.0])
def test_both_gradients_are_those_of_the_papers_sum(scale):
    ours = [logits(seed, scale).requires_grad_() for seed in (0, 1)]
    theirs = [logits(seed, scale).double().requires_grad_() for seed in (0, 1)]
    symmetric_kl_loss(student_logits=ours[0], teacher_logits=ours[1], detach_teacher=False).backward()
    authors_form(*theirs).backward()
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own.grad.double(), other.grad, rtol=1e-4, atol=1e-6)


def test_student_gradient_is_the_cards_closed_form():
    student, teacher = logits(0).requires_grad_(), logits(1)
    symmetric_kl_loss(student_logits=student, teacher_logits=teacher, eps=0.0).backward()
    p_s, p_t = student.detach().softmax(1), teacher.softmax(1)
    r = (p_s / p_t).log()
    expected = ((p_s - p_t) + p_s * (r - (p_s * r).sum(1, keepdim=True))) / (2 * len(student))
    torch.testing.assert_close(student.grad, expected, rtol=1e-4, atol=1e-6)


def test_equal_distributions_give_exactly_zero_and_no_gradient():
    student = logits(0).requires_grad_()
    loss = symmetric_kl_loss(student_logits=student, teacher_logits=logits(0))
    loss.backward()
    assert loss.item() == 0.0 and student.grad.abs().max() == 0.0


def test_swapping_the_networks_changes_nothing():
    forth = symmetric_kl_loss(student_logits=logits(0), teacher_logits=logits(1))
    back = symmetric_kl_loss(student_logits=logits(1), teacher_logits=logits(0))
    assert forth.item() == pytest.approx(back.item(), rel=1e-6)


def test_it_is_not_the_bounded_js_divergence():
    student, teacher = logits(0), logits(1)
    p, q = teacher.softmax(1), student.softmax(1)
    m = (p + q) / 2
    bounded = 0.5 * (p * (p / m).log() + q * (q / m).log()).sum(1).mean()
    found = symmetric_kl_loss(student_logits=student, teacher_logits=teacher)
    assert bounded < math.log(2) < found


def test_it_is_a_mean_over_the_batch_and_ignores_classes_of_no_mass():
    student, teacher = logits(0), logits(1)
    once = symmetric_kl_loss(student_logits=student, teacher_logits=teacher)
    twice = symmetric_kl_loss(student_logits=student.repeat(2, 1), teacher_logits=teacher.repeat(2, 1))
    more = [F.pad(z, (0, 95), value=-1e4) for z in (student, teacher)]
    wider = symmetric_kl_loss(student_logits=more[0], teacher_logits=more[1])
    assert twice.item() == pytest.approx(once.item(), rel=1e-6)
    assert wider.item() == pytest.approx(once.item(), rel=1e-5)


def test_stored_probabilities_give_the_same_as_logits():
    for scale in (3.0, 40.0):
        results = []
        for given in ({"teacher_logits": logits(1, scale)}, {"teacher_probs": logits(1, scale).softmax(1)}):
            student = logits(0, scale).requires_grad_()
            loss = symmetric_kl_loss(student_logits=student, **given)
            loss.backward()
            results.append((loss, student.grad))
        torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


def test_a_stored_zero_is_capped_by_eps():
    student = torch.zeros(1, 2, requires_grad=True)
    loss = symmetric_kl_loss(student_logits=student, teacher_probs=torch.tensor([[1.0, 0.0]]))
    loss.backward()
    assert loss.item() == pytest.approx(0.25 * (math.log(2) + math.log(0.5 / 1e-12)), rel=1e-5)
    assert torch.isfinite(student.grad).all()


def test_the_teacher_gets_a_gradient_only_on_request():
    teacher = logits(1).requires_grad_()
    symmetric_kl_loss(student_logits=logits(0).requires_grad_(), teacher_logits=teacher).backward()
    assert teacher.grad is None
    symmetric_kl_loss(student_logits=logits(0), teacher_logits=teacher, detach_teacher=False).backward()
    assert teacher.grad.abs().max() > 0


def test_half_precision_is_summed_in_float32():
    student, teacher = logits(0, 20.0), logits(1, 20.0)
    exact = symmetric_kl_loss(student_logits=student.half().float(), teacher_logits=teacher.half().float())
    found = symmetric_kl_loss(student_logits=student.half(), teacher_logits=teacher.half())
    assert found.dtype == torch.float32 and found.item() == exact.item()


def test_one_kind_of_teacher_is_asked_for():
    for given in ({}, {"teacher_logits": logits(1), "teacher_probs": logits(1).softmax(1)}):
        with pytest.raises(ValueError, match="either"):
            symmetric_kl_loss(student_logits=logits(0), **given)


def test_multilabel_form_sums_over_classes_that_are_present():
    student, teacher = logits(0), logits(1)
    p, q = teacher.double().sigmoid(), student.double().sigmoid()
    expected = 0.5 * ((p - q) * (p / q).log()).sum(1).mean()
    found = multilabel_symmetric_kl_loss(student_logits=student, teacher_logits=teacher)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_dml_teaches_both_networks_and_udml_adds_the_mean_squared_error_of_a_map():
    """DML is CE + CE + the symmetric term; UDML adds exactly ``mean((f_s - f_t)^2)``."""
    target = torch.tensor([0, 1, 2, 3, 4, 0])
    pair = [logits(seed).requires_grad_() for seed in (0, 1)]
    maps = [torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(n)).requires_grad_() for n in (2, 3)]
    symmetric = symmetric_kl_loss(student_logits=pair[0], teacher_logits=pair[1], detach_teacher=False)
    distance = feature_distance_loss(student_feature=maps[0], teacher_feature=maps[1], detach_teacher=False)
    grads = torch.autograd.grad(symmetric, pair, retain_graph=True)
    assert all(grad.abs().max() > 0 for grad in grads)
    dml = F.cross_entropy(pair[0], target) + F.cross_entropy(pair[1], target) + symmetric
    udml = dml + distance
    assert (udml - dml).item() == pytest.approx((maps[0] - maps[1]).square().mean().item(), abs=1e-5)
    udml.backward()
    torch.testing.assert_close(maps[0].grad, -maps[1].grad)
    torch.testing.assert_close(maps[0].grad, 2 * (maps[0] - maps[1]).detach() / maps[0].numel())


def test_feature_distance_refuses_maps_that_would_be_broadcast():
    with pytest.raises(ValueError, match="not one shape"):
        feature_distance_loss(student_feature=torch.zeros(2, 3), teacher_feature=torch.zeros(3))
