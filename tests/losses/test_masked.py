from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from visionkd.losses.cwd import channel_wise_loss
from visionkd.losses.masked import (
    alignment_loss,
    hard_label_loss,
    hidden_feature_loss,
    masked_pixel_loss,
    nkd_loss,
    normalized_patches,
    patchify,
    unpatchify,
)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_patch_lies_row_by_row_with_its_channels_together():
    image = torch.arange(2 * 3 * 4 * 6, dtype=torch.float32).view(2, 3, 4, 6)
    patches = patchify(image, (2, 3))
    assert patches.shape == (2, 4, 18)
    assert torch.equal(patches[1, 3], image[1, :, 2:4, 3:6].permute(1, 2, 0).reshape(-1))
    assert torch.equal(unpatchify(patches, grid=(2, 2), patch=(2, 3)), image)


def test_standardised_patches_divide_by_one_less():
    patches = normalized_patches(5 * drawn(2, 3, 12) + 7)
    assert patches.mean(-1).abs().max() < 1e-5
    assert torch.allclose(patches.var(-1, correction=1), torch.ones(2, 3), atol=1e-4)


def test_only_removed_patches_count_and_all_of_the_batch_alike():
    pred, target = drawn(2, 4, 6), drawn(2, 4, 6, seed=1)
    mask = torch.tensor([[1.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    loss = masked_pixel_loss(student_pred=pred, target=target, mask=mask)
    error = (pred - target).square().mean(-1)
    assert loss == pytest.approx(float((error[0, :3].sum() + error[1, 0]) / 4))
    pred[0, 3] += 100.0
    assert masked_pixel_loss(student_pred=pred, target=target, mask=mask) == loss


@pytest.mark.parametrize("distance", ["l1", "l2"])
def test_alignment_knows_directions_alone(distance):
    student, teacher = drawn(2, 5, 16), drawn(2, 5, 16, seed=1)
    loss = alignment_loss(student_feature=student, teacher_feature=teacher, distance=distance)
    scaled = alignment_loss(
        student_feature=student * torch.rand(2, 5, 1).add(0.5), teacher_feature=3 * teacher, distance=distance
    )
    assert torch.allclose(loss, scaled, atol=1e-6) and loss > 0
    same = alignment_loss(student_feature=2 * teacher, teacher_feature=teacher, distance=distance)
    assert float(same) == pytest.approx(0.0, abs=1e-7)


def test_alignment_of_unrelated_directions():
    wide = alignment_loss(student_feature=drawn(8, 50, 1024), teacher_feature=drawn(8, 50, 1024, seed=1))
    assert float(wide) == pytest.approx(0.035, abs=0.002)


def test_hidden_features_are_quadratic_near_and_linear_far():
    hidden = drawn(2, 3, 32)
    target = F.layer_norm(hidden, (32,), eps=1e-6)
    near = hidden_feature_loss(student_pred=target + 0.5, teacher_hidden=hidden)
    assert float(near) == pytest.approx(0.25 / 4, rel=1e-4)
    pred = (target + 10.0).requires_grad_()
    hidden_feature_loss(student_pred=pred, teacher_hidden=hidden).backward()
    assert torch.allclose(pred.grad, torch.full_like(pred, 1 / pred.numel()))
    moved = hidden_feature_loss(student_pred=drawn(2, 3, 32, seed=2), teacher_hidden=4 * hidden + 9)
    still = hidden_feature_loss(student_pred=drawn(2, 3, 32, seed=2), teacher_hidden=hidden)
    assert float(moved) == pytest.approx(float(still), rel=1e-4)


def test_saying_nothing_costs_a_quarter():
    loss = hidden_feature_loss(student_pred=torch.zeros(16, 65, 256), teacher_hidden=drawn(16, 65, 256))
    assert float(loss) == pytest.approx(0.247, abs=0.002)


def test_losses_give_the_teacher_no_gradient():
    for loss in (
        lambda s, t: alignment_loss(student_feature=s, teacher_feature=t),
        lambda s, t: hidden_feature_loss(student_pred=s, teacher_hidden=t),
        lambda s, t: nkd_loss(student_logits=s[:, 0], teacher_logits=t[:, 0], target=torch.tensor([0, 1])),
        lambda s, t: channel_wise_loss(student_map=s[..., None], teacher_map=t[..., None]),
    ):
        student, teacher = drawn(2, 3, 8).requires_grad_(), drawn(2, 3, 8, seed=1).requires_grad_()
        loss(student, teacher).backward()
        assert teacher.grad is None and student.grad.abs().sum() > 0


def test_hard_labels_and_nkd():
    student, teacher, target = drawn(4, 5), drawn(4, 5, seed=1), torch.tensor([0, 1, 2, 3])
    expected = F.cross_entropy(student, teacher.argmax(1))
    assert hard_label_loss(student_logits=student, teacher_logits=teacher) == expected
    first = nkd_loss(student_logits=student, teacher_logits=teacher, target=target, alpha=0.0)
    confidence = teacher.softmax(1)[range(4), target]
    expected = (confidence * F.cross_entropy(student, target, reduction="none")).mean()
    assert float(first) == pytest.approx(float(expected))
    soft = nkd_loss(student_logits=student, teacher_logits=teacher, target=F.one_hot(target, 5).float())
    assert soft == nkd_loss(student_logits=student, teacher_logits=teacher, target=target)


def test_both_forms_of_channel_wise_distillation_have_the_same_gradient():
    grads = []
    for divergence in ("kl", "cross_entropy"):
        student = drawn(2, 3, 4, 5).requires_grad_()
        loss = channel_wise_loss(
            student_map=student, teacher_map=drawn(2, 3, 4, 5, seed=1), temperature=2.0, divergence=divergence
        )
        loss.backward()
        grads.append(student.grad)
    assert torch.allclose(*grads, atol=1e-7)
    same = drawn(2, 3, 4, 5)
    assert float(channel_wise_loss(student_map=same, teacher_map=same)) == pytest.approx(0.0, abs=1e-6)
