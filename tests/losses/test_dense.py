from __future__ import annotations

import pytest
import torch

from visionkd.losses.dist import dist_loss
from visionkd.losses.pairwise import pairwise_loss
from visionkd.losses.pixel_kd import pixel_kd_loss, smoothed_pixel_kl_loss


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


STUDENT, TEACHER = drawn(3, 5, 4, 6), 2 * drawn(3, 5, 4, 6, seed=1)


def loss_and_gradient(reduction: str, temperature: float = 1.0, **given) -> tuple[float, torch.Tensor]:
    student = STUDENT.clone().requires_grad_()
    given = given or {"teacher_logits": TEACHER}
    loss = pixel_kd_loss(student_logits=student, temperature=temperature, reduction=reduction, **given)
    loss.backward()
    return loss.item(), student.grad


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_reductions_differ_by_the_stated_factors(temperature):
    mean, gradient = loss_and_gradient("kl_batchmean", temperature)
    element, element_gradient = loss_and_gradient("kl_elementmean", temperature)
    assert element == pytest.approx(mean / (5 * temperature**2), rel=1e-5)
    torch.testing.assert_close(5 * temperature**2 * element_gradient, gradient)
    entropy, entropy_gradient = loss_and_gradient("pixel_ce", temperature)
    torch.testing.assert_close(entropy_gradient * temperature**2, 3 * gradient)
    probs = (TEACHER / temperature).softmax(1)
    expected = 3 * (mean / temperature**2 - float((probs * probs.log()).sum(1).mean()))
    assert entropy == pytest.approx(expected, rel=1e-5)


def test_probabilities_stand_for_logits():
    assert loss_and_gradient("kl_batchmean", 2.0, teacher_probs=(TEACHER / 2).softmax(1))[0] == pytest.approx(
        loss_and_gradient("kl_batchmean", 2.0)[0], rel=1e-5
    )
    with pytest.raises(ValueError, match="either"):
        pixel_kd_loss(student_logits=STUDENT)


@pytest.mark.parametrize("reduction", ["kl_batchmean", "kl_elementmean", "pixel_ce"])
def test_pixels_that_do_not_count_change_nothing(reduction):
    valid = torch.rand(3, 4, 6, generator=torch.Generator().manual_seed(2)) < 0.5
    other = torch.where(valid[:, None], TEACHER, 5 * TEACHER.flip(1))
    first, gradient = loss_and_gradient(reduction, teacher_logits=TEACHER, valid=valid)
    assert loss_and_gradient(reduction, teacher_logits=other, valid=valid)[0] == pytest.approx(first, rel=1e-6)
    assert not gradient[(~valid)[:, None].expand_as(gradient)].any() and gradient.any()
    everywhere = loss_and_gradient(reduction, teacher_logits=TEACHER, valid=torch.ones_like(valid))[0]
    assert everywhere == pytest.approx(loss_and_gradient(reduction)[0], rel=1e-6)
    nothing = loss_and_gradient(reduction, teacher_logits=TEACHER, valid=torch.zeros_like(valid))
    assert nothing[0] == 0.0 and not nothing[1].any()


def test_smoothing_bounds_the_loss_where_the_student_is_certain_and_wrong():
    certain = torch.zeros(1, 2, 1, 1)
    certain[0, 0] = 1000.0
    loss = smoothed_pixel_kl_loss(student_logits=certain, teacher_logits=certain.flip(1), temperature=1.0)
    assert loss == pytest.approx(-float(torch.tensor(1e-5).log()), rel=1e-3)
    assert smoothed_pixel_kl_loss(student_logits=TEACHER, teacher_logits=TEACHER) == pytest.approx(0.0, abs=1e-6)


def test_dist_knows_relations_alone():
    logits = drawn(40, 3)
    assert dist_loss(student_logits=TEACHER, teacher_logits=TEACHER) == pytest.approx(0.0, abs=1e-5)
    flat = TEACHER.permute(0, 2, 3, 1).reshape(-1, 5)
    own = STUDENT.permute(0, 2, 3, 1).reshape(-1, 5)
    maps = dist_loss(student_logits=STUDENT, teacher_logits=TEACHER, inter_weight=2.0, intra_weight=0.5)
    rows = dist_loss(student_logits=own, teacher_logits=flat, inter_weight=2.0, intra_weight=0.5)
    assert maps == pytest.approx(float(rows), rel=1e-5)
    # what one class gains where another loses is anti-correlated: twice the largest distance between independent ones
    opposite = dist_loss(student_logits=logits[:, :2], teacher_logits=logits[:, :2].flip(1), intra_weight=0.0)
    assert opposite == pytest.approx(2.0, rel=1e-4)


def test_pairs_are_compared_by_direction_whatever_their_channels():
    student, teacher = drawn(2, 7, 6, 8), drawn(2, 4, 6, 8, seed=1)
    loss = pairwise_loss(student_map=student, teacher_map=teacher)
    assert 0 < loss < 4
    assert pairwise_loss(student_map=3 * student, teacher_map=0.1 * teacher) == pytest.approx(float(loss), rel=1e-4)
    assert pairwise_loss(student_map=teacher, teacher_map=2 * teacher) == pytest.approx(0.0, abs=1e-6)


def test_pairs_by_hand():
    student = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).view(1, 2, 1, 2)  # two places, at right angles
    teacher = torch.ones(1, 2, 1, 2)  # two places, alike
    loss = pairwise_loss(student_map=student, teacher_map=teacher, scale=0.1)
    assert loss == pytest.approx(2 / 4, abs=1e-6)  # two of the four pairs differ by 1


@pytest.mark.parametrize("detach_norm", [True, False])
def test_the_length_is_a_constant_or_not(detach_norm):
    student = drawn(2, 3, 4, 4).requires_grad_()
    loss = pairwise_loss(student_map=student, teacher_map=drawn(2, 3, 4, 4, seed=1), scale=0.1, detach_norm=detach_norm)
    loss.backward()
    along = (student.grad * student.detach()).sum(1).abs().max()  # the length itself changes no cosine
    assert (along < 1e-6) != detach_norm
