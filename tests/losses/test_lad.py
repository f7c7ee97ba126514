from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from visionkd.losses.cwd import channel_wise_loss
from visionkd.losses.dist import dist_loss
from visionkd.losses.lad import (
    fixed_codes,
    label_channel,
    pixel_cross_entropy,
    student_terms,
    teacher_terms,
    with_label,
)

CLASSES = 5


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def labels(*shape: int, seed: int = 0) -> torch.Tensor:
    target = torch.randint(0, CLASSES, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    target[..., :2] = 255
    return target


def test_codes_are_the_authors_for_21_classes_and_spread_alike_for_others():
    assert torch.allclose(fixed_codes(21), (torch.arange(22) - 11) / 10, atol=1e-6)
    codes = fixed_codes(11)
    assert len(codes) == 12 and codes[0] == pytest.approx(-1.1) and codes[-1] == pytest.approx(1.0)
    assert torch.allclose(codes.diff(), torch.full((11,), 2.1 / 11), atol=1e-6)


def test_without_pixel_noise_every_region_has_one_value_that_is_its_images_own():
    target, codes = labels(3, 8, 9), drawn(3, CLASSES + 1)
    channel = label_channel(target=target, codes=codes, gain=1.75)
    assert channel.shape == (3, 1, 8, 9) and channel.dtype == torch.float32
    for image, row, code in zip(channel[:, 0], target, codes, strict=True):
        for value in row.unique().tolist():
            slot = CLASSES if value == 255 else value
            assert (image[row == value] == 1.75 * code[slot]).all()
    assert not set(channel[0].unique().tolist()) & set(channel[1].unique().tolist())


def test_noise_is_scaled_by_sigma_and_gain_and_the_image_stays_what_it_is():
    target, noise, image = labels(2, 6, 6), drawn(2, 1, 6, 6), torch.rand(2, 3, 6, 6)
    still = label_channel(target=target, codes=fixed_codes(CLASSES), gain=2.0)
    noisy = label_channel(target=target, codes=fixed_codes(CLASSES), noise=noise, sigma=0.1, gain=2.0)
    assert torch.allclose(noisy - still, 0.2 * noise, atol=1e-6)
    seen = with_label(image, noisy)
    assert torch.equal(seen[:, :3], image) and torch.equal(seen[:, 3:], noisy)
    assert not label_channel(target=target, codes=torch.zeros(CLASSES + 1), noise=noise).any()


def test_labels_stay_in_float32_where_half_precision_would_round_them():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        channel = label_channel(
            target=labels(1, 4, 4), codes=drawn(1, CLASSES + 1), noise=drawn(1, 1, 4, 4), gain=100.0
        )
    assert channel.dtype == torch.float32


def test_ignored_pixels_do_not_count_and_none_that_count_give_zero():
    logits, target = drawn(2, CLASSES, 6, 6), labels(2, 6, 6)
    loss = pixel_cross_entropy(logits=logits, target=target)
    assert loss == pytest.approx(float(F.cross_entropy(logits, target.long(), ignore_index=255)), rel=1e-6)
    changed = logits.clone()
    changed[..., :2] += 7 * drawn(2, CLASSES, 6, 2, seed=3)
    assert pixel_cross_entropy(logits=changed, target=target) == loss
    nothing = logits.clone().requires_grad_()
    pixel_cross_entropy(logits=nothing, target=torch.full((2, 6, 6), 255)).backward()
    assert not nothing.grad.any()


@pytest.mark.parametrize("align_corners", [True, False])
def test_logits_are_brought_to_the_labels(align_corners):
    logits, target = drawn(2, CLASSES, 3, 4), labels(2, 12, 16)
    whole = F.interpolate(logits, size=(12, 16), mode="bilinear", align_corners=align_corners)
    expected = F.cross_entropy(whole, target.long(), ignore_index=255)
    found = pixel_cross_entropy(logits=logits, target=target, align_corners=align_corners)
    assert found == pytest.approx(float(expected), rel=1e-6)


def test_paths_are_summed_and_pull_each_other_without_moving_what_they_are_pulled_to():
    one, two = drawn(2, CLASSES, 3, 4).requires_grad_(), drawn(2, CLASSES, 3, 4, seed=1).requires_grad_()
    given = {"target": labels(2, 12, 16), "aux": ((), ())}
    terms = teacher_terms(logits=(one, two), **given)
    swapped = teacher_terms(logits=(two, one), **given)
    assert all(torch.allclose(terms[name], swapped[name]) for name in terms)
    same = {name: float(term.detach()) for name, term in teacher_terms(logits=(one, one), **given).items()}
    assert same["consistency_loss"] == pytest.approx(0.0, abs=1e-5)
    alone = pixel_cross_entropy(logits=one.detach(), target=given["target"])
    assert same["task_loss"] == pytest.approx(2 * float(alone), rel=1e-6)
    (found,) = torch.autograd.grad(terms["consistency_loss"], one)
    (expected,) = torch.autograd.grad(channel_wise_loss(student_map=one, teacher_map=two, temperature=4.0), one)
    assert torch.equal(found, expected)


def test_auxiliary_heads_weigh_a_twentieth_in_the_students_objective():
    logits, aux, teacher = (drawn(2, CLASSES, 3, 4, seed=seed) for seed in range(3))
    target = labels(2, 12, 16)
    given = {"student_logits": logits, "teacher_logits": teacher, "target": target}
    without = student_terms(student_aux=(), **given)
    with_aux = student_terms(student_aux=(aux,), **given)
    extra = float(with_aux["task_loss"] - without["task_loss"])
    assert extra == pytest.approx(0.02 * float(pixel_cross_entropy(logits=aux, target=target)), rel=1e-4)
    assert with_aux["distill_loss"] == without["distill_loss"] > 0
    found = {
        name: float(student_terms(student_aux=(), distance=name, **given)["distill_loss"]) for name in ("kl", "dist")
    }
    assert found["dist"] == pytest.approx(float(dist_loss(student_logits=logits, teacher_logits=teacher)), rel=1e-6)
    assert 0 < found["kl"] != found["dist"]


def test_the_channel_wise_distance_knows_shapes_alone_and_scales_with_its_temperature():
    student, teacher = drawn(2, CLASSES, 3, 4), drawn(2, CLASSES, 3, 4, seed=1)
    loss = channel_wise_loss(student_map=student, teacher_map=teacher, temperature=4.0)
    shifted = channel_wise_loss(student_map=student + drawn(2, CLASSES, 1, 1), teacher_map=teacher, temperature=4.0)
    assert torch.allclose(loss, shifted, rtol=1e-4)
    halved = channel_wise_loss(student_map=student / 2, teacher_map=teacher / 2, temperature=2.0)
    assert loss == pytest.approx(4 * float(halved), rel=1e-4)
    assert channel_wise_loss(student_map=teacher + 3, teacher_map=teacher) == pytest.approx(0.0, abs=1e-5)
